"""The loader: shares as batches, over data sets with an index and over streams, with workers and without."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from macrobatch.data import MacroBatchLoader
from macrobatch.data.lookahead import lookahead
from macrobatch.data.randomness import apart
from macrobatch.data.shard import shard
from macrobatch.data.windows import Windows
from macrobatch.errors import ArgumentError, BatchError, StateError
from macrobatch.ranks import Ranks


class Squares(Dataset):
    """Samples (index, index²) that remember which of them were asked for."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        return {"index": index, "square": torch.tensor([float(index**2)])}


class Counting(IterableDataset):
    """A stream of integers: `epoch * 1000 + i`, so that a sample tells the epoch that its data set was told."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.epoch = 0
        self.num_open = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.num_open += 1
        try:
            yield from range(self.epoch * 1000, self.epoch * 1000 + self.num)
        finally:
            self.num_open -= 1


class Drawing(IterableDataset):
    """A stream that shuffles by the global generators, as too many do."""

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(24).tolist()
        random.shuffle(order)
        yield from np.random.permutation(order).tolist()


class Worker(Dataset):
    """Its samples tell the worker that loaded them, and what it drew."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        info = torch.utils.data.get_worker_info()
        return index, -1 if info is None else info.id, int(torch.randint(2**31, ()))


def joined(parts: Iterable[Any]) -> list[Any]:
    return list(chain(*parts))


def team(dataset: Any, global_batch: int, world_size: int, **options: Any) -> list[MacroBatchLoader]:
    ranks = [Ranks(rank=rank, world_size=world_size) for rank in range(world_size)]
    return [MacroBatchLoader(dataset, global_batch, ranks=each, **options) for each in ranks]


def values(batch: Any) -> list[int]:
    return [] if batch is None else batch.tolist()


def windows_of(loaders: list[MacroBatchLoader]) -> list[list[int]]:
    """One epoch's windows, put together over ranks."""
    return [joined(parts) for parts in zip(*([values(batch) for batch in each] for each in loaders), strict=True)]


# --- data sets with an index ---


def test_batches_are_collated_shares_and_only_they_are_loaded():
    dataset = Squares(10)
    loader = MacroBatchLoader(dataset, 8, ranks=Ranks(rank=1, world_size=3))
    first, last = list(loader)
    assert first["index"].tolist() == [3, 4, 5]
    assert first["square"].tolist() == [[9.0], [16.0], [25.0]]
    assert last["index"].tolist() == [9]
    assert dataset.asked == [3, 4, 5, 9]


@pytest.mark.parametrize("dataset", [list(range(11)), np.arange(11), torch.arange(11), range(11)], ids=type)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_anything_with_an_index_makes_the_same_windows(dataset, world_size):
    loaders = team(dataset, 4, world_size, shuffle=True, seed=5)
    windows = Windows(num_samples=11, global_batch=4, shuffle=True, seed=5)
    for epoch in range(2):
        assert windows_of(loaders) == list(windows.shares(epoch, 0, Ranks()))


def test_empty_shares_are_none():
    batches = [[values(batch) if batch is not None else None for batch in each] for each in team(range(4), 3, 3)]
    assert batches == [[[0], [3]], [[1], None], [[2], None]]


def test_collate_function_gets_the_samples():
    loader = MacroBatchLoader(range(5), 4, collate_fn=lambda samples: tuple(samples))
    assert list(loader) == [(0, 1, 2, 3), (4,)]


def test_an_error_of_the_data_set_is_its_own():
    class Broken(Squares):
        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise OSError("sample 5 cannot be read")
            return super().__getitem__(index)

    loader = MacroBatchLoader(Broken(8), 3)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(OSError, match="sample 5"):
        next(iterator)
    assert loader.state_dict()["num_windows"] == 1


@given(
    num=st.integers(1, 30),
    global_batch=st.integers(1, 40),
    micro_batch=st.integers(1, 9),
    world_size=st.integers(1, 5),
    is_stream=st.booleans(),
    tail=st.sampled_from(["apply", "drop"]),
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_are_the_share_in_pieces(num, global_batch, micro_batch, world_size, is_stream, tail):
    global_batch = min(num, global_batch) if tail == "drop" else global_batch
    dataset = Counting(num) if is_stream else range(num)
    for loader, again in zip(*(team(dataset, global_batch, world_size, tail=tail) for _ in "ab"), strict=True):
        shares = [[values(each) for each in share] for share in loader.micro_batches(micro_batch)]
        whole = [values(batch) for batch in again]
        assert [joined(parts) for parts in shares] == whole
        for parts, batch in zip(shares, whole, strict=True):
            full, rest = divmod(len(batch), micro_batch)
            assert [len(part) for part in parts] == [micro_batch] * full + [rest] * bool(rest)


def test_micro_batches_are_loaded_one_by_one():
    dataset = Squares(9)
    shares = MacroBatchLoader(dataset, 6).micro_batches(2)
    share = next(shares)
    assert dataset.asked == [0, 1]
    next(share)
    next(share)
    assert dataset.asked == [0, 1, 2, 3]
    share = next(shares)  # what is left of the first share is passed over
    assert next(share)["index"].tolist() == [6, 7]


def test_a_share_that_was_passed_over_yields_nothing_more():
    shares = MacroBatchLoader(range(6), 3).micro_batches(1)
    first, second = next(shares), next(shares)
    assert list(first) == []
    assert [values(each) for each in second] == [[3], [4], [5]]


# --- the position ---


@pytest.mark.parametrize("dataset", [range(13), Counting(13)], ids=["index", "stream"])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}], ids=["here", "worker"])
def test_position_counts_what_was_yielded_and_resumes_on_another_world_size(dataset, options):
    if options and isinstance(dataset, range):
        options = {**options, "persistent_workers": True}
    loaders = team(dataset, 3, 2, **options)
    expected = windows_of(team(dataset, 3, 1))
    iterators = [iter(loader) for loader in loaders]
    for _ in range(2):
        for iterator in iterators:
            next(iterator)
    state = loaders[0].state_dict()
    assert (state["epoch"], state["num_windows"]) == (0, 2)
    assert loaders[1].state_dict() == state
    del iterators
    resumed = team(dataset, 3, 3, **options)
    for loader in resumed:
        loader.load_state_dict(state)
    assert [sorted(window) for window in windows_of(resumed)] == expected[2:]
    assert {loader.epoch for loader in resumed} == {1}
    assert len(windows_of(resumed)) == 5  # and the next epoch is whole


@pytest.mark.parametrize("num", [12, 13])
@pytest.mark.parametrize("kind", ["index", "stream"])
def test_resume_behind_the_last_window_of_an_epoch(kind, num):
    loader = MacroBatchLoader(Counting(num) if kind == "stream" else range(num), 4)
    num_windows = -(-num // 4)
    loader.load_state_dict({**loader.state_dict(), "num_windows": num_windows})
    assert list(loader) == []
    assert loader.epoch == 1
    assert len(list(loader)) == num_windows


def test_position_in_micro_batches_counts_windows():
    loader = MacroBatchLoader(range(10), 4)
    for share in loader.micro_batches(2):
        next(share)
        break
    assert loader.state_dict()["num_windows"] == 1
    resumed = MacroBatchLoader(range(10), 4)
    resumed.load_state_dict(loader.state_dict())
    assert [values(batch) for batch in resumed] == [[4, 5, 6, 7], [8, 9]]


def test_state_of_other_data_is_refused():
    state = MacroBatchLoader(range(10), 4).state_dict()
    for other in (MacroBatchLoader(range(11), 4), MacroBatchLoader(range(10), 5), MacroBatchLoader(Counting(10), 4)):
        with pytest.raises(StateError, match="as the data are now"):
            other.load_state_dict(state)


def test_length():
    assert len(MacroBatchLoader(range(10), 4)) == 3
    assert len(MacroBatchLoader(range(10), 4, tail="drop")) == 2
    carry = MacroBatchLoader(range(10), 4, tail="carry")
    assert [(len(carry), len(list(carry))) for _ in range(3)] == [(2, 2), (3, 3), (2, 2)]


def test_data_sets_are_told_the_epoch():
    class Epochs(Squares):
        def set_epoch(self, epoch: int) -> None:
            self.asked.append(100 + epoch)

    dataset = Epochs(1)
    loader = MacroBatchLoader(dataset, 1)
    for _ in range(2):
        list(loader)
    assert dataset.asked == [100, 0, 101, 0]


# --- randomness ---


def test_apart_has_one_track_for_all_items():
    def draws() -> Iterator[tuple[float, ...]]:
        for _ in range(3):
            yield torch.rand(()).item(), float(np.random.rand()), random.random()

    first = []
    for item in apart(draws(), 1, 2):
        first.append(item)
        for _ in draws():  # what the program draws in between changes nothing
            pass
    assert list(apart(draws(), 1, 2)) == first
    assert len({number for item in first for number in item}) == 9
    assert list(apart(draws(), 2, 1)) != first


@pytest.mark.parametrize("dataset", [range(8), Counting(8), Drawing()], ids=["index", "stream", "drawing"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(dataset, num_workers):
    def drawn() -> tuple[Any, ...]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    def seed() -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    seed()
    expected = [drawn() for _ in range(4)]
    seed()
    found = [drawn()]
    for _ in MacroBatchLoader(dataset, 8, shuffle=isinstance(dataset, range), num_workers=num_workers):
        found.append(drawn())  # noqa: PERF401
    assert found == expected[: len(found)]
    assert len(found) > 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_that_shuffles_by_the_global_generators_is_the_same_on_every_rank(num_workers):
    shares = []
    for loader in team(Drawing(), 5, 3, num_workers=num_workers):
        torch.manual_seed(17 * len(shares))  # ranks that differ, as they do in training
        shares.append([[values(batch) for batch in loader] for _ in range(2)])
    first, second = ([joined(parts) for parts in zip(*epoch, strict=True)] for epoch in zip(*shares, strict=True))
    assert sorted(joined(first)) == sorted(joined(second)) == list(range(24))
    assert first != second


def test_what_workers_draw_depends_on_epoch_and_rank_alone():
    def draws(rank: int) -> list[int]:
        loader = MacroBatchLoader(Worker(), 12, ranks=Ranks(rank=rank, world_size=2), num_workers=1)
        return [draw for _ in range(2) for batch in loader for draw in batch[2].tolist()]

    torch.manual_seed(1)
    first = draws(0)
    torch.manual_seed(2)
    assert draws(0) == first
    assert len({*first, *draws(1)}) == 24


# --- workers ---


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_workers_load_and_the_order_stays(options):
    loader = MacroBatchLoader(Worker(), 3, **options)
    for _ in range(2):
        indices, workers, _ = zip(*loader, strict=True)
        assert [each.tolist() for each in indices] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
        assert {worker for each in workers for worker in each.tolist()} == {0, 1}


def test_break_ends_the_workers():
    before = set(multiprocessing.active_children())
    workers: set[Any] = set()
    for _ in MacroBatchLoader(Worker(), 2, num_workers=2):
        workers = set(multiprocessing.active_children()) - before
        break
    assert len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)


def test_break_with_persistent_workers_begins_the_next_epoch():
    loader = MacroBatchLoader(Worker(), 2, num_workers=1, persistent_workers=True)
    for batch in loader:
        assert batch[0].tolist() == [0, 1]
        break
    assert [batch[0].tolist() for batch in loader] == [[i, i + 1] for i in range(0, 12, 2)]
    assert loader.epoch == 2


def test_break_closes_a_stream():
    dataset = Counting(100)
    for _ in MacroBatchLoader(dataset, 7):
        assert dataset.num_open == 1
        break
    assert dataset.num_open == 0


# --- streams ---


@given(num=st.integers(1, 40), global_batch=st.integers(1, 50), world_size=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_ranks_together_read_a_stream_once(num, global_batch, world_size):
    expected = [list(range(num))[at : at + global_batch] for at in range(0, num, global_batch)]
    loaders = team(Counting(num), global_batch, world_size)
    windows = windows_of(loaders)
    assert [sorted(window) for window in windows] == expected
    batches = list(
        zip(*([values(b) for b in each] for each in team(Counting(num), global_batch, world_size)), strict=True)
    )
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in batches)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_streams_are_told_the_epoch(options):
    loader = MacroBatchLoader(Counting(5), 4, **options)
    assert [[values(batch) for batch in loader] for _ in range(2)] == [
        [[0, 1, 2, 3], [4]],
        [[1000, 1001, 1002, 1003], [1004]],
    ]


def test_a_short_window_of_a_stream_can_be_dropped():
    assert windows_of(team(Counting(11), 4, 2, tail="drop")) == [[0, 2, 1, 3], [4, 6, 5, 7]]
    shares = MacroBatchLoader(Counting(11), 8, tail="drop").micro_batches(1)
    assert [[values(each) for each in share] for share in shares] == [[[number] for number in range(8)]]


def test_every_window_of_a_stream_begins_with_the_first_rank():
    assert windows_of(team(Counting(7), 3, 2)) == [[0, 2, 1], [3, 5, 4], [6]]
    assert [[values(batch) for batch in each] for each in team(Counting(4), 3, 2)] == [[[0, 2], [3]], [[1], []]]


def test_a_stream_has_a_length_if_its_data_set_has():
    class Sized(Counting):
        def __len__(self) -> int:
            return self.num

    assert len(MacroBatchLoader(Sized(10), 4)) == 3
    assert len(MacroBatchLoader(Sized(10), 4, tail="drop")) == 2
    with pytest.raises(TypeError, match="no length"):
        len(MacroBatchLoader(Counting(10), 4))


def test_a_share_of_an_endless_stream():
    class Endless(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            number = 0
            while True:
                yield number
                number += 1

    iterator = iter(MacroBatchLoader(Endless(), 4, ranks=Ranks(rank=1, world_size=2)))
    assert [values(next(iterator)) for _ in range(3)] == [[1, 3], [5, 7], [9, 11]]


@pytest.mark.parametrize("tail", ["apply", "drop"])
def test_a_stream_without_a_window_is_refused(tail):
    with pytest.raises(BatchError, match=r"epoch 0: given data that ended after 0 windows"):
        list(MacroBatchLoader(Counting(0 if tail == "apply" else 3), 4, tail=tail))


def test_a_stream_that_can_be_read_once_only_is_refused_in_the_second_epoch():
    class Once(IterableDataset):
        def __init__(self) -> None:
            self.items = iter(range(4))

        def __iter__(self) -> Iterator[int]:
            return self.items

    loader = MacroBatchLoader(Once(), 2)
    assert len(list(loader)) == 2
    with pytest.raises(BatchError, match="fresh iterator"):
        list(loader)


def test_a_stream_that_is_shorter_than_the_position_is_refused():
    loader = MacroBatchLoader(Counting(10), 2)
    loader.load_state_dict({**loader.state_dict(), "num_windows": 6})
    with pytest.raises(BatchError, match="ended after 5 windows"):
        list(loader)


# --- looking ahead ---


def test_lookahead_draws_exactly_one_more():
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            drawn.append(number)
            yield number

    seen = []
    for item, is_last in lookahead(items()):
        seen.append((item, is_last))
        assert drawn == list(range(min(item + 2, 3)))
    assert seen == [(0, False), (1, False), (2, True)]
    assert list(lookahead([])) == []


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_on_the_host_nothing_is_drawn_ahead(device):
    dataset = Squares(6)
    iterator = iter(MacroBatchLoader(dataset, 2, device=device))
    next(iterator)
    assert dataset.asked == [0, 1]


def test_to_another_device_batches_are_moved():
    batches = list(MacroBatchLoader(Squares(3), 2, device="meta"))
    assert {tensor.device.type for batch in batches for tensor in batch.values()} == {"meta"}


# --- what is refused ---


@pytest.mark.parametrize("value", [0, -4, 2.5, 4.0, True, float("nan"), "4", None])
@pytest.mark.parametrize("dataset", [range(4), Counting(4)], ids=["index", "stream"])
def test_bad_sizes_are_refused(dataset, value):
    with pytest.raises(ArgumentError, match=r"global_batch: given .* expected an integer >= 1"):
        MacroBatchLoader(dataset, value)
    with pytest.raises(ArgumentError, match="micro_batch"):
        MacroBatchLoader(dataset, 4).micro_batches(value)


@pytest.mark.parametrize(
    "dataset",
    [
        [],
        torch.empty(0, 3),
        TensorDataset(torch.empty(0)),
        {"train": [1, 2]},
        (number for number in range(3)),
        {1, 2},
        list,
        None,
        5,
        DataLoader(TensorDataset(torch.arange(2))),
        MacroBatchLoader([1, 2], 2),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_bad_data_sets_are_refused(dataset):
    with pytest.raises(ArgumentError, match=r"^dataset: given"):
        MacroBatchLoader(dataset, 2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"batch_size": 4}, "batch_size"),
        ({"sampler": [0]}, "sampler"),
        ({"batch_sampler": [[0]]}, "batch_sampler"),
        ({"drop_last": True}, "drop_last"),
        ({"in_order": False}, "in_order"),
        ({"num_workers": -1}, "num_workers"),
        ({"num_workers": True}, "num_workers"),
        ({"collate_fn": 3}, "collate_fn"),
        ({"device": "toaster"}, "device"),
        ({"device": 1.5}, "device"),
        ({"ranks": "all"}, "ranks"),
        ({"tail": "wrong"}, "tail"),
        ({"seed": "a"}, "seed"),
    ],
)
@pytest.mark.parametrize("dataset", [range(4), Counting(4)], ids=["index", "stream"])
def test_bad_options_are_refused(dataset, options, what):
    with pytest.raises(ArgumentError, match=f"^{what}: given"):
        MacroBatchLoader(dataset, 2, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
class Ragged(Dataset):
    """Samples of different lengths."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ids": torch.zeros(3 + index % 2)}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("is_shard", [False, True], ids=["MacroBatchLoader", "shard"])
def test_samples_of_different_lengths_are_refused_with_the_way_to_pad_them(is_shard, num_workers):
    if is_shard:
        loader = shard(DataLoader(Ragged(), batch_size=4, num_workers=num_workers))
    else:
        loader = MacroBatchLoader(Ragged(), 4, num_workers=num_workers)
    kind = RuntimeError if num_workers else BatchError  # torch turns what a worker raises into the former
    with pytest.raises(kind, match=r"given different shapes in one batch, \(3,\), \(4,\); .*variable-lengths\.md"):
        next(iter(loader))


def test_samples_of_different_lengths_in_a_stream_are_refused():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[list[int], int]]:
            yield [1, 2], 0
            yield [1, 2, 3], 1

    with pytest.raises(BatchError, match=r"\(2,\) and \(\), \(3,\) and \(\); .*pads them.*variable-lengths\.md"):
        next(iter(MacroBatchLoader(Stream(), 2)))


def test_other_errors_of_the_collation_are_torchs_own():
    with pytest.raises(TypeError, match="default_collate"):
        next(iter(MacroBatchLoader([object(), object()], 2)))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ArgumentError, match="device: given"):
        MacroBatchLoader(range(4), 2, device="cuda")


@pytest.mark.parametrize(
    ("options", "what"),
    [({"shuffle": True}, "shuffle"), ({"tail": "carry"}, "tail"), ({"num_workers": 2}, "num_workers")],
)
def test_what_a_stream_cannot_do_is_refused(options, what):
    with pytest.raises(ArgumentError, match=f"^{what}: given"):
        MacroBatchLoader(Counting(4), 2, **options)


def test_unknown_options_are_refused_by_torch():
    with pytest.raises(TypeError, match="num_wokers"):
        MacroBatchLoader(range(4), 2, num_wokers=2)  # pyright: ignore[reportCallIssue]
