"""A process's place among all."""

from __future__ import annotations

import dataclasses

import pytest

from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks


def test_ranks_default_is_alone_and_main():
    ranks = Ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (0, 1, 0, 1)
    assert ranks.is_main
    assert ranks.is_local_main


@pytest.mark.parametrize(
    ("rank", "local_rank", "is_main", "is_local_main"),
    [(0, 0, True, True), (2, 0, False, True), (3, 1, False, False), (0, 1, True, False)],
)
def test_main_is_rank_0_globally_and_locally(rank, local_rank, is_main, is_local_main):
    ranks = Ranks(rank=rank, world_size=4, local_rank=local_rank, local_world_size=2)
    assert ranks.is_main is is_main
    assert ranks.is_local_main is is_local_main


@pytest.mark.parametrize(
    "numbers",
    [
        {"rank": 1},
        {"rank": -1, "world_size": 2},
        {"world_size": 0},
        {"world_size": -1},
        {"rank": 4, "world_size": 4},
        {"local_rank": 1},
        {"world_size": 4, "local_rank": 2, "local_world_size": 2},
        {"local_world_size": 0},
        {"rank": 0.5, "world_size": 2},
        {"world_size": True},
        {"rank": False},
        {"world_size": float("nan")},
        {"rank": "0"},
    ],
    ids=str,
)
def test_ranks_out_of_range_are_refused_showing_them(numbers):
    with pytest.raises(ArgumentError, match=r"ranks: given Ranks\(.*0 <= rank < world_size.*torchrun") as caught:
        Ranks(**numbers)
    for name, number in numbers.items():
        assert f"{name}={number}" in str(caught.value)


def test_ranks_are_a_value():
    assert Ranks(rank=1, world_size=2) == Ranks(rank=1, world_size=2)
    assert len({Ranks(), Ranks(), Ranks(world_size=2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ranks().rank = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_ranks_take_names_only():
    with pytest.raises(TypeError):
        Ranks(0, 1)  # pyright: ignore[reportCallIssue]
