"""Trees of tensors on one rank.

A tree is a tensor, or a list, tuple, named tuple or mapping of trees; what else is in it is left alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from macrobatch.accelerate.utils.dataclasses import TensorInformation

__all__ = [
    "concatenate",
    "find_batch_size",
    "find_device",
    "get_data_structure",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "recursively_apply",
    "send_to_device",
    "slice_tensors",
    "tensors_of",
]


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
    first = next(tensors_of(data), None)
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
    return next((tensor.shape[0] for tensor in tensors_of(data) if tensor.ndim), None)


def ignorant_find_batch_size(data: Any) -> int | None:
    """`find_batch_size`, and None for what is not a tree."""
    return next((tensor.shape[0] for tensor in tensors_of(data) if tensor.ndim), None)


def tensors_of(data: Any) -> Iterator[Any]:
    """All tensors of a tree."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from tensors_of(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from tensors_of(value)


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
