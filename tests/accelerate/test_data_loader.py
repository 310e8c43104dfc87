"""Prepared loaders: the original's shares to the index, and what they know of their end and of what was skipped."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import chain, product
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from tests.accelerate.doors import BOTH, ORIGINAL, OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")


def module(package: str) -> Any:
    return importlib.import_module(f"{package}.data_loader")


def prepared(loader: Any, **options: Any) -> Any:
    return module(OURS).prepare_data_loader(loader, **options)


def readings() -> list[Any]:
    return importlib.import_module(f"{OURS}.state").GradientState().readings


class Stream(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size


class Recorded(Dataset[Any]):
    """Numbers, and which of them were read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Groups:
    """Batches without a size or a length."""

    def __init__(self, *groups: list[int]) -> None:
        self.groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.groups)


class SizedGroups(Groups):
    def __len__(self) -> int:
        return len(self.groups)


def numbers(loader: Any) -> list[Any]:
    return [torch.as_tensor(batch).tolist() for batch in loader]


# --- shares ---


@pytest.mark.parametrize("even_batches", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("split_batches", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("drop_last", [True, False], ids=["drop", "keep"])
def test_shares_of_batches_are_the_originals(drop_last: bool, split_batches: bool, even_batches: bool):
    for size, batch_size, num_ranks in product(range(14), range(1, 5), range(1, 4)):
        if split_batches and batch_size % num_ranks:
            continue
        for rank in range(num_ranks):
            theirs, mine = (
                module(package).BatchSamplerShard(
                    BatchSampler(range(size), batch_size, drop_last), num_ranks, rank, split_batches, even_batches
                )
                for package in BOTH
            )
            assert list(mine) == list(theirs), (size, batch_size, num_ranks, rank)
            assert len(mine) == len(theirs)
            if not split_batches or even_batches or size % batch_size == 0:  # else a rank may have no part of the last
                assert len(list(mine)) == len(mine), (size, batch_size, num_ranks, rank)


@pytest.mark.parametrize("split_batches", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("drop_last", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize("kind", [Stream, SizedStream])
def test_shares_of_a_stream_are_the_originals(kind: Any, drop_last: bool, split_batches: bool):
    for size, batch_size, num_ranks in product(range(14), range(1, 5), range(1, 4)):
        if split_batches and batch_size % num_ranks:
            continue
        for rank in range(num_ranks):
            theirs, mine = (
                module(package).IterableDatasetShard(kind(size), batch_size, drop_last, num_ranks, rank, split_batches)
                for package in BOTH
            )
            assert list(mine) == list(theirs), (size, batch_size, num_ranks, rank)
            if kind is SizedStream:
                assert len(mine) == len(theirs)


@pytest.mark.parametrize("groups", [[[0]], [[0], [1, 2], [3]], [[0, 1], [2]], [[0], [1], [2, 3], [4], [5]]], ids=repr)
def test_shares_of_batches_of_any_size_are_the_originals(groups: list[list[int]]):
    for num_ranks, even_batches in product(range(1, 4), [True, False]):
        for rank in range(num_ranks):
            theirs, mine = (
                module(package).BatchSamplerShard(SizedGroups(*groups), num_ranks, rank, even_batches=even_batches)
                for package in BOTH
            )
            assert list(mine) == list(theirs)
            assert len(mine) == len(theirs) == len(list(mine))


@pytest.mark.parametrize("kind", ["BatchSamplerShard", "IterableDatasetShard"])
def test_batches_that_cannot_be_split_are_refused(kind: str):
    data = BatchSampler(range(9), 3, drop_last=False) if kind == "BatchSamplerShard" else Stream(9)
    options = {} if kind == "BatchSamplerShard" else {"batch_size": 3}
    for package in BOTH:
        with pytest.raises(ValueError, match="split_batches"):
            getattr(module(package), kind)(data, num_processes=2, split_batches=True, **options)


# --- the end ---

LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "divisible": lambda: DataLoader(range(8), batch_size=2),
    "ragged": lambda: DataLoader(range(7), batch_size=2),
    "one": lambda: DataLoader(range(1), batch_size=2),
    "shuffled": lambda: DataLoader(range(7), batch_size=2, shuffle=True),
    "drop_last": lambda: DataLoader(range(7), batch_size=2, drop_last=True),
    "stream": lambda: DataLoader(Stream(7), batch_size=2),
    "sized stream": lambda: DataLoader(SizedStream(7), batch_size=2),
    "elements": lambda: DataLoader(range(5), batch_size=None),
    "elements of a stream": lambda: DataLoader(Stream(5), batch_size=None),
    "groups": lambda: DataLoader(range(6), batch_sampler=Groups([0, 1, 2], [3], [4, 5])),
    "sized groups": lambda: DataLoader(range(6), batch_sampler=SizedGroups([0, 1, 2], [3], [4, 5])),
    "batches inside": lambda: DataLoader(
        torch.arange(7), sampler=BatchSampler(SequentialSampler(range(7)), 2, drop_last=False), batch_size=None
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_last_batch_is_known_as_such(name: str):
    plain = LOADERS[name]()
    torch.manual_seed(1)
    expected = numbers(plain)
    loader = prepared(LOADERS[name]())
    torch.manual_seed(1)
    found, ends = [], []
    for batch in loader:
        found.append(torch.as_tensor(batch).tolist())
        ends.append(loader.end_of_dataloader)
        assert len(readings()) == 1
    assert found == expected
    assert ends == [False] * (len(expected) - 1) + [True]
    assert readings() == []
    assert (loader.iteration, loader.position.num_batches) == (1, 0)
    assert len(numbers(loader)) == len(expected)


@pytest.mark.parametrize("loader", [DataLoader([]), DataLoader(Stream(0))], ids=["empty", "empty stream"])
def test_no_data_is_an_epoch(loader: Any):
    loader = prepared(loader)
    assert numbers(loader) == []
    assert (readings(), loader.iteration) == ([], 1)


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_that_is_left_is_not_read_any_more(name: str):
    loader = prepared(LOADERS[name]())
    for _ in loader:
        break
    assert readings() == []

    def fail() -> None:
        for _ in loader:
            assert len(readings()) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert readings() == []
    batches = iter(loader)
    next(batches)
    assert len(readings()) == 1
    batches.close()
    assert readings() == []
    assert loader.iteration == 0
    assert len(numbers(loader)) == len(numbers(LOADERS[name]()))


def test_loaders_within_each_other():
    outer, inner = prepared(DataLoader(range(2))), prepared(DataLoader(range(2)))
    state = importlib.import_module(f"{OURS}.state").GradientState()
    for _ in outer:
        assert state.active_dataloader is outer
        for _ in inner:
            assert state.active_dataloader is inner
        assert (state.active_dataloader, len(state.readings)) == (outer, 1)
    assert (state.active_dataloader, state.remainder) == (None, -1)


@pytest.mark.parametrize(
    ("name", "remainder"),
    [("divisible", 0), ("ragged", 1), ("drop_last", -1), ("stream", -1), ("sized stream", 1), ("groups", -1)],
)
def test_remainder(name: str, remainder: int):
    loader = prepared(LOADERS[name]())
    next(batches := iter(loader))
    assert loader.remainder == remainder
    batches.close()


def test_nothing_is_read_ahead():
    for package in BOTH:
        data = Recorded(6)
        read = [len(data.read) for _ in module(package).prepare_data_loader(DataLoader(data, batch_size=2))]
        assert read == ([4, 6, 6] if package == ORIGINAL else [2, 4, 6])


def test_a_worker_process():
    loader = prepared(DataLoader(range(7), batch_size=2, num_workers=1, shuffle=True))
    torch.manual_seed(1)
    first = numbers(loader)
    assert sorted(chain.from_iterable(first)) == list(range(7))
    torch.manual_seed(1)
    loader.iteration = 0
    assert numbers(module(OURS).skip_first_batches(loader, 2)) == first[2:]
    for _ in loader:
        break
    assert readings() == []


# --- skipping ---


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("is_prepared", [True, False], ids=["prepared", "plain"])
def test_skipped_batches(name: str, is_prepared: bool):
    for num_batches in range(4):
        loader = prepared(LOADERS[name]()) if is_prepared else LOADERS[name]()
        torch.manual_seed(1)
        expected = numbers(LOADERS[name]())[num_batches:]
        skipping = module(OURS).skip_first_batches(loader, num_batches)
        torch.manual_seed(1)
        assert numbers(skipping) == expected
        assert readings() == []


def test_what_is_skipped_is_not_read():
    data = Recorded(8)
    loader = module(OURS).skip_first_batches(prepared(DataLoader(data, batch_size=2)), 3)
    assert numbers(loader) == [[6, 7]]
    assert data.read == [6, 7]


def test_skipping_counts_and_knows_the_end():
    loader = prepared(DataLoader(range(7), batch_size=2), num_processes=2, process_index=1)
    skipping = module(OURS).skip_first_batches(loader, 1)
    assert (len(loader), len(skipping)) == (2, 1)
    assert loader.total_batch_size == skipping.total_batch_size == 4
    assert skipping.total_dataset_length == 7
    for batch in skipping:
        assert batch.tolist() == [6, 0]
        assert (skipping.end_of_dataloader, skipping.remainder) == (True, 3)
        assert loader.position.num_batches == 2
    assert (loader.iteration, loader.position.num_batches) == (1, 0)


def test_skipping_twice_adds_up():
    skip = module(OURS).skip_first_batches
    for loader in (DataLoader(range(7), batch_size=2), prepared(DataLoader(range(7), batch_size=2))):
        assert numbers(skip(skip(loader, 1), 2)) == [[6]]


def test_a_plain_loader_that_skips_can_be_prepared():
    loader = module(OURS).skip_first_batches(DataLoader(range(8), batch_size=2), 1)
    shares = [numbers(prepared(loader, num_processes=2, process_index=rank)) for rank in range(2)]
    assert shares == [[[2, 3], [6, 7]], [[4, 5], [2, 3]]]


@pytest.mark.parametrize("num_batches", [-1, 1.5, "2", True], ids=repr)
def test_skipping_refuses_what_is_no_number(num_batches: Any):
    with pytest.raises(ValueError, match="num_batches"):
        module(OURS).skip_first_batches(prepared(DataLoader(range(4))), num_batches)


# --- lengths that are not to be relied on ---


class Estimated(Sampler[int]):
    """Four samples, and a length that says otherwise."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("length", [2, 9])
def test_the_end_is_known_whatever_a_custom_sampler_says(length: int):
    loader = prepared(DataLoader(range(10), sampler=Estimated(length)))
    assert [loader.end_of_dataloader for _ in loader] == [False, False, False, True]


def test_a_rank_without_a_part_of_the_last_batch_knows_its_end():
    ends = []
    for rank in range(2):
        loader = share(DataLoader(range(5), batch_size=4), rank, split_batches=True, even_batches=False)
        ends.append([(batch.tolist(), loader.end_of_dataloader) for batch in loader])
    assert ends == [[([0, 1], False), ([4], True)], [([2, 3], True)]]


def test_remainder_counts_what_the_sampler_has():
    loader = share(DataLoader(range(100), batch_size=4, sampler=SubsetRandomSampler(range(7))), 0)
    assert [loader.remainder for _ in loader] == [7]


# --- sharing among ranks, seen from one process ---


def share(loader: DataLoader[Any], rank: int, **options: Any) -> Any:
    return prepared(loader, num_processes=2, process_index=rank, **options)


@pytest.mark.parametrize(
    ("make", "shares"),
    [
        (lambda: DataLoader(range(5), batch_size=2), [[[0, 1], [4, 0]], [[2, 3], [1, 2]]]),
        (lambda: DataLoader(Stream(5), batch_size=2), [[[0, 1], [4, 0]], [[2, 3], [1, 2]]]),
        (lambda: DataLoader(range(5), batch_size=None), [[0, 2, 4], [1, 3, 0]]),
        (lambda: DataLoader(Stream(5), batch_size=None), [[0, 2, 4], [1, 3, 0]]),
        (lambda: DataLoader(range(4), batch_sampler=Groups([0], [1, 2], [3])), [[[0], [3]], [[1, 2], [0]]]),
    ],
    ids=["batches", "stream", "elements", "elements of a stream", "groups"],
)
def test_shares_of_prepared_loaders(make: Callable[[], DataLoader[Any]], shares: list[Any]):
    loaders = [share(make(), rank) for rank in range(2)]
    for loader, expected in zip(loaders, shares, strict=True):
        ends = []
        assert [
            ends.append(loader.end_of_dataloader) or torch.as_tensor(batch).tolist() for batch in loader
        ] == expected
        assert ends == [False] * (len(expected) - 1) + [True]


def test_remainder_of_a_sized_stream():
    loader = share(DataLoader(SizedStream(11), batch_size=2), 0)
    for _ in loader:
        assert loader.remainder == 3
    assert loader.total_batch_size == 4


def test_uneven_shares():
    loaders = [share(DataLoader(range(5), batch_size=2), rank, even_batches=False) for rank in range(2)]
    assert [numbers(loader) for loader in loaders] == [[[0, 1], [4]], [[2, 3]]]
    assert [len(loader) for loader in loaders] == [2, 1]


def test_split_batches():
    loaders = [share(DataLoader(range(6), batch_size=4), rank, split_batches=True) for rank in range(2)]
    assert [numbers(loader) for loader in loaders] == [[[0, 1], [4, 5]], [[2, 3], [0, 1]]]
    assert [loader.total_batch_size for loader in loaders] == [4, 4]
    with pytest.raises(ValueError, match="split_batches"):
        share(DataLoader(range(6), batch_size=3), 0, split_batches=True)


def test_an_epoch_reaches_every_layer():
    class Shuffled(Groups):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    groups = Shuffled([0], [1])
    loader = share(DataLoader(range(2), batch_sampler=groups), 0)
    for epoch in range(3):
        numbers(loader)
        assert groups.epoch == epoch


def test_a_seeded_order_is_a_function_of_the_epoch():
    def orders() -> list[Any]:
        loader = prepared(DataLoader(range(9), batch_size=4, shuffle=True), use_seedable_sampler=True, data_seed=3)
        return [numbers(loader) for _ in range(3)]

    first = orders()
    torch.manual_seed(99)
    assert orders() == first
    assert first[0] != first[1] != first[2]
    theirs = module(ORIGINAL).prepare_data_loader(
        DataLoader(range(9), batch_size=4, shuffle=True), use_seedable_sampler=True, data_seed=3
    )
    assert [numbers(theirs) for _ in range(3)] == first


def test_the_sampler_can_be_seen_and_replaced():
    loader = prepared(DataLoader(range(9), batch_size=4, shuffle=True))
    assert isinstance(loader.get_sampler(), RandomSampler)
    loader.set_sampler(SequentialSampler(range(9)))
    assert numbers(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


# --- many ranks ---


@contextmanager
def door(package: str, **options: Any) -> Generator[Any]:
    """An accelerator of one door, for the ranks of this process, and nothing of it left afterwards."""
    with entered(package) as found:
        yield found.Accelerator(cpu=True, dataloader_config=found.utils.DataLoaderConfiguration(**options))


def of_ranks(package: str, kind: str, size: int, options: dict[str, Any], batch_size: int = 2) -> Any:
    """Batches of one rank, and those gathered without duplicates, in two epochs."""
    torch.manual_seed(0)
    data: Any = Stream(size) if kind == "stream" else SizedStream(size) if kind == "sized" else torch.arange(size)
    own, together = [], []
    with door(package, **options) as accelerator:
        loader: Any = accelerator.prepare(DataLoader(data, batch_size=batch_size, shuffle=kind == "shuffled"))
        for _ in range(2):
            for batch in loader:
                own.append(batch.tolist())
                together += accelerator.gather_for_metrics(batch).tolist()
    return own, together


def drops(package: str, size: int, split: bool) -> Any:
    with door(package, dispatch_batches=True, split_batches=split) as accelerator:
        return numbers(accelerator.prepare(DataLoader(Stream(size), batch_size=4, drop_last=True)))


@pytest.mark.parametrize("size", [8, 13, 14])
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_dispatched_streams_drop_what_the_original_drops(ranks: Any, split: bool, size: int):
    assert ranks(2).run(drops, OURS, size, split) == ranks(2).run(drops, ORIGINAL, size, split)


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("kind", ["stream", "batches"])
def test_dispatched_batches_are_the_originals(ranks: Any, kind: str, split: bool, size: int):
    options = {"dispatch_batches": True, "split_batches": split}
    mine = ranks(2).run(of_ranks, OURS, kind, size, options)
    assert mine == ranks(2).run(of_ranks, ORIGINAL, kind, size, options)
    assert mine[0][1] == mine[1][1] == [*range(size)] * 2


@pytest.mark.parametrize("size", [1, 4, 7, 11])
@pytest.mark.parametrize("kind", ["batches", "sized", "shuffled"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_have_every_sample_once(ranks: Any, kind: str, batch_size: int, size: int):
    first, second = ranks(2).run(of_ranks, OURS, kind, size, {"dispatch_batches": False}, batch_size)
    assert first[1] == second[1]
    assert sorted(first[1]) == sorted([*range(size)] * 2)


def test_uneven_shares_of_ranks(ranks: Any):
    for own, together in ranks(2).run(of_ranks, OURS, "batches", 8, {"even_batches": False}):
        assert len(own) == 4
        assert together == [*range(8)] * 2


def skips_dispatched(num_batches: int) -> list[list[int]]:
    with door(OURS, dispatch_batches=True) as accelerator:
        loader = accelerator.skip_first_batches(accelerator.prepare(DataLoader(Stream(11), batch_size=2)), num_batches)
        return [accelerator.gather_for_metrics(batch).tolist() for batch in loader]


@pytest.mark.parametrize("num_batches", range(4))
def test_dispatched_batches_are_skipped(ranks: Any, num_batches: int):
    whole = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for found in ranks(2).run(skips_dispatched, num_batches):
        assert found == whole[num_batches:]


class Torn(torch.utils.data.IterableDataset[Any]):
    """Cannot be read to its end."""

    def __iter__(self) -> Iterator[Any]:
        yield from torch.arange(8)
        raise OSError("a torn tape")


def reads_what_is_torn() -> tuple[int, str, bool]:
    """Batches, the error after them, and whether ranks go on together."""
    with door(OURS, dispatch_batches=True) as accelerator:
        loader = accelerator.prepare(torch.utils.data.DataLoader(Torn(), batch_size=2))
        num, error = 0, ""
        try:
            for _ in loader:
                num += 1
        except Exception as raised:
            error = type(raised).__name__
        return num, error, accelerator.gather(torch.ones(1)).tolist() == [1.0, 1.0]


def test_an_error_of_the_rank_that_reads_reaches_the_others(ranks: Any):
    assert ranks(2, timeout_s=20.0).run(reads_what_is_torn) == [(1, "OSError", True), (1, "PeerError", True)]


def test_a_dispatcher_of_one_process_reads_for_itself():
    loader = importlib.import_module(f"{OURS}.data_loader").DataLoaderDispatcher(range(10), batch_size=4)
    for _ in range(2):
        seen = [(batch.tolist(), loader.end_of_dataloader) for batch in loader]
        assert seen == [([0, 1, 2, 3], False), ([4, 5, 6, 7], False), ([8, 9], True)]
