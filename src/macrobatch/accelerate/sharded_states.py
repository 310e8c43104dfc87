"""States of models and optimizers as on one rank, whether they are sharded or not."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from macrobatch.accelerate.utils.other import model_has_dtensor
from macrobatch.core.autograd import gradients_aside, set_gradient

__all__ = ["load_optimizer", "load_weights", "optimizer_state", "whole_weights"]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Of a model; of a sharded one, gathered on the host."""
    _reshard(model)
    return get_model_state_dict(model, options=_WHOLE) if model_has_dtensor(model) else model.state_dict()


def load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Into a model; tied weights may be there once."""
    _reshard(model)
    if model_has_dtensor(model):
        set_model_state_dict(model, state, options=_WHOLE)
    else:
        model.load_state_dict(state, strict=False)  # tied weights are saved once; the rest was checked


def _reshard(model: nn.Module) -> None:
    """An evaluation, or a policy, may have left its parameters whole: others than its optimizer has."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def optimizer_state(optimizer: Any, models: Sequence[nn.Module]) -> dict[str, Any]:
    """Of an optimizer, whole if one of the models is sharded and its own."""
    owner = _sharded_owner(optimizer, models)
    if owner is None:
        return optimizer.state_dict()
    with _left_without_state(optimizer.optimizer):
        return get_optimizer_state_dict(owner, optimizer.optimizer, options=_WHOLE)


def load_optimizer(optimizer: Any, state: dict[str, Any], models: Sequence[nn.Module]) -> None:
    """Into an optimizer, of whose shards this rank takes its own."""
    owner = _sharded_owner(optimizer, models)
    if owner is None:
        optimizer.load_state_dict(state)
        return
    if not any(state["state"].values()):  # torch looks there for the device
        optimizer.state.clear()
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        return
    with gradients_aside(owner.parameters()):  # torch makes the state that it fills by a step, if there are none
        set_optimizer_state_dict(owner, optimizer.optimizer, state, options=_WHOLE)


@contextmanager
def _left_without_state(optimizer: torch.optim.Optimizer) -> Generator[None]:
    """Context in which torch makes no state where there is none yet. It would, by a step with gradients of zero, unless
    there is a gradient: AdamW would count that step, and a momentum would begin with the decay of the weights."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    is_new = not optimizer.state and all(param.grad is None for param in params)
    if is_new:
        set_gradient(params[0], torch.zeros_like(params[0]))
    try:
        yield
    finally:
        if is_new:
            params[0].grad = None


def _sharded_owner(optimizer: Any, models: Sequence[nn.Module]) -> nn.Module | None:
    ids = {id(param) for group in optimizer.param_groups for param in group["params"]}
    own = (model for model in models if any(id(param) in ids for param in model.parameters()))
    return next((model for model in own if model_has_dtensor(model)), None)
