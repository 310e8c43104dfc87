"""Tensors, and trees of them, moved to devices and between ranks.

A tree is a tensor, or a list, tuple, named tuple or mapping of trees; what else is in it is left alone.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import update_wrapper, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from macrobatch.accelerate.utils.absent import absent
from macrobatch.accelerate.utils.dataclasses import TensorInformation
from macrobatch.accelerate.utils.environment import debug_mode
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


class CannotPadNestedTensorWarning(UserWarning):
    """A nested tensor has no one length, and stays as it is."""


class DistributedOperationException(PeerError):
    """Ranks pass tensors of shapes that do not fit together; found with ACCELERATE_DEBUG_MODE=1."""


def is_torch_tensor(tensor: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(tensor, Tensor)


def is_namedtuple(data: Any) -> bool:
    """Whether it is a named tuple."""
    return isinstance(data, tuple) and hasattr(data, "_fields")


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """Values in a container of the same type as another."""
    return type(obj)(*generator) if is_namedtuple(obj) else type(obj)(generator)


def _rebuilt(like: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping of the same type with other values; a subclass of dict keeps what it adds, as a default factory."""
    if type(like) is dict:
        return values
    if not isinstance(like, dict):
        return type(like)(values)  # pyright: ignore[reportCallIssue]
    result = copy.copy(like)
    for key, value in values.items():
        result[key] = value
    return result


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """A tree with a function applied to all of its tensors.

    Args:
        test_type: what counts as a tensor.
        error_on_other_type: raise a TypeError for anything else, instead of leaving it alone.
    """
    options: dict[str, Any] = {"test_type": test_type, "error_on_other_type": error_on_other_type, **kwargs}
    if isinstance(data, tuple | list):
        return honor_type(data, (recursively_apply(func, item, *args, **options) for item in data))
    if isinstance(data, Mapping):
        return _rebuilt(data, {key: recursively_apply(func, value, *args, **options) for key, value in data.items()})
    if test_type(data):
        return func(data, *args, **kwargs)
    if error_on_other_type:
        raise TypeError(
            f"{func.__name__}: given a {type(data).__name__}; expected a tree of tensors. To fix it, pass one."
        )
    return data


def send_to_device(tensor: Any, device: Any, non_blocking: bool = False, skip_keys: Any = None) -> Any:
    """A tree on a device. What has a `to` of its own (a `BatchEncoding`) is asked for it.

    Args:
        non_blocking: do not wait for copies from pinned memory.
        skip_keys: keys of mappings to leave where they are.
    """
    if isinstance(tensor, Tensor):
        return tensor.to(device, non_blocking=non_blocking)
    if hasattr(tensor, "to"):  # before containers: some of these are also mappings or named tuples
        try:
            return tensor.to(device, non_blocking=non_blocking)
        except TypeError:
            return tensor.to(device)
    skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys or ()
    if isinstance(tensor, tuple | list):
        return honor_type(tensor, (send_to_device(item, device, non_blocking, skipped) for item in tensor))
    if isinstance(tensor, Mapping):
        moved = {k: v if k in skipped else send_to_device(v, device, non_blocking, skipped) for k, v in tensor.items()}
        return _rebuilt(tensor, moved)
    if dataclasses.is_dataclass(tensor) and not isinstance(tensor, type):
        result = copy.copy(tensor)
        for name, value in vars(tensor).items():
            object.__setattr__(result, name, send_to_device(value, device, non_blocking, skipped))
        return result
    return tensor


def find_device(data: Any) -> torch.device | None:
    """Where the first tensor of a tree is; None without one."""
    first = next(_tensors(data), None)
    return None if first is None else first.device


def find_batch_size(data: Any) -> int | None:
    """Rows of the first tensor of a tree; None without a tensor that has any.

    Raises:
        TypeError: it is not a tree.
    """
    if not isinstance(data, Tensor | Mapping | list | tuple):
        raise TypeError(
            f"find_batch_size: given a {type(data).__name__}; expected a tree of tensors. To fix it, pass one."
        )
    return next((tensor.shape[0] for tensor in _tensors(data) if tensor.ndim), None)


def ignorant_find_batch_size(data: Any) -> int | None:
    """`find_batch_size`, and None for what is not a tree."""
    return next((tensor.shape[0] for tensor in _tensors(data) if tensor.ndim), None)


def _tensors(data: Any) -> Iterator[Any]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _tensors(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _tensors(value)


def listify(data: Any) -> Any:
    """A tree with its tensors as lists of numbers."""

    def numbers(tensor: Tensor) -> Any:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).tolist()

    return recursively_apply(numbers, data)


def slice_tensors(
    data: Any, tensor_slice: slice, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """A tree with its tensors cut to these rows."""
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def concatenate(data: Any, dim: int = 0) -> Any:
    """Trees of one structure, joined; a single one is itself, whatever is in it."""
    if len(data) == 1:
        return data[0]
    first = data[0]
    if isinstance(first, tuple | list):
        return honor_type(first, (concatenate([item[i] for item in data], dim) for i in range(len(first))))
    if isinstance(first, Mapping):
        return _rebuilt(first, {key: concatenate([item[key] for item in data], dim) for key in first})
    if not isinstance(first, Tensor):
        raise TypeError(
            f"concatenate: given a {type(first).__name__}; expected trees of tensors. To fix it, pass those."
        )
    return torch.cat(data, dim=dim)


def is_tensor_information(tensor_info: Any) -> bool:
    """Whether it stands for a tensor."""
    return isinstance(tensor_info, TensorInformation)


def get_data_structure(data: Any) -> Any:
    """A tree with a `TensorInformation` for each tensor, to be sent ahead of it."""
    return recursively_apply(lambda tensor: TensorInformation(tensor.shape, tensor.dtype), data)


def initialize_tensors(data_structure: Any) -> Any:
    """Empty tensors of what `get_data_structure` found."""
    return recursively_apply(
        lambda info: torch.empty(info.shape, dtype=info.dtype), data_structure, test_type=is_tensor_information
    )


# --- between ranks ---


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _compared(operation: Callable[..., Any]) -> Callable[..., Any]:
    """With ACCELERATE_DEBUG_MODE=1, compare shapes over ranks first, which costs a collective."""

    @wraps(operation)
    def compared(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if debug_mode() and _world_size() > 1:
            shapes = [tuple(each.shape) for each in _tensors(tensor)]
            everywhere: list[Any] = [None] * _world_size()
            dist.all_gather_object(everywhere, shapes)
            if any(other != shapes for other in everywhere):
                raise DistributedOperationException(
                    operation.__name__,
                    given=f"shapes by rank {everywhere}",
                    expected="the same on every rank",
                    fix="pad first, with pad_across_processes",
                )
        return operation(tensor, *args, **kwargs)

    return compared


@_compared
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


@_compared
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


@_compared
def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """All ranks' tensors as one, on every rank.

    Args:
        reduction: "sum", "mean", or "none": each rank keeps its own.
        scale: factor on the result.
    """
    if reduction not in ("sum", "mean", "none"):
        raise ArgumentError("reduction", given=reduction, expected='"sum", "mean" or "none"', fix='pass "sum"')

    def reduced(mine: Tensor) -> Tensor:
        whole = mine.clone()
        if reduction != "none" and _world_size() > 1:
            dist.all_reduce(whole, dist.ReduceOp.SUM)
            if reduction == "mean":
                whole = whole / _world_size()
        return whole if scale == 1.0 else whole * scale

    return recursively_apply(reduced, tensor, error_on_other_type=True)


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
