"""Small facts about models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.accelerate.utils.absent import absent

__all__ = [
    "compute_module_sizes",
    "find_tied_parameters",
    "get_mixed_precision_context_manager",
    "named_module_tensors",
]


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and buffers, by name."""
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        yield from module.named_buffers(recurse=recurse)


def compute_module_sizes(model: nn.Module, dtype: torch.dtype | None = None, **_: Any) -> dict[str, int]:
    """Bytes of every submodule, by name; "" is the whole."""
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in named_module_tensors(model, recurse=True):
        size = (
            tensor.numel()
            * (tensor.dtype if dtype is None else min(dtype, tensor.dtype, key=lambda d: d.itemsize)).itemsize
        )
        parts = name.split(".")
        for length in range(len(parts) + 1):
            sizes[".".join(parts[:length])] += size
    return dict(sizes)


def find_tied_parameters(model: nn.Module) -> list[list[str]]:
    """Names that stand for one parameter, a list for each."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[id(param)].append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def get_mixed_precision_context_manager(
    native_amp: bool = False, autocast_kwargs: Any = None
) -> AbstractContextManager[Any]:
    """`torch.autocast` of the precision in use, or nothing."""
    from macrobatch.accelerate.state import AcceleratorState

    state = AcceleratorState()
    if not native_amp or state.mixed_precision not in ("bf16", "fp16"):
        return nullcontext()
    half = torch.bfloat16 if state.mixed_precision == "bf16" else torch.float16
    return torch.autocast(
        state.device.type, dtype=half, **({} if autocast_kwargs is None else autocast_kwargs.to_kwargs())
    )


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
