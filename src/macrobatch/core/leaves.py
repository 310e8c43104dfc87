"""Which tensors' gradients a loss adds to, read off its graph before its backward."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

__all__ = ["reaches"]

_MANY = 1000  # so many are data, not layers


def reaches(loss: Tensor, wanted: Container[int], way: list[int]) -> bool:
    """Whether a backward of this loss adds to the gradient of any of certain tensors; True, too, if the graph does not
    tell: without one, and behind a function that runs a backward of its own of nobody knows what.

    Args:
        loss: of any shape.
        wanted: the tensors' ids.
        way: the edges that led to one of them from a loss before, replaced if they do not from this one. The losses of
            a loop are alike, so that the graph is mostly not searched, but for the few nodes on that way.

    ```pycon
    >>> import torch
    >>> layer, other, way = nn.Linear(1, 1), nn.Linear(1, 1), []
    >>> wanted = set(map(id, layer.parameters()))
    >>> [reaches(module(torch.ones(1, 1)).sum(), wanted, way) for module in (layer, other)]
    [True, False]

    ```
    """
    if loss.grad_fn is None:
        return not loss.requires_grad or id(loss) in wanted
    if id(getattr(_followed(loss.grad_fn, way), "variable", None)) in wanted:
        return True
    nodes: list[Any] = [loss.grad_fn]
    origins: list[tuple[int, int] | None] = [None]
    seen = set(nodes)
    for index, node in enumerate(nodes):  # which grows: those nearest to the loss come first
        if isinstance(node, BackwardCFunction):
            for tensor in _run_by(node):
                if tensor is None or id(tensor) in wanted:
                    return True
                if tensor.grad_fn is not None and tensor.grad_fn not in seen:
                    seen.add(tensor.grad_fn)
                    nodes.append(tensor.grad_fn)
                    origins.append(None)
        elif hasattr(node, "variable") and id(node.variable) in wanted:
            way[:] = _way_to(index, origins)
            return True
        for edge, (after, _) in enumerate(node.next_functions):
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)
                origins.append((index, edge))
    return False


def _followed(node: Any, way: list[int]) -> Any:
    for edge in way:
        edges = node.next_functions
        node = edges[edge][0] if edge < len(edges) else None
        if node is None:
            return None
    return node


def _way_to(index: int, origins: list[tuple[int, int] | None]) -> list[int]:
    way: list[int] = []
    origin = origins[index]
    while origin is not None:
        way.append(origin[1])
        origin = origins[origin[0]]
    return way[::-1]


def _run_by(function: BackwardCFunction) -> Iterator[Tensor | None]:
    """The tensors that require gradients of what a function written in Python has kept to run in its backward, as
    re-entrant checkpoints do. None if it has kept something to run in which there are no tensors to be seen."""
    held: list[Any] = list(vars(function).values())
    seen: set[int] = set()
    runs = is_told = False
    for each in held:  # which grows
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor | nn.Module):
            is_told = is_told or isinstance(each, nn.Parameter | nn.Module)
            tensors = [each] if isinstance(each, Tensor) else each.parameters()
            yield from (tensor for tensor in tensors if tensor.requires_grad)
        elif isinstance(each, list | tuple | dict):
            held += [] if len(each) > _MANY else each.values() if isinstance(each, dict) else each
        elif isinstance(each, partial):
            held += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, MethodType):
            runs = True
            held.append(each.__self__)
        elif isinstance(each, FunctionType):
            runs = True
            named = map(each.__globals__.get, each.__code__.co_names)
            held += [*gc.get_referents(*(each.__closure__ or ())), *(each.__defaults__ or ())]
            held += [value for value in named if isinstance(value, Tensor | nn.Module | list | tuple | dict)]
        elif callable(each) and not isinstance(each, type):
            runs = True
    if runs and not is_told:
        yield None
