"""Which tensors a loss adds to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from macrobatch.core.leaves import reaches

GLOBAL = nn.Linear(2, 2)


def ids(module: nn.Module) -> set[int]:
    return {id(param) for param in module.parameters()}


class Runs:
    """Something to call in which no tensors are to be seen."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


def by_global(x: Tensor) -> Tensor:
    return GLOBAL(x)


WAYS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "module": lambda module: module,
    "method": lambda module: module.forward,
    "partial": lambda module: partial(module.__call__),
    "closure": lambda module: lambda x: module(x),
    "closure of a list": lambda module: (lambda layers: lambda x: layers[0](x))([module]),
    "default": lambda module: lambda x, run=module: run(x),
    "parameter": lambda module: (lambda weight: lambda x: x @ weight)(module.weight),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_checkpoint_runs_is_seen(way: str):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True)
    loss = checkpoint(WAYS[way](module), x, use_reentrant=True).sum()
    assert reaches(loss, ids(module), [])
    assert not reaches(loss, ids(other), [])


def test_what_a_checkpoint_runs_by_a_global_name_is_seen():
    loss = checkpoint(by_global, torch.ones(1, 2, requires_grad=True), use_reentrant=True).sum()
    assert reaches(loss, ids(GLOBAL), [])
    assert not reaches(loss, ids(nn.Linear(2, 2)), [])


def test_where_the_graph_does_not_tell_it_is_taken_to_reach():
    loss = checkpoint(Runs(nn.Linear(2, 2)), torch.ones(1, 2, requires_grad=True), use_reentrant=True).sum()
    assert reaches(loss, ids(nn.Linear(2, 2)), [])
    assert reaches(torch.ones(()), set(), [])


def test_what_is_behind_a_tensor_that_a_checkpoint_uses_is_seen():
    module, behind, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    weight = 2 * behind.weight
    loss = checkpoint(lambda x: module(x) @ weight, torch.ones(1, 2, requires_grad=True), use_reentrant=True).sum()
    assert [reaches(loss, ids(each), []) for each in (module, behind, other)] == [True, True, False]


def test_what_is_before_a_checkpoint_is_seen():
    first, second, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    loss = checkpoint(second, first(torch.ones(1, 2)), use_reentrant=True).sum()
    assert [reaches(loss, ids(module), []) for module in (first, second, other)] == [True, True, False]


def test_frozen_parameters_are_not_reached():
    module = nn.Linear(2, 2).requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    for loss in (module(x).sum(), checkpoint(module, x, use_reentrant=True).sum()):
        assert not reaches(loss, ids(module), [])
        assert reaches(loss, {id(x)}, [])


def test_outputs_that_a_closure_keeps_make_no_endless_search():
    module, seen = nn.Linear(2, 2), [torch.ones(1, 2, requires_grad=True)]
    for _ in range(3):
        seen.append(checkpoint(lambda x: module(x) + sum(seen[:1]), seen[-1], use_reentrant=True))
    assert reaches(seen[-1].sum(), ids(module), [])
    assert not reaches(seen[-1].sum(), ids(nn.Linear(2, 2)), [])


def test_a_way_is_kept_for_alike_losses_and_replaced_for_others():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    wanted, way = ids(module), []
    x = torch.ones(1, 2)
    assert reaches(module(x).sum(), wanted, way)
    first = list(way)
    assert first
    assert reaches(module(2 * x).sum(), wanted, way)
    assert way == first
    assert not reaches(other(x).sum(), wanted, way)
    assert reaches((module(x).relu() ** 2).sum(), wanted, way)
    assert way != first
    assert reaches(module.weight, wanted, way)
    assert not reaches(other.weight, wanted, way)
