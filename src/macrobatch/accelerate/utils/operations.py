"""Trees of tensors between ranks, and between precisions; those of one rank are in `trees`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import update_wrapper, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from macrobatch.accelerate.utils.absent import absent
from macrobatch.accelerate.utils.dataclasses import TensorInformation
from macrobatch.accelerate.utils.environment import debug_mode
from macrobatch.accelerate.utils.trees import (
    concatenate,
    find_batch_size,
    find_device,
    get_data_structure,
    honor_type,
    ignorant_find_batch_size,
    initialize_tensors,
    is_namedtuple,
    is_tensor_information,
    is_torch_tensor,
    listify,
    recursively_apply,
    send_to_device,
    slice_tensors,
    tensors_of,
)
from macrobatch.errors import ArgumentError, PeerError

__all__ = [
    "CannotPadNestedTensorWarning",
    "ConvertOutputsToFp32",
    "DistributedOperationException",
    "TensorInformation",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_object",
    "get_data_structure",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "pad_input_tensors",
    "recursively_apply",
    "reduce",
    "send_to_device",
    "slice_tensors",
]


_REDUCTIONS = ("sum", "mean", "max", "none")


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor has no one length, and stays as it is."""


class DistributedOperationException(PeerError):
    """Ranks pass tensors of shapes that do not fit together; found with ACCELERATE_DEBUG_MODE=1."""


# --- between ranks ---


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _compared(what: Callable[[Tensor], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """With ACCELERATE_DEBUG_MODE=1, compare this of tensors over ranks first, which costs a collective."""

    def decorated(operation: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(operation)
        def compared(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if debug_mode() and _world_size() > 1:
                mine = [what(each) for each in tensors_of(tensor)]
                everywhere: list[Any] = [None] * _world_size()
                dist.all_gather_object(everywhere, mine)
                if any(other != mine for other in everywhere):
                    raise DistributedOperationException(
                        operation.__name__,
                        given=f"by rank, {what.__name__}s {everywhere}",
                        expected="the same on every rank",
                        fix="pad first, with pad_across_processes",
                    )
            return operation(tensor, *args, **kwargs)

        return compared

    return decorated


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def dimension(tensor: Tensor) -> int:
    return tensor.ndim


@_compared(shape)
def gather(tensor: Any) -> Any:
    """All ranks' tensors, one after the other along dimension 0, on every rank; a 0-d tensor counts as one row."""
    if _world_size() == 1:
        return tensor

    def gathered(mine: Tensor) -> Tensor:
        mine = (mine.reshape(1) if mine.ndim == 0 else mine).contiguous()
        everywhere = [torch.empty_like(mine) for _ in range(_world_size())]
        dist.all_gather(everywhere, mine)
        return torch.cat(everywhere)

    return recursively_apply(gathered, tensor, error_on_other_type=True)


def gather_object(object: Any) -> Any:
    """All ranks' objects. Lists are joined; anything else is one element for each rank."""
    if _world_size() == 1:
        return object
    everywhere: list[Any] = [None] * _world_size()
    dist.all_gather_object(everywhere, object)
    if isinstance(object, list | tuple):
        return [item for each in everywhere for item in each]
    return everywhere


@_compared(shape)
def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """One rank's tensors, on every rank, in place."""
    if _world_size() == 1:
        return tensor

    def sent(mine: Tensor) -> Tensor:
        dist.broadcast(mine, src=from_process)
        return mine

    return recursively_apply(sent, tensor, error_on_other_type=True)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """One rank's objects, on every rank, in place."""
    if _world_size() > 1:
        dist.broadcast_object_list(object_list, src=from_process)
    return object_list


def copy_tensor_to_devices(tensor: Tensor | None = None) -> Tensor:
    """A tensor that one rank has, on every rank; the others pass None and need not know its shape."""
    held = [each for each in gather_object([None if tensor is None else tensor.cpu()]) if each is not None]
    if len(held) != 1:
        raise ArgumentError(
            "tensor", given=f"one on {len(held)} ranks", expected="one on one rank", fix="pass None on the others"
        )
    if tensor is not None:
        return tensor
    return held[0].to("cuda" if dist.get_backend() == "nccl" else "cpu")


@_compared(shape)
def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """All ranks' tensors as one, on every rank.

    Args:
        reduction: "sum", "mean", "max", or "none": each rank keeps its own.
        scale: factor on the result.
    """
    if reduction not in _REDUCTIONS:
        raise ArgumentError("reduction", given=repr(reduction), expected=f"one of {_REDUCTIONS}", fix='pass "sum"')

    def reduced(mine: Tensor) -> Tensor:
        whole = mine.clone()
        if reduction != "none" and _world_size() > 1:
            dist.all_reduce(whole, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
            if reduction == "mean":
                whole = whole / _world_size()
        return whole if scale == 1.0 else whole * scale

    return recursively_apply(reduced, tensor, error_on_other_type=True)


@_compared(dimension)
def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Tensors made as long as the longest of all ranks, along one dimension."""

    def padded(mine: Tensor) -> Tensor:
        if mine.is_nested:
            warnings.warn("a nested tensor is not padded", CannotPadNestedTensorWarning, stacklevel=2)
            return mine
        if dim >= mine.ndim or dim < -mine.ndim:
            return mine
        axis = dim % mine.ndim
        longest = torch.tensor(mine.shape[axis], device=mine.device)
        if _world_size() > 1:
            dist.all_reduce(longest, dist.ReduceOp.MAX)
        missing = int(longest) - mine.shape[axis]
        if not missing:
            return mine
        shape = [*mine.shape]
        shape[axis] = missing
        filling = mine.new_full(shape, pad_index)
        return torch.cat([filling, mine] if pad_first else [mine, filling], dim=axis)

    return recursively_apply(padded, tensor, error_on_other_type=True)


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Tensors with their last row repeated, until `num_processes` divides their number of rows."""

    def padded(mine: Tensor) -> Tensor:
        missing = -batch_size % num_processes
        if not missing or mine.ndim == 0 or mine.shape[dim] != batch_size:
            return mine
        last = mine.narrow(dim, batch_size - 1, 1)
        return torch.cat([mine, *[last] * missing], dim=dim)

    return recursively_apply(padded, tensor, error_on_other_type=True)


# --- precision ---


def convert_to_fp32(tensor: Any) -> Any:
    """A tree with its 16-bit tensors in float32."""
    return recursively_apply(
        lambda t: t.float(),
        tensor,
        test_type=lambda t: isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16),
    )


class ConvertOutputsToFp32:
    """A forward whose outputs are float32; picklable, unlike a closure."""

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(self.model_forward(*args, **kwargs))


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose outputs are float32."""
    wrapped = ConvertOutputsToFp32(model_forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    forward.__wrapped__ = wrapped  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
