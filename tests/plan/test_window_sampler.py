"""Planned windows of samples of any lengths: which rank gets which, resuming, loading, training.

EXACT is the promise in float64 (DESIGN section 1).
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

import macrobatch as mb
from macrobatch.data.planned import WindowLoader, WindowSampler
from macrobatch.data.windows import Windows
from macrobatch.errors import ArgumentError, BatchError, StateError
from macrobatch.plan.pack import TokenBudget
from macrobatch.ranks import Ranks
from macrobatch.sync import ShardedSync
from macrobatch.testing.reference import relative_error

pytestmark = pytest.mark.xdist_group("ranks")

EXACT = 1e-12
VOCABULARY = 13
LENGTHS = [random.Random(3).choice([1, 2, 3, 5, 9, 14]) for _ in range(41)]
BUDGET = TokenBudget(16)
PADDED = TokenBudget(16, layout="padded", equal=True)


def sampler(rank: int = 0, world_size: int = 1, budget: TokenBudget = BUDGET, **options: Any) -> WindowSampler:
    options = {"global_batch": 12, "shuffle": True, "seed": 5, **options}
    return WindowSampler(LENGTHS, budget=budget, ranks=Ranks(rank=rank, world_size=world_size), **options)


def windows(world_size: int, budget: TokenBudget = BUDGET, **options: Any) -> list[list[int]]:
    """The samples of each window of an epoch, sorted, over all ranks."""
    of_ranks = [list(sampler(rank, world_size, budget, **options)) for rank in range(world_size)]
    return [
        sorted(itertools.chain(*(micro_batch for share in shares for micro_batch in share)))
        for shares in zip(*of_ranks, strict=True)
    ]


def collate(samples: list[Tensor]) -> dict[str, Tensor]:
    ids_BT = pad_sequence(samples, batch_first=True)
    return {"ids": ids_BT, "labels": pad_sequence(samples, batch_first=True, padding_value=-100)}


def dataset() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, VOCABULARY)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def loss_fn(model: Any, batch: Any) -> Any:
    return mb.cross_entropy(model(batch["ids"]), batch["labels"], shift=True)


@pytest.mark.parametrize("budget", [BUDGET, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_windows_are_those_of_the_batch_sampler_on_any_number_of_ranks(budget, world_size):
    plain = Windows(num_samples=len(LENGTHS), global_batch=12, shuffle=True, seed=5)
    expected = [sorted(window) for window in plain.shares(0, 0, Ranks())]
    assert windows(world_size, budget) == expected
    assert sorted(itertools.chain(*expected)) == list(range(len(LENGTHS)))


@pytest.mark.parametrize(("tail", "num"), [("apply", 4), ("drop", 3), ("carry", 3)])
def test_tail_is_that_of_the_windows(tail, num):
    assert len(sampler(tail=tail)) == num
    assert [len(window) for window in windows(2, tail=tail)] == [12, 12, 12, 5][:num]


def test_every_epoch_has_another_order():
    ours = sampler()
    first, second = list(ours), list(ours)
    assert first != second
    assert ours.epoch == 2
    ours.set_epoch(0)
    assert list(ours) == first


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumes_on_any_number_of_ranks(world_size):
    before = sampler(0, 2)
    rest = iter(before)
    done = [next(rest), next(rest)]
    assert len(done) == 2
    state = before.state_dict()
    resumed = [sampler(rank, world_size, TokenBudget(30)) for rank in range(world_size)]
    for each in resumed:
        each.load_state_dict(state)
    left = [
        sorted(itertools.chain(*(part for share in shares for part in share)))
        for shares in zip(*(list(each) for each in resumed), strict=True)
    ]
    assert left == windows(2)[2:]


def test_state_of_other_windows_is_refused_and_changes_nothing():
    ours = sampler()
    next(iter(ours))
    state = ours.state_dict()
    for other in (sampler(seed=6), sampler(global_batch=13), sampler(shuffle=False)):
        with pytest.raises(StateError):
            other.load_state_dict(state)
        assert other.epoch == 0
    with pytest.raises(StateError):
        ours.load_state_dict({**state, "num_windows": 99})
    with pytest.raises(StateError):
        ours.load_state_dict({key: value for key, value in state.items() if key != "epoch"})


def test_sample_over_the_cap_is_refused_before_anything_starts():
    with pytest.raises(BatchError, match="sample 2"):
        WindowSampler([3, 4, 17, 5], 2, BUDGET)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": 16}, "budget"),
        ({"global_batch": 0}, "global_batch"),
        ({"seed": -1}, "seed"),
        ({"tail": "x"}, "tail"),
    ],
    ids=["budget", "global_batch", "seed", "tail"],
)
def test_bad_argument_is_refused(options, named):
    with pytest.raises(ArgumentError, match=named):
        WindowSampler(**{"lengths": [1, 2], "global_batch": 2, "budget": BUDGET, **options})


def test_bad_loader_argument_is_refused():
    with pytest.raises(ArgumentError, match="dataset"):
        WindowLoader(dataset()[1:], sampler())
    with pytest.raises(ArgumentError, match="sampler"):
        WindowLoader(dataset(), [[0]])
    with pytest.raises(ArgumentError, match="batch_size"):
        WindowLoader(dataset(), sampler(), batch_size=3)
    with pytest.raises(ArgumentError, match="micro_batches"):
        WindowLoader(dataset(), sampler()).micro_batches(2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_loads_the_plan(num_workers):
    data, plan = dataset(), list(sampler())
    loader = WindowLoader(data, sampler(), collate_fn=list, num_workers=num_workers)
    loaded = [list(window) for window in loader]
    assert len(loaded) == len(loader) == len(plan)
    for window, micro_batches in zip(loaded, plan, strict=True):
        assert [[sample.tolist() for sample in part] for part in window] == [
            [data[index].tolist() for index in indices] for indices in micro_batches
        ]


def test_loader_resumes_behind_what_was_handed_out():
    data = dataset()
    loader = WindowLoader(data, sampler(), collate_fn=len)
    whole = [list(window) for window in loader]
    loader.set_epoch(0)
    rest = iter(loader)
    assert [list(next(rest)), list(next(rest))] == whole[:2]
    again = WindowLoader(data, sampler(), collate_fn=len)
    again.load_state_dict(loader.state_dict())
    assert [list(window) for window in again] == whole[2:]


def test_left_over_micro_batches_are_passed_over():
    loader = WindowLoader(dataset(), sampler(), collate_fn=len)
    whole = [list(window) for window in WindowLoader(dataset(), sampler(), collate_fn=len)]
    assert [next(window) for window in loader] == [window[0] for window in whole]


def trained(budget: TokenBudget, *, is_sharded: bool = False) -> dict[str, Tensor]:
    """The parameters after an epoch; on every rank of a pool, or in one process."""
    model, optimizer = build()
    if is_sharded:
        optimizer = torch.optim.SGD(fully_shard(model).parameters(), lr=0.2, momentum=0.9)
    sync = ShardedSync() if is_sharded else "auto"
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=1, sync=sync)
    ours = WindowSampler(LENGTHS, 12, budget, shuffle=True, seed=5)
    for window in WindowLoader(dataset(), ours, collate_fn=collate):
        step.window(window)
    assert step.num_updates == 4
    values = model.state_dict().items()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values}


def whole_windows() -> dict[str, Tensor]:
    """The same by plain PyTorch with a whole window at a time."""
    model, optimizer = build()
    data = dataset()
    for indices in Windows(num_samples=len(LENGTHS), global_batch=12, shuffle=True, seed=5).shares(0, 0, Ranks()):
        optimizer.zero_grad()
        loss_fn(model, collate([data[index] for index in indices])).mean.backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("budget", [BUDGET, PADDED, TokenBudget(14)], ids=["packed", "padded", "at the cap"])
def test_planned_windows_train_as_whole_ones(budget):
    # The collate function pads in any case; "packed" here is only how the samples are divided.
    assert relative_error(trained(budget), whole_windows()) <= EXACT


def job_trained(budget: TokenBudget, world_size: int, is_sharded: bool = False) -> float:
    assert dist.get_world_size() == world_size
    return relative_error(trained(budget, is_sharded=is_sharded), whole_windows())


@pytest.mark.parametrize("world_size", [2, 4])
def test_planned_windows_train_as_whole_ones_over_ranks(ranks, world_size):
    # The last window has 5 samples: ranks have different numbers of micro-batches.
    assert max(ranks(world_size).run(job_trained, BUDGET, world_size)) <= EXACT
    assert max(ranks(world_size).run(job_trained, PADDED, world_size)) <= EXACT


def test_planned_windows_train_as_whole_ones_over_shards(ranks):
    equal = TokenBudget(16, equal=True)
    assert max(ranks(2).run(job_trained, equal, 2, True)) <= EXACT
    assert max(ranks(2).run(job_trained, PADDED, 2, True)) <= EXACT
