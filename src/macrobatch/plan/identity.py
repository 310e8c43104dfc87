"""What a choice of micro-batches depends on: where all of it is the same, an earlier choice holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch import env, tree
from macrobatch.core.step import Step
from macrobatch.plan.memory import Memory
from macrobatch.plan.split import Auto

__all__ = ["identity_of"]


def identity_of(
    step: Step, auto: Auto, memory: Memory, capture: str | None, *, batch: Any, total: int
) -> dict[str, Any]:
    """Plain values that describe a step and its macro-batch, by what they describe."""
    leaves = [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)]
    loss_fn = getattr(step.loss_fn, "eager", step.loss_fn)
    capacity = memory.capacity_bytes()
    is_given = auto.memory is not None or step.device.type == "cuda"
    return {
        "model": _signature(step.model),
        "loss_fn": getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__),
        "precision": step.update.precision.name,
        "optimizers": list(map(_kind, step.update.optimizers)),
        "capture": capture,
        "sync": type(step.sync).__name__,
        "batch": [[list(leaf.shape[1:]), str(leaf.dtype)] for leaf in leaves],
        "total": total,
        "unit": auto.unit,
        "device": _device_name(step.device),
        # of a shared host, what is free changes all the time
        "memory": [round(capacity / 2**28, 0) if capacity and is_given else None, auto.memory_fraction],
        "versions": [torch.__version__, env.version("macrobatch")],
    }


def _signature(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [str(model), [[n, list(t.shape), str(t.dtype), t.requires_grad] for n, t in tensors], model.training]


def _kind(optimizer: Optimizer) -> list[Any]:
    """What of an optimizer decides how much state it has."""
    switches = {
        f"{name}={bool(value)}"
        for group in optimizer.param_groups
        for name, value in group.items()
        if isinstance(value, bool | int | float)
    }
    return [type(optimizer).__name__, *sorted(switches)]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
