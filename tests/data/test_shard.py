"""Existing DataLoaders, divided over ranks: the ranks together see what the loader alone would have yielded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from macrobatch.data import MacroBatchLoader, MacroBatchSampler, ShareLoader, shard
from macrobatch.data.windows import Windows
from macrobatch.errors import ArgumentError, BatchError, StateError
from macrobatch.ranks import Ranks

NOTHING: Any = []
SAMPLES: Any = torch.arange(23)


class Split(IterableDataset):
    """A stream that divides itself over workers."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        yield from range(info.id, 23, info.num_workers) if info else range(23)


class Shuffled(IterableDataset):
    """A stream in an order drawn from all three global generators."""

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(23).tolist()
        random.shuffle(order)
        yield from np.random.permutation(order).tolist()


class Buckets(Sampler):
    """Batches of different sizes, in an order drawn from all three global generators."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(23).tolist()
        random.shuffle(order)
        order = np.random.permutation(order).tolist()
        sizes = [1, 7, 2, 9, 4]
        for size in sizes:
            yield [order.pop() for _ in range(size)]

    def __len__(self) -> int:
        return 5


class Doubled(DataLoader):
    """A loader that does something with what it loads."""

    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())


def joined(parts: Iterable[Any]) -> list[Any]:
    return list(chain(*parts))


def team(loader: Iterable[Any], world_size: int, **options: Any) -> list[ShareLoader]:
    return [shard(loader, ranks=Ranks(rank=rank, world_size=world_size), **options) for rank in range(world_size)]


def epoch_of(loaders: list[ShareLoader]) -> list[list[int]]:
    """One epoch of each rank in turn, each with global generators of its own; the windows put together."""
    shares = []
    for rank, loader in enumerate(loaders):
        torch.manual_seed(rank)
        np.random.seed(rank)
        random.seed(rank)
        shares.append([[] if batch is None else batch.tolist() for batch in loader])
    for parts in zip(*shares, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    return [joined(parts) for parts in zip(*shares, strict=True)]


LOADERS: dict[str, DataLoader] = {
    "plain": DataLoader(SAMPLES, batch_size=5),
    "drop_last": DataLoader(SAMPLES, batch_size=5, drop_last=True),
    "workers": DataLoader(SAMPLES, batch_size=5, num_workers=2, prefetch_factor=1),
    "sampler": DataLoader(SAMPLES, batch_size=5, sampler=list(range(22, -1, -1))),
    "batch_sampler": DataLoader(SAMPLES, batch_sampler=[[0, 1, 2], [3], [4, 5, 6, 7]]),
    "batch_sampler of tensors": DataLoader(SAMPLES, batch_sampler=SAMPLES[:6].split(4)),
    "stream": DataLoader(Split(), batch_size=5),
    "stream with workers": DataLoader(Split(), batch_size=5, num_workers=2),
    "no batching": DataLoader(SAMPLES.split(6), batch_size=None),
    "its own loop": Doubled(SAMPLES, batch_size=5),
}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("kind", LOADERS)
def test_ranks_together_see_what_the_loader_yields(kind, world_size):
    loader = LOADERS[kind]
    expected = [batch.tolist() for batch in loader]
    loaders = team(loader, world_size)
    assert epoch_of(loaders) == expected
    assert epoch_of(loaders) == expected
    assert {each.epoch for each in loaders} == {2}


def test_a_list_of_batches_will_do():
    assert epoch_of(team([torch.arange(3), torch.arange(5)], 2)) == [[0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(SAMPLES, batch_size=5, shuffle=True),
        DataLoader(SAMPLES, batch_size=5, sampler=RandomSampler(SAMPLES)),
        DataLoader(SAMPLES, batch_sampler=Buckets()),
        DataLoader(SAMPLES, batch_sampler=BatchSampler(RandomSampler(range(23)), 5, drop_last=False)),
        DataLoader(Shuffled(), batch_size=5),
        DataLoader(Shuffled(), batch_size=5, num_workers=1),
        Doubled(SAMPLES // 2, batch_size=5, shuffle=True),
    ],
    ids=["shuffle", "RandomSampler", "Buckets", "BatchSampler", "stream", "stream with a worker", "its own loop"],
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_random_orders_are_the_same_on_every_rank_and_new_every_epoch(loader, world_size):
    loaders = team(loader, world_size)
    first, second = epoch_of(loaders), epoch_of(loaders)
    assert sorted(joined(first)) == sorted(joined(second)) == sorted(joined(batch.tolist() for batch in loader))
    assert first != second
    assert epoch_of(team(loader, 2)) == first
    assert epoch_of(team(loader, 2, seed=1)) != first


def test_sampling_with_replacement_stays_so():
    loader = DataLoader(SAMPLES, batch_size=5, sampler=RandomSampler(SAMPLES, replacement=True))
    assert len(set(joined(epoch_of(team(loader, 2))))) < 23


def test_weighted_sampling_is_the_same_on_every_rank():
    loader = DataLoader(SAMPLES, batch_size=5, sampler=WeightedRandomSampler([1.0] * 23, 40))
    assert epoch_of(team(loader, 1)) == epoch_of(team(loader, 4))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(SAMPLES, batch_size=5, shuffle=True),
        DataLoader(SAMPLES, batch_sampler=Buckets()),
        DataLoader(Split(), batch_size=5, num_workers=2),
    ],
    ids=["shuffle", "Buckets", "stream"],
)
def test_resume_on_another_world_size(loader):
    (alone,) = team(loader, 1)
    epochs = [[batch.tolist() for batch in alone] for _ in range(2)]
    loaders = team(loader, 3)
    epoch_of(loaders)
    iterators = [iter(each) for each in loaders]
    for iterator in iterators:
        next(iterator)
        next(iterator)
    states = [each.state_dict() for each in loaders]
    assert states[0] == states[1] == states[2]
    resumed = team(loader, 2)
    for each in resumed:
        each.load_state_dict(states[0])
    assert epoch_of(resumed) == epochs[1][2:]


def test_what_the_loader_was_given_is_kept():
    def collate(samples: list[Any]) -> tuple[Any, ...]:
        return tuple(int(sample) for sample in samples)

    loader = DataLoader(SAMPLES, batch_size=10, collate_fn=collate, drop_last=True)
    assert list(shard(loader, ranks=Ranks(rank=1, world_size=2))) == [(5, 6, 7, 8, 9), (15, 16, 17, 18, 19)]
    assert isinstance(shard(loader), MacroBatchLoader)


def test_a_plain_loader_becomes_a_macro_batch_loader():
    loader = DataLoader(SAMPLES, batch_size=5, shuffle=True)
    windows = Windows(num_samples=23, global_batch=5, shuffle=True, seed=8, tail="carry")
    assert [batch.tolist() for batch in shard(loader, seed=8, tail="carry")] == list(windows.shares(0, 0, Ranks()))


def test_samplers_are_told_the_epoch():
    class Told(BatchSampler):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    loader = shard(DataLoader(SAMPLES, batch_sampler=Told(SequentialSampler(SAMPLES), 5, drop_last=False)))
    for _ in range(2):
        list(loader)
    assert Told.epochs == [0, 1]


def test_pieces_of_rows():
    loader = DataLoader(SAMPLES.split(12), batch_size=None)
    shares = shard(loader, ranks=Ranks(rank=1, world_size=2)).micro_batches(4)
    assert [[part.tolist() for part in share] for share in shares] == [
        [[6, 7, 8, 9], [10, 11]],
        [[18, 19, 20, 21], [22]],
    ]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(SAMPLES, sampler=DistributedSampler(SAMPLES, num_replicas=2, rank=0)),
        DataLoader(SAMPLES, batch_sampler=MacroBatchSampler(23, 5)),
        MacroBatchLoader(SAMPLES, 5),
        DataLoader(SAMPLES, batch_size=5, num_workers=1, in_order=False),
        iter([SAMPLES]),
        5,
        None,
        "loader",
    ],
    ids=["DistributedSampler", "MacroBatchSampler", "MacroBatchLoader", "in_order", "iterator", "int", "None", "str"],
)
def test_what_cannot_be_divided_is_refused(loader):
    with pytest.raises(ArgumentError, match=r"^loader: given"):
        shard(loader)


@pytest.mark.parametrize("kind", ["batch_sampler", "stream", "no batching", "its own loop"])
def test_a_tail_that_the_loader_decides_about_is_refused(kind):
    with pytest.raises(ArgumentError, match=r"^tail"):
        shard(LOADERS[kind], tail="drop")


@pytest.mark.parametrize("options", [{"seed": -1}, {"tail": "no"}, {"ranks": 1}, {"device": "toaster"}], ids=str)
@pytest.mark.parametrize("kind", ["plain", "batch_sampler", "stream"])
def test_bad_options_are_refused(kind, options):
    with pytest.raises(ArgumentError, match=f"^{next(iter(options))}"):
        shard(LOADERS[kind], **options)


@pytest.mark.parametrize(
    "loader",
    [DataLoader(SAMPLES, batch_sampler=[]), DataLoader(NOTHING, batch_size=None), []],
    ids=["lists", "rows", "list"],
)
def test_a_loader_without_a_batch_is_refused(loader):
    with pytest.raises(BatchError, match=r"at least one window|at least 1"):
        list(shard(loader))


def test_batches_without_rows_are_refused():
    with pytest.raises(BatchError, match="one row per sample"):
        list(shard([3, 4]))


def test_state_of_another_loader_is_refused():
    state = shard(LOADERS["batch_sampler"]).state_dict()
    for kind in ("plain", "sampler", "stream", "batch_sampler of tensors"):
        with pytest.raises(StateError):
            shard(LOADERS[kind]).load_state_dict(state)
