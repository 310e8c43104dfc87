"""Which samples make up which window, and which are whose: properties over all sizes, epochs and world sizes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macrobatch.data import MacroBatchSampler
from macrobatch.data.windows import Windows, share
from macrobatch.errors import ArgumentError, StateError
from macrobatch.ranks import Ranks

WORLDS = range(1, 8)
TAILS = ("apply", "drop", "carry")


@st.composite
def settings_of(draw: Any) -> dict[str, Any]:
    tail = draw(st.sampled_from(TAILS))
    num_samples = draw(st.integers(1, 40))
    global_batch = draw(st.integers(1, num_samples if tail == "drop" else 60))
    return {
        "num_samples": num_samples,
        "global_batch": global_batch,
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**40)),
        "tail": tail,
    }


def joined(parts: Iterable[Any]) -> list[Any]:
    return list(chain(*parts))


def samplers(options: dict[str, Any], world_size: int) -> list[MacroBatchSampler]:
    return [MacroBatchSampler(**options, ranks=Ranks(rank=rank, world_size=world_size)) for rank in range(world_size)]


def whole_windows(options: dict[str, Any], epoch: int) -> list[list[int]]:
    return list(Windows(**options).shares(epoch, 0, Ranks()))


@given(num=st.integers(0, 5000), world_size=st.integers(1, 64))
@settings(deadline=None)
def test_shares_follow_one_another_and_are_even(num, world_size):
    shares = [share(num, Ranks(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert joined(shares) == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(options=settings_of(), world_size=st.sampled_from(WORLDS))
@settings(deadline=None)
def test_ranks_together_make_the_same_windows_for_any_world_size(options, world_size):
    ranks = samplers(options, world_size)
    for epoch in range(3):
        expected = whole_windows(options, epoch)
        assert {len(sampler) for sampler in ranks} == {len(expected)}
        shares = [list(sampler) for sampler in ranks]
        assert [joined(parts) for parts in zip(*shares, strict=True)] == expected
        for parts in zip(*shares, strict=True):
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(options=settings_of())
@settings(deadline=None)
def test_every_epoch_is_a_partition_of_the_samples(options):
    num, size = options["num_samples"], options["global_batch"]
    epochs = [whole_windows(options, epoch) for epoch in range(4)]
    if options["tail"] == "carry":  # the row of epochs, cut at multiples of the size; the rest waits for the next one
        row = [sample for windows in epochs for window in windows for sample in window]
        assert {len(window) for windows in epochs for window in windows} <= {size}
        assert len(row) == 4 * num // size * size
        for epoch in range(4):
            part = row[epoch * num : (epoch + 1) * num]
            assert len(set(part)) == len(part)
            assert len(part) < num or set(part) == set(range(num))
        return
    for windows in epochs:
        sizes = [len(window) for window in windows]
        row = joined(windows)
        assert sizes[:-1] == [size] * (len(sizes) - 1)
        assert len(set(row)) == len(row)
        if options["tail"] == "apply":
            assert set(row) == set(range(num))
        else:
            assert sizes[-1] == size
            assert len(row) == num // size * size


@given(options=settings_of(), before=st.sampled_from(WORLDS), after=st.sampled_from(WORLDS), data=st.data())
@settings(deadline=None)
def test_resume_anywhere_on_any_world_size(options, before, after, data):
    epochs = [whole_windows(options, epoch) for epoch in range(3)]
    epoch = data.draw(st.integers(0, 1))
    num_done = data.draw(st.integers(0, len(epochs[epoch])))
    states = []
    for sampler in samplers(options, before):
        for _ in range(epoch):
            list(sampler)
        iterator = iter(sampler)
        for _ in range(num_done):
            next(iterator)
        states.append(sampler.state_dict())
    assert all(state == states[0] for state in states)
    resumed = samplers(options, after)
    for sampler in resumed:
        sampler.load_state_dict(states[0])
        sampler.set_epoch(sampler.epoch)  # as many loops do; it keeps the position
    remaining = [joined(parts) for parts in zip(*map(list, resumed), strict=True)]
    assert remaining == epochs[epoch][num_done:]
    following = [joined(parts) for parts in zip(*map(list, resumed), strict=True)]
    assert following == epochs[epoch + 1]


@given(num=st.integers(10, 200), epoch=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_orders_depend_on_seed_and_epoch_alone(num, epoch):
    def order(seed: int, epoch: int) -> list[int]:
        (window,) = whole_windows({"num_samples": num, "global_batch": num, "shuffle": True, "seed": seed}, epoch)
        return window

    assert order(3, epoch) == order(3, epoch)
    assert order(3, epoch) != order(3, epoch + 1)
    assert order(3, epoch) != order(4, epoch)


def test_seed_and_epoch_do_not_trade_places():
    options = {"num_samples": 100, "global_batch": 100, "shuffle": True}
    assert whole_windows({**options, "seed": 0}, 1) != whole_windows({**options, "seed": 1}, 0)


def test_the_first_orders_stay_as_they_are():
    """A run that is resumed with a later release must find its samples where they were."""
    options = {"num_samples": 8, "global_batch": 8, "shuffle": True, "seed": 0}
    assert [whole_windows(options, epoch)[0] for epoch in range(2)] == FIRST_ORDERS


FIRST_ORDERS = [[4, 1, 3, 5, 0, 2, 6, 7], [4, 7, 5, 2, 1, 0, 6, 3]]


def test_a_thousand_samples_on_three_ranks():
    shares = [next(iter(sampler)) for sampler in samplers({"num_samples": 1000, "global_batch": 1000}, 3)]
    assert [len(share) for share in shares] == [334, 333, 333]
    assert joined(shares) == list(range(1000))


def test_window_larger_than_the_data_is_one_short_window():
    assert whole_windows({"num_samples": 5, "global_batch": 64}, 0) == [[0, 1, 2, 3, 4]]


def test_window_smaller_than_the_world_leaves_ranks_empty():
    assert [list(sampler) for sampler in samplers({"num_samples": 3, "global_batch": 2}, 4)] == [
        [[0], [2]],
        [[1], []],
        [[], []],
        [[], []],
    ]


# --- the position ---


def test_each_iteration_is_the_next_epoch():
    sampler = MacroBatchSampler(4, 4, shuffle=True)
    orders = [next(iter(sampler)) for _ in range(3)]
    assert orders == [whole_windows({"num_samples": 4, "global_batch": 4, "shuffle": True}, e)[0] for e in range(3)]


def test_set_epoch_repeats_and_skips():
    sampler = MacroBatchSampler(20, 20, shuffle=True)
    first = list(sampler)
    assert sampler.epoch == 1
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(7)
    assert list(sampler) == whole_windows({"num_samples": 20, "global_batch": 20, "shuffle": True}, 7)
    assert sampler.epoch == 8


def test_set_epoch_after_break_begins_anew():
    sampler = MacroBatchSampler(20, 5, shuffle=True)
    for _ in sampler:
        break
    sampler.set_epoch(0)
    assert list(sampler) == whole_windows({"num_samples": 20, "global_batch": 5, "shuffle": True}, 0)


def test_state_within_the_last_window_and_after_it():
    sampler = MacroBatchSampler(4, 2)
    iterator = iter(sampler)
    next(iterator)
    next(iterator)
    state = sampler.state_dict()
    assert (state["epoch"], state["num_windows"]) == (0, 2)  # the epoch's own end is still to come
    assert next(iterator, None) is None
    state = sampler.state_dict()
    assert (state["epoch"], state["num_windows"]) == (1, 0)


def test_an_older_iterator_does_not_move_the_position():
    sampler = MacroBatchSampler(4, 1)
    older = iter(sampler)
    next(older)
    newer = iter(sampler)
    next(newer)
    assert len(list(older)) == 3
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["num_windows"]) == (1, 1)


def test_carry_moves_the_rest_on():
    sampler = MacroBatchSampler(3, 2, tail="carry")
    assert [list(sampler) for _ in range(2)] == [[[0, 1]], [[2, 0], [1, 2]]]
    slow = MacroBatchSampler(2, 5, tail="carry")
    assert [list(slow) for _ in range(3)] == [[], [], [[0, 1, 0, 1, 0]]]


# --- what is refused ---

BAD_COUNTS = [0, -1, 2.0, 2.5, True, float("nan"), float("inf"), "8", None, [8]]


@pytest.mark.parametrize("value", BAD_COUNTS)
def test_bad_counts_are_refused(value):
    with pytest.raises(ArgumentError, match=r"global_batch: given .*expected an integer >= 1"):
        MacroBatchSampler(10, value)
    with pytest.raises(ArgumentError, match="num_samples"):
        MacroBatchSampler(value, 4)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tail": "keep"}, "tail"),
        ({"tail": None}, "tail"),
        ({"tail": ["apply"]}, "tail"),
        ({"tail": "drop", "global_batch": 11}, "tail"),
        ({"shuffle": 1}, "shuffle"),
        ({"shuffle": "yes"}, "shuffle"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"ranks": 3}, "ranks"),
        ({"ranks": (0, 3)}, "ranks"),
    ],
)
def test_bad_options_are_refused(options, what):
    with pytest.raises(ArgumentError, match=f"^{what}"):
        MacroBatchSampler(**{"num_samples": 10, "global_batch": 4, **options})


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "1", None])
def test_bad_epochs_are_refused(epoch):
    with pytest.raises(ArgumentError, match="epoch"):
        MacroBatchSampler(10, 4).set_epoch(epoch)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 11},
        {"global_batch": 5},
        {"seed": 1},
        {"shuffle": True},
        {"shuffle": 0},
        {"tail": "drop"},
        {"version": 2},
        {"epoch": -1},
        {"epoch": 0.0},
        {"num_windows": True},
        {"num_windows": 4},
        {"extra": 1},
    ],
    ids=str,
)
def test_states_that_do_not_fit_are_refused(change):
    sampler = MacroBatchSampler(10, 4)
    next(iter(sampler))
    state = sampler.state_dict()
    with pytest.raises(StateError):
        sampler.load_state_dict({**state, **change})
    assert sampler.state_dict() == state


@pytest.mark.parametrize("state", [None, {}, [], "epoch", {"epoch": 0, "num_windows": 0}])
def test_states_of_another_shape_are_refused(state):
    with pytest.raises(StateError):
        MacroBatchSampler(10, 4).load_state_dict(state)
