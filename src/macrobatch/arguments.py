"""What `TrainStep` and `accumulate` accept, each refused by its own name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from macrobatch.checks import check_integer
from macrobatch.core.autograd import refuse_sparse
from macrobatch.core.events import Listener
from macrobatch.errors import ArgumentError, LossError

__all__ = [
    "check_callables",
    "check_global_batch",
    "check_sparse_grad",
    "check_surroundings",
    "checked_listeners",
    "checked_optimizers",
    "checked_schedulers",
    "parameters",
    "tell_untrained",
]

_LOG = logging.getLogger("macrobatch")
_SHOWN = 3


def parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """All parameters of some optimizers, in the order of their groups."""
    return [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]


def check_callables(model: object, loss_fn: object, count: object) -> None:
    """Refuse what is no model, no loss function or no count."""
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", given=type(model).__name__, expected="an nn.Module", fix="pass the model itself")
    if not callable(loss_fn) or isinstance(loss_fn, nn.Module):
        raise ArgumentError(
            "loss_fn",
            given=type(loss_fn).__name__,
            expected="a function loss_fn(model, micro_batch)",
            fix="write def loss_fn(model, batch): return criterion(model(batch[0]), batch[1])",
        )
    if count is not None and not callable(count):
        raise ArgumentError(
            "count",
            given=repr(count),
            expected="a function count(batch) or None",
            fix="pass a function of the macro-batch",
        )


def check_sparse_grad(sparse_grad: object, model: nn.Module) -> None:
    """Refuse a model that makes sparse gradients, unless they may become dense."""
    if sparse_grad not in ("refuse", "densify"):
        raise ArgumentError(
            "sparse_grad", given=repr(sparse_grad), expected='"refuse" or "densify"', fix="leave it at its default"
        )
    if sparse_grad == "refuse":
        refuse_sparse(model)


def check_global_batch(global_batch: object) -> None:
    """Refuse what is no number of samples."""
    check_integer("global_batch", global_batch, or_none=True, fix="pass global_batch=1000")


def check_surroundings(optimizers: Sequence[Optimizer], device: torch.device) -> None:
    """Refuse a call where no gradient would be computed, or with parameters that have left a device."""
    if torch.is_inference_mode_enabled():
        raise LossError(
            "the loss",
            given="a call in inference mode",
            expected="gradients to compute",
            fix="call the step outside of torch.inference_mode() and torch.no_grad()",
        )
    found = next(p.device for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    if found != device:
        raise ArgumentError(
            "TrainStep",
            given=f"parameters on {found}, of a step that was built for {device}",
            expected="a model that stays where it was when the step was built",
            fix="move the model first, then build optimizer and step",
        )


def checked_optimizers(optimizer: object, model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; refused if they cannot train this model."""
    optimizers: tuple[Any, ...] = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    if not optimizers or not all(isinstance(each, Optimizer) for each in optimizers):
        raise ArgumentError(
            "optimizer",
            given=[type(each).__name__ for each in optimizers],
            expected="a torch.optim.Optimizer, or a list of them",
            fix="pass torch.optim.AdamW(model.parameters())",
        )
    params = parameters(optimizers)
    if any(map(is_lazy, params)):
        raise ArgumentError(
            "optimizer",
            given="a parameter of a lazy module that has no shape yet",
            expected="parameters with shapes",
            fix="run the model on one batch before building the optimizer",
        )
    if not any(param.requires_grad for param in params):
        raise ArgumentError(
            "optimizer",
            given=f"{len(params)} parameters, none of which requires grad",
            expected="at least one parameter to train",
            fix="build it from the parameters that are to be trained",
        )
    of_model = {id(param) for param in model.parameters()}
    if of_model and not any(id(param) in of_model for param in params):
        raise ArgumentError(
            "optimizer",
            given="one without any of the model's parameters",
            expected="an optimizer of this model",
            fix="build it from model.parameters(), after wrapping, moving or sharding the model",
        )
    if len({id(param) for param in params}) < len(params):
        raise ArgumentError(
            "optimizer",
            given="a parameter that is in it twice, or in two optimizers",
            expected="every parameter to be updated once",
            fix="give each parameter to one group of one optimizer",
        )
    return optimizers


def tell_untrained(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Warn in the log, in one line, of what requires grad and is in none of the optimizers: it may be forgotten."""
    known = set(map(id, parameters(optimizers)))
    names = [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in known]
    if names:
        _LOG.warning(
            "optimizer: of the model's parameters that require grad, %d are in no optimizer of this step: %s. "
            "Add them to one, or freeze them (requires_grad_(False)) if nothing else trains them",
            len(names),
            ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN),
        )


def checked_listeners(listeners: object) -> list[Listener]:
    """The listeners as a list of functions."""
    if isinstance(listeners, Iterable) and not isinstance(listeners, str):
        found: list[Any] = list(listeners)
        if all(map(callable, found)):
            return found
    raise ArgumentError(
        "listeners", given=repr(listeners), expected="a list of functions of an event", fix="pass listeners=[listener]"
    )


def checked_schedulers(scheduler: object) -> tuple[LRScheduler, ...]:
    """The schedulers as a tuple; refused if they do not step once per update."""
    if scheduler is None:
        return ()
    schedulers: tuple[Any, ...] = tuple(scheduler) if isinstance(scheduler, list | tuple) else (scheduler,)
    for each in schedulers:
        if isinstance(each, ReduceLROnPlateau):
            raise ArgumentError(
                "scheduler",
                given="ReduceLROnPlateau, which steps on a validation metric",
                expected="a scheduler that steps once per update",
                fix="leave it out and call its step(metric) yourself after each evaluation",
            )
        if isinstance(each, type | Optimizer) or not callable(getattr(each, "step", None)):
            raise ArgumentError(
                "scheduler", given=type(each).__name__, expected="an object with step()", fix="pass an LRScheduler"
            )
    return schedulers
