"""Samples of any lengths, divided over ranks and micro-batches under a hard cap."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from macrobatch.errors import ArgumentError, BatchError
from macrobatch.plan.lengths import LengthCost
from macrobatch.plan.pack import Packing, TokenBudget, balance

LAYOUTS = ("packed", "padded")
ROUNDING = 1e-9  # sums of a few hundred float64 costs


def log_normal(num: int, seed: int = 0) -> np.ndarray:
    """The lengths of benchmarks/lengths.py."""
    drawn = np.random.default_rng(seed).lognormal(5.2, 0.9, num)
    return np.clip(drawn.astype(np.int64), 16, 1024)


def slots(packing: Packing) -> list[int]:
    """What the cap is put on, of every micro-batch."""
    parts = [packing.lengths[indices] for rank in packing.micro_batches for indices in rank]
    return [int(part.sum()) if packing.layout == "packed" else len(part) * int(part.max()) for part in parts]


def counts(packing: Packing) -> list[int]:
    return [len(parts) for parts in packing.micro_batches]


@st.composite
def plans(draw):
    """Lengths, a budget that holds each of them, and a number of ranks."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=80))
    budget = TokenBudget(
        max(lengths) + draw(st.integers(0, 200)),
        layout=draw(st.sampled_from(LAYOUTS)),
        cost=LengthCost(1.0, draw(st.sampled_from([0.0, 0.01, 10.0]))),
        equal=draw(st.booleans()),
    )
    return lengths, budget, draw(st.integers(1, 9))


@given(plans())
@settings(max_examples=300, deadline=None)
def test_every_sample_comes_once_and_the_cap_holds(plan):
    lengths, budget, world_size = plan
    packing = budget.pack(lengths, world_size=world_size)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert all(0 < size <= budget.max_tokens for size in slots(packing))
    assert len(packing.micro_batches) == world_size
    assert packing.num_slots == sum(slots(packing)) >= packing.num_tokens == sum(lengths)


@given(plans())
@settings(max_examples=100, deadline=None)
def test_inverse_puts_outputs_back(plan):
    lengths, budget, world_size = plan
    packing = budget.pack(lengths, world_size=world_size)
    outputs = np.array(lengths)[packing.order]
    assert outputs[packing.inverse].tolist() == lengths


@given(plans())
@settings(max_examples=100, deadline=None)
def test_plan_is_a_function_of_the_lengths(plan):
    lengths, budget, world_size = plan
    first, second, third = (
        budget.pack(kind, world_size=world_size)
        for kind in (lengths, np.array(lengths, np.int32), torch.tensor(lengths))
    )
    assert [first.of(rank) for rank in range(world_size)] == [second.of(rank) for rank in range(world_size)]
    assert [first.of(rank) for rank in range(world_size)] == [third.of(rank) for rank in range(world_size)]


@given(plans())
@settings(max_examples=200, deadline=None)
def test_equal_gives_as_many_micro_batches_to_all_as_their_samples_allow(plan):
    lengths, budget, world_size = plan
    budget = TokenBudget(budget.max_tokens, layout=budget.layout, cost=budget.cost, equal=True)
    packing = budget.pack(lengths, world_size=world_size)
    most = max(counts(packing))
    for parts in packing.micro_batches:
        assert len(parts) == most or all(len(part) == 1 for part in parts)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_balance_keeps_its_bound(costs, num_parts):
    parts = balance(costs, num_parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    best = min(
        max(sum(cost for cost, at in zip(costs, where, strict=True) if at == part) for part in range(num_parts))
        for where in itertools.product(range(num_parts), repeat=len(costs))
    )
    worst = max(sum(costs[item] for item in part.tolist()) for part in parts)
    assert worst <= (4 / 3 - 1 / (3 * num_parts)) * best * (1 + ROUNDING)


@pytest.mark.parametrize("costs", [[1.0, float("nan")], [-1.0], ["a"], [[1.0]], None], ids=str)
def test_bad_costs_are_refused(costs):
    with pytest.raises(ArgumentError, match="costs"):
        balance(costs, 2)


@given(plans())
@settings(max_examples=100, deadline=None)
def test_busiest_rank_of_a_packed_window_keeps_the_bound_of_list_scheduling(plan):
    lengths, budget, world_size = plan
    budget = TokenBudget(budget.max_tokens, cost=budget.cost, equal=budget.equal)
    packing = budget.pack(lengths, world_size=world_size)
    costs = budget.cost.of_lengths(lengths)
    assert packing.loads.max() <= costs.sum() / world_size + costs.max() * (1 - 1 / world_size) + ROUNDING * costs.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("equal", [False, True])
def test_a_realistic_window_is_balanced_and_hardly_padded(layout, equal):
    budget = TokenBudget(2048, layout=layout, cost=LengthCost.of_width(768), equal=equal)
    lengths = log_normal(512)
    packing = budget.pack(lengths, world_size=8)
    assert packing.imbalance < 1.03
    assert packing.num_slots < 1.05 * packing.num_tokens
    assert sum(counts(packing)) <= 1.25 * lengths.sum() / budget.max_tokens
    if equal:
        assert len(set(counts(packing))) == 1
    arrival = [lengths[at : at + 8] for at in range(0, len(lengths), 8)]  # the control: what it is compared with
    assert sum(len(part) * part.max() for part in arrival) > 2 * lengths.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_side_by_side_cost_about_the_same(layout):
    budget = TokenBudget(2048, layout=layout, cost=LengthCost.of_width(768), equal=True)
    lengths = log_normal(2048, seed=1)
    packing = budget.pack(lengths, world_size=8)
    steps = [
        [budget.micro_batch_cost(lengths[parts[step]]) for parts in packing.micro_batches]
        for step in range(counts(packing)[0])
    ]
    barriers = sum(max(costs) for costs in steps) / packing.loads.mean()
    assert barriers < 1.06


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_of_exactly_the_cap_are_alone(layout):
    packing = TokenBudget(8, layout=layout).pack([8, 8, 8], world_size=2)
    assert slots(packing) == [8, 8, 8]
    assert packing.of(0) == [[0], [2]]
    assert packing.of(1) == [[1]]


def test_cost_moves_long_samples_apart():
    lengths = [100, 60, 40, 40, 30, 30]
    by_tokens = TokenBudget(300).pack(lengths, world_size=2)
    by_pairs = TokenBudget(300, cost=LengthCost(1.0, 10.0)).pack(lengths, world_size=2)
    assert len(by_tokens.of(0)[0]) > 1
    assert by_pairs.of(0) == [[0]]


def test_fewer_samples_than_ranks_leave_ranks_without():
    for layout in LAYOUTS:
        packing = TokenBudget(8, layout=layout, equal=True).pack([3, 2], world_size=4)
        assert counts(packing) == [1, 1, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [log_normal(100_000), np.full(100_000, 1000)], ids=["log-normal", "all alike"])
def test_a_hundred_thousand_samples_take_a_second_or_so(layout, lengths):
    budget = TokenBudget(4096, layout=layout, cost=LengthCost.of_width(768), equal=True)
    began = time.process_time()
    packing = budget.pack(lengths, world_size=64)
    assert time.process_time() - began < 5  # 0.3 s on an idle core; this catches a quadratic algorithm
    assert max(slots(packing)) <= 4096


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("lengths", "named"),
    [([4, 9, 4], "sample 1"), ([4, 0], "sample 1"), ([-3], "sample 0"), (torch.tensor([1, 100]), "sample 1")],
    ids=["too long", "empty", "negative", "tensor"],
)
def test_sample_that_fits_nowhere_is_refused_by_name(layout, lengths, named):
    with pytest.raises(BatchError, match=named):
        TokenBudget(8, layout=layout).pack(lengths)


@pytest.mark.parametrize(
    "lengths",
    [[], [1.5, 2.0], [[1, 2]], [[1], [2, 3]], ["a"], 3, [True, False]],
    ids=["none", "floats", "nested", "jagged", "text", "one", "bools"],
)
def test_what_is_no_lengths_is_refused(lengths):
    with pytest.raises(ArgumentError, match="lengths"):
        TokenBudget(8).pack(lengths)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 8.0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 8, "layout": "jagged"}, "layout"),
        ({"max_tokens": 8, "cost": 1.0}, "cost"),
        ({"max_tokens": 8, "equal": 1}, "equal"),
    ],
    ids=str,
)
def test_bad_budget_is_refused(options, named):
    with pytest.raises(ArgumentError, match=named):
        TokenBudget(**options)


@pytest.mark.parametrize("world_size", [0, -1, 1.0, True, None], ids=str)
def test_bad_world_size_is_refused(world_size):
    with pytest.raises(ArgumentError, match="world_size"):
        TokenBudget(8).pack([1], world_size=world_size)


def test_cost_is_fitted():
    true = LengthCost(2e-6, 3e-9)
    tokens = [64, 256, 512, 1024]
    noise = np.array([1.02, 0.98, 1.01, 0.99])
    fitted = LengthCost.fit(tokens, (true.of_lengths(tokens) * noise).tolist())
    assert fitted.linear == pytest.approx(true.linear, rel=0.05)
    assert fitted.quadratic == pytest.approx(true.quadratic, rel=0.1)
    assert LengthCost.fit([1, 10], [1.0, 5.0]).quadratic == 0  # never negative: a shorter sample is never dearer
    assert LengthCost.fit([1, 10], [1.0, 500.0]).linear > 0


@pytest.mark.parametrize(
    ("lengths", "seconds"),
    [
        ([1], [1.0]),
        ([1, 1], [1.0, 1.0]),
        ([1, 2], [1.0]),
        ([1, 2], [1.0, float("nan")]),
        ([0, 2], [1.0, 1.0]),
        ([], []),
    ],
    ids=["one", "one length", "unequal", "nan", "zero", "none"],
)
def test_bad_points_are_refused(lengths, seconds):
    with pytest.raises(ArgumentError, match=r"LengthCost\.fit"):
        LengthCost.fit(lengths, seconds)


@pytest.mark.parametrize(
    "options", [{"linear": 0}, {"quadratic": -1.0}, {"linear": float("inf")}, {"linear": "1"}], ids=str
)
def test_bad_cost_is_refused(options):
    with pytest.raises(ArgumentError, match="LengthCost"):
        LengthCost(**options)
    with pytest.raises(ArgumentError, match="width"):
        LengthCost.of_width(0)


def test_cost_is_measured_at_a_few_lengths(monkeypatch):
    """A micro-step whose clock is known: 2 us a token and 1 ns a pair, for four samples each; first calls are slow"""
    now = [0.0]
    calls: list[int] = []

    def micro_step(length: int) -> None:
        calls.append(length)
        now[0] += 4 * (2e-6 * length + 1e-9 * length**2) * (10.0 if calls.count(length) == 1 else 1.0)

    monkeypatch.setattr("macrobatch.plan.lengths.time.perf_counter", lambda: now[0])
    cost = LengthCost.measure(micro_step, [128, 512, 1024], num_samples=4)
    assert cost.linear == pytest.approx(2e-6, rel=1e-6)
    assert cost.quadratic == pytest.approx(1e-9, rel=1e-6)
    assert calls == [128] * 4 + [512] * 4 + [1024] * 4


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_times": 0}, {"lengths": [64]}], ids=str)
def test_cost_refuses_to_be_measured_in_vain(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        LengthCost.measure(lambda length: None, **({"lengths": [64, 128]} | options))
