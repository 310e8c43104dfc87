"""Batches of any shape: tensors in tuples, lists, dicts and other mappings, NamedTuples and dataclasses, nested.

A batch has *rows*, one per sample. A leaf with rows is a tensor or NumPy array with at least one dimension (rows are
its first), or a list of plain values such as strings, or of lists of them. Everything else (numbers, strings, None, 0-d
tensors, tuples of them, other objects) has no rows and goes along with every micro-batch unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from macrobatch.errors import ArgumentError, BatchError

__all__ = [
    "Flat",
    "cat",
    "flatten",
    "is_on",
    "leaves",
    "map_tensors",
    "num_rows",
    "pinned",
    "select",
    "split",
    "spread_out",
    "structure",
    "to_device",
]

T = TypeVar("T")
Rebuild = Callable[[Sequence[Any]], Any]

_ATOMS = str | bytes | int | float | complex | None


class Flat(NamedTuple):
    """A batch taken apart once: its leaves, its number of samples, and the way back."""

    leaves: list[Any]
    num_rows: int
    rebuild: Rebuild

    def split(self, sizes: Sequence[int]) -> list[Any]:
        """Consecutive parts of the given numbers of rows, which must add up to all of them."""
        if not all(type(size) is int and size > 0 for size in sizes) or sum(sizes) != self.num_rows:
            raise ArgumentError(
                "tree.split sizes",
                given=list(sizes),
                expected=f"positive integers that add up to the {self.num_rows} rows of the batch",
                fix="cut the batch at its own number of rows (tree.num_rows)",
            )
        for leaf in self.leaves if len(sizes) > 1 else ():
            if isinstance(leaf, list | tuple) and len(leaf) == self.num_rows and not _is_row_list(leaf):
                raise BatchError(
                    "batch",
                    given=f"a {type(leaf).__name__} of {len(leaf)} items without rows, beside as many samples",
                    expected="a list of plain values or a tensor, if it has one item per sample",
                    fix="make it one of these, or let loss_fn close over it if it belongs to the batch as a whole",
                )
        cuts = [_split_leaf(leaf, sizes) for leaf in self.leaves]
        return [self.rebuild(parts) for parts in zip(*cuts, strict=True)]


def flatten(batch: Any) -> Flat:
    """Take a batch apart.

    Raises:
        BatchError: no leaf has rows, the leaves disagree, or there is no row at all.
    """
    values, rebuild = _flatten(batch)
    sizes = [len(leaf) for leaf in values if _has_rows(leaf)]
    if not sizes or min(sizes) != max(sizes) or sizes[0] == 0:
        raise _row_error(batch)
    return Flat(values, sizes[0], rebuild)


def leaves(batch: Any) -> list[Any]:
    """The leaves of a batch, depth first, dictionaries in their own order.

    ```pycon
    >>> leaves({"text": ["a", "b"], "target": (1, None)})
    [['a', 'b'], (1, None)]

    ```
    """
    return _flatten(batch)[0]


def num_rows(batch: Any) -> int:
    """Number of samples in a batch; raises as `flatten` does.

    ```pycon
    >>> num_rows({"x": torch.zeros(3, 2), "y": torch.zeros(3), "temperature": 0.7})
    3

    ```
    """
    return flatten(batch).num_rows


def split(batch: T, sizes: Sequence[int]) -> list[T]:
    """Cut a batch into consecutive parts of the given numbers of rows; tensors become views, nothing is copied.

    ```pycon
    >>> [part.tolist() for part in split(torch.arange(5), [2, 2, 1])]
    [[0, 1], [2, 3], [4]]

    ```
    """
    return flatten(batch).split(sizes)


def select(batch: T, rows: slice | Sequence[int]) -> T:
    """The given rows of a batch: a slice (views) or a list of row numbers (copies).

    ```pycon
    >>> select({"x": torch.arange(4), "ids": ["a", "b", "c", "d"]}, [3, 0])
    {'x': tensor([3, 0]), 'ids': ['d', 'a']}

    ```
    """
    values, rebuild = _flatten(batch)
    return rebuild([_select_leaf(leaf, rows) if _has_rows(leaf) else leaf for leaf in values])


def cat(batches: Sequence[T]) -> T:
    """Put batches of one structure together again: the inverse of `split`. Leaves without rows come from the first.

    Raises:
        BatchError: there is no batch, or the structures differ.
    """
    flat = [_flatten(batch) for batch in batches]
    structures = {structure(batch) for batch in batches}
    if len(structures) != 1:
        raise BatchError(
            "tree.cat",
            given=f"{len(flat)} batches of {len(structures)} structures",
            expected="at least one batch, all of the same structure",
            fix="cat only batches that came from one split",
        )
    return flat[0][1]([_cat_leaf(parts) for parts in zip(*(values for values, _ in flat), strict=True)])


def map_tensors(function: Callable[[Tensor], Any], batch: T) -> T:
    """Apply a function to every tensor of a batch and rebuild it."""
    values, rebuild = _flatten(batch)
    return rebuild([_mapped(function, leaf) for leaf in values])


def is_on(batch: Any, device: torch.device) -> bool:
    """Whether all tensors of a batch are on a device, given with its index."""
    return all(_is_on(device, leaf) for leaf in leaves(batch))


def to_device(batch: T, device: torch.device) -> T:
    """The batch with all its tensors on a device; itself if they are there already, or if the device is the host.

    From host memory to an accelerator the copy is pinned and non-blocking, so that it overlaps with the work queued
    there (https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html).
    """
    if device.type == "cpu" or is_on(batch, device):
        return batch

    def move(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and device.type == "cuda":
            tensor = pinned(tensor)
        return tensor.to(device, non_blocking=True)

    return map_tensors(move, batch)


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the host in pinned memory; an expanded one, whose elements share places there, as a whole one."""
    return spread_out(tensor).pin_memory()


def spread_out(tensor: Tensor) -> Tensor:
    """The tensor with a place for each element; itself if it has not been expanded."""
    is_expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.contiguous() if is_expanded else tensor


def _is_plain(value: Any) -> bool:
    """A list or tuple that holds nothing with rows."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        return False
    return not any(map(_holds_rows, value))


def _is_row_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, _ATOMS) or _is_row_list(item) for item in value)


def _holds_rows(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    if isinstance(value, list) and _is_row_list(value):
        return bool(value)
    parts = None if isinstance(value, _ATOMS) else _children(value)
    return parts is not None and any(map(_holds_rows, parts[1]))


def _has_rows(leaf: Any) -> bool:
    if isinstance(leaf, Tensor | np.ndarray):
        return leaf.ndim > 0
    return _is_row_list(leaf)


def _children(node: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    """Keys and values of a container, or None for a leaf."""
    if isinstance(node, Tensor | np.ndarray | _ATOMS) or _is_row_list(node) or _is_plain(node):
        return None
    if isinstance(node, Mapping):
        return list(node.keys()), list(node.values())
    if isinstance(node, tuple | list):
        return getattr(node, "_fields", range(len(node))), node
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return names, [getattr(node, name) for name in names]
    return None


def _rebuilt(node: Any, keys: Sequence[Any], values: Sequence[Any]) -> Any:
    """A container like `node` with other values."""
    kind: Any = type(node)
    if kind is tuple or kind is list:
        return kind(values)
    if kind is dict:
        return dict(zip(keys, values, strict=True))
    if isinstance(node, tuple | list):
        return kind(*values) if hasattr(node, "_fields") else kind(values)
    if isinstance(node, dict):
        node = copy.copy(node)  # keeps what the subclass adds, a default factory for one
        for key, value in zip(keys, values, strict=True):
            node[key] = value
        return node
    if isinstance(node, Mapping):
        return kind(dict(zip(keys, values, strict=True)))
    node = copy.copy(node)
    for key, value in zip(keys, values, strict=True):
        object.__setattr__(node, key, value)  # frozen dataclasses too
    return node


def _flatten(tree: Any) -> tuple[list[Any], Rebuild]:
    if type(tree) is tuple and tree and all(type(node) is Tensor and node.ndim for node in tree):
        return list(tree), tuple  # what _children would say, in a tenth of the time
    if type(tree) is dict and tree and all(type(node) is Tensor and node.ndim for node in tree.values()):
        names = list(tree)
        return list(tree.values()), lambda values: dict(zip(names, values, strict=True))
    parts = _children(tree)
    if parts is None:
        return [tree], lambda values: values[0]
    keys, nodes = parts
    if all(_children(node) is None for node in nodes):  # one level: nearly every batch
        return list(nodes), lambda values: _rebuilt(tree, keys, values)
    flat = [_flatten(node) for node in nodes]
    counts = [len(values) for values, _ in flat]

    def rebuild(values: Sequence[Any]) -> Any:
        rest = iter(values)
        groups = [[next(rest) for _ in range(count)] for count in counts]
        return _rebuilt(tree, keys, [make(group) for (_, make), group in zip(flat, groups, strict=True)])

    return [leaf for values, _ in flat for leaf in values], rebuild


def _mapped(function: Callable[[Tensor], Any], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return function(leaf)
    if isinstance(leaf, list | tuple) and any(isinstance(item, Tensor | list | tuple) for item in leaf):
        return type(leaf)(_mapped(function, item) for item in leaf)
    return leaf


def _is_on(device: torch.device, leaf: Any) -> bool:
    if isinstance(leaf, list | tuple):
        return all(_is_on(device, item) for item in leaf)
    return not isinstance(leaf, Tensor) or leaf.device == device


def structure(tree: Any) -> tuple[Any, ...]:
    """The containers of a batch and their keys, without its leaves: something to compare and to look up by."""
    parts = _children(tree)
    if parts is None:
        return (type(tree).__name__ if _has_rows(tree) else "no rows",)
    keys, nodes = parts
    return type(tree).__name__, tuple(keys), *map(structure, nodes)


def _split_leaf(leaf: Any, sizes: Sequence[int]) -> Sequence[Any]:
    if not _has_rows(leaf):
        return [leaf] * len(sizes)
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided:
            raise BatchError(
                "batch",
                given=f"a {leaf.layout} tensor",
                expected="strided tensors, which can be cut by rows",
                fix="densify it, or cut the micro-batches yourself and pass them to TrainStep.window",
            )
        return leaf.split(list(sizes))
    ends = np.cumsum(sizes).tolist()
    return [leaf[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _select_leaf(leaf: Any, rows: slice | Sequence[int]) -> Any:
    if isinstance(rows, slice):
        return leaf[rows]
    return [leaf[row] for row in rows] if isinstance(leaf, list) else leaf[list(rows)]


def _cat_leaf(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if not _has_rows(first):
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    return np.concatenate(parts) if isinstance(first, np.ndarray) else [row for part in parts for row in part]


def _paths(tree: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    parts = _children(tree)
    if parts is None:
        yield path, tree
        return
    for key, node in zip(*parts, strict=True):
        yield from _paths(node, f"{path}[{key!r}]")


def _row_error(batch: Any) -> BatchError:
    found = {path: len(leaf) for path, leaf in _paths(batch) if _has_rows(leaf)}
    if not found:
        return BatchError(
            "batch",
            given=f"{type(batch).__name__} without a tensor, array or list that has one row per sample",
            expected="tensors whose first dimension counts the samples, in any tuple, list, dict or dataclass",
            fix="pass what the DataLoader yields, or add a batch dimension",
        )
    if set(found.values()) == {0}:
        return BatchError("batch", given="no samples", expected="at least one row", fix="skip empty batches")
    return BatchError(
        "batch",
        given="leaves with different numbers of rows: " + ", ".join(f"{path}: {rows}" for path, rows in found.items()),
        expected="one row per sample in every leaf",
        fix="leave what has no row per sample out of the batch and let loss_fn close over it, pad samples of different "
        "lengths into one tensor or pack them (docs/variable-lengths.md), or cut the micro-batches yourself and pass "
        "them to TrainStep.window",
    )
