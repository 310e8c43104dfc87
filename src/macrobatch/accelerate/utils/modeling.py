"""Small facts about models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.accelerate.utils.absent import absent
from macrobatch.accelerate.utils.imports import is_peft_model

__all__ = [
    "compute_module_sizes",
    "find_tied_parameters",
    "get_mixed_precision_context_manager",
    "is_peft_model",
    "named_module_tensors",
]


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and buffers, by name.

    Args:
        remove_non_persistent: leave out the buffers that its `state_dict` leaves out.
    """
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        saved = set(module.state_dict()) if remove_non_persistent else None
        yield from (
            (name, buf) for name, buf in module.named_buffers(recurse=recurse) if saved is None or name in saved
        )


def compute_module_sizes(
    model: nn.Module, dtype: torch.dtype | None = None, special_dtypes: Any = None, buffers_only: bool = False
) -> dict[str, int]:
    """Bytes of every submodule, by name; "" is the whole.

    Args:
        dtype: count as if nothing were wider than this.
        special_dtypes: other types for some, by name.
        buffers_only: leave parameters out.
    """
    sizes: dict[str, int] = defaultdict(int)
    tensors = model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True)
    for name, tensor in tensors:
        item_size = tensor.dtype.itemsize
        if special_dtypes is not None and name in special_dtypes:
            item_size = special_dtypes[name].itemsize
        elif dtype is not None and (tensor.is_floating_point() or tensor.is_complex()):
            item_size = min(dtype.itemsize, item_size)
        parts = name.split(".")
        for length in range(len(parts) + 1):
            sizes[".".join(parts[:length])] += tensor.numel() * item_size
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
