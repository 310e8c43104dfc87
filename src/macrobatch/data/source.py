"""Where a loader's batches come from. A source gives this rank's share of each window, in pieces.

```text
Indexed    a data set with a length: indices are cut, and each rank loads its own samples only
Stream     an IterableDataset: each rank reads all of it and keeps its own samples
Rows       batches that something else has made: each rank gets all of each and keeps its own rows
```
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import tee
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader

from macrobatch import tree
from macrobatch.data.collate import collation
from macrobatch.data.randomness import apart, seed_of
from macrobatch.data.windows import share
from macrobatch.errors import BatchError
from macrobatch.ranks import Ranks

__all__ = ["Indexed", "Piece", "Rows", "Sampled", "Shares", "Source", "check_windows", "num_batches", "tell_epoch"]


class Piece(NamedTuple):
    """A micro-batch of this rank's share of a window. An empty share is one piece whose batch is None."""

    batch: Any
    is_last: bool


class Source(Protocol):
    """What a loader asks of its data."""

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a position to mean the same samples, as plain values."""
        ...

    def num_windows(self, epoch: int) -> int | None:
        """How many windows an epoch has; None if that is not known."""
        ...

    def pieces(self, epoch: int, first: int, size: int, ranks: Ranks) -> Iterator[Piece]:
        """A rank's share of each window of an epoch from the `first` on, in pieces of at most `size` samples."""
        ...


class Shares(Protocol):
    """As a `Source`, but with the indices of samples. `Windows` is one."""

    def identity(self) -> dict[str, Any]: ...

    def num_windows(self, epoch: int) -> int | None: ...

    def shares(self, epoch: int, first: int, ranks: Ranks) -> Iterator[list[int]]: ...


class Indexed:
    """A data set with a length, loaded by torch's DataLoader.

    Args:
        dataset: with `dataset[index]`.
        windows: which indices make up which window.
        options: for the DataLoader.
    """

    def __init__(self, dataset: Any, windows: Shares, options: dict[str, Any]) -> None:
        self._dataset = dataset
        self._windows = windows
        self._chunks = _Chunks()
        self._generator = torch.Generator()
        passed: dict[str, Any] = {"generator": self._generator, **options}
        passed["collate_fn"] = collation(options.get("collate_fn"))
        self._loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=self._chunks, **passed)

    def identity(self) -> dict[str, Any]:
        """That of the windows."""
        return self._windows.identity()

    def num_windows(self, epoch: int) -> int | None:
        """That of the windows."""
        return self._windows.num_windows(epoch)

    def pieces(self, epoch: int, first: int, size: int, ranks: Ranks) -> Iterator[Piece]:
        """Only the rank's samples are loaded. What workers draw at random depends on epoch and rank."""
        tell_epoch(epoch, self._dataset)
        ours, theirs = tee(self.cuts(epoch, first, size, ranks))  # the loader may ask ahead of us
        self._chunks.lists = (indices for micro_batches in theirs for indices in micro_batches)
        self._generator.manual_seed(seed_of(epoch, first, ranks.rank, self.identity().get("seed", 0)))
        loaded = iter(self._loader)
        for micro_batches in ours:
            if not micro_batches:
                yield Piece(None, is_last=True)
            for num in range(1, len(micro_batches) + 1):
                yield Piece(next(loaded), is_last=num == len(micro_batches))

    def cuts(self, epoch: int, first: int, size: int, ranks: Ranks) -> Iterator[list[list[int]]]:
        """A rank's share of each window as the indices of its micro-batches; none if the share is empty."""
        for indices in self._windows.shares(epoch, first, ranks):
            yield [indices[at : at + size] for at in range(0, len(indices), size)]


class _Chunks:
    """What the DataLoader is to load in its next pass."""

    def __init__(self) -> None:
        self.lists: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lists)


class Sampled:
    """Windows that somebody else's batch sampler makes. It draws the same random numbers on every rank.

    Args:
        batch_sampler: yields lists of indices, the same on every rank.
        num_samples: length of the data set.
        seed: for what it draws at random.
    """

    def __init__(self, batch_sampler: Iterable[Iterable[int]], num_samples: int, seed: int) -> None:
        self._batch_sampler = batch_sampler
        self._num_samples = num_samples
        self._seed = seed

    def identity(self) -> dict[str, Any]:
        """Numbers of samples and batches, and the seed; a batch sampler of another kind goes unnoticed."""
        num = num_batches(self._batch_sampler)
        return {"num_samples": self._num_samples, "num_batches": num, "seed": self._seed}

    def num_windows(self, epoch: int) -> int | None:
        """What the batch sampler says, if it has a length."""
        return num_batches(self._batch_sampler)

    def shares(self, epoch: int, first: int, ranks: Ranks) -> Iterator[list[int]]:
        """This rank's part of each list; those before the `first` are drawn and passed over."""
        tell_epoch(epoch, self._batch_sampler, getattr(self._batch_sampler, "sampler", None))
        num = 0
        for num, window in enumerate(apart(self._batch_sampler, self._seed, epoch), start=1):
            if num > first:
                indices = list(window)
                part = share(len(indices), ranks)
                yield indices[part.start : part.stop]
        check_windows(epoch, first, num)


class Rows:
    """Batches that are made already. It draws the same random numbers on every rank.

    Args:
        batches: each iteration yields the same batches on every rank: trees of tensors with one row per sample.
        seed: for what is drawn at random in making them.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        self._batches = batches
        self._seed = seed

    def identity(self) -> dict[str, Any]:
        """The seed and, if it is known, the number of batches."""
        return {"num_batches": num_batches(self._batches), "seed": self._seed}

    def num_windows(self, epoch: int) -> int | None:
        """One for each batch."""
        return num_batches(self._batches)

    def pieces(self, epoch: int, first: int, size: int, ranks: Ranks) -> Iterator[Piece]:
        """Views of each batch's rows."""
        sampler, dataset = (getattr(self._batches, name, None) for name in ("sampler", "dataset"))
        tell_epoch(epoch, self._batches, sampler, dataset)
        num = 0
        for num, batch in enumerate(apart(self._batches, self._seed, epoch), start=1):
            if num > first:
                yield from _cut(batch, size, share(tree.num_rows(batch), ranks))
        check_windows(epoch, first, num)


def _cut(batch: Any, size: int, part: range) -> Iterator[Piece]:
    """Some consecutive rows of a batch, in pieces."""
    if not part:
        yield Piece(None, is_last=True)
    for begin in range(part.start, part.stop, size):
        end = min(begin + size, part.stop)
        yield Piece(tree.select(batch, slice(begin, end)), is_last=end == part.stop)


def num_batches(batches: Any) -> int | None:
    """The length of something, or None if it has none."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


def tell_epoch(epoch: int, *listeners: Any) -> None:
    """Call `set_epoch` of data sets and samplers that have one."""
    for listener in listeners:
        set_epoch = getattr(listener, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def check_windows(epoch: int, first: int, num: int) -> None:
    """Refuse data that came to an end before the windows that had been handed out earlier, or before the first one.

    Raises:
        BatchError: an epoch had `num` windows, of which `first` were to be passed over.
    """
    if num < max(first, 1):
        raise BatchError(
            f"epoch {epoch}",
            given=f"data that ended after {num} windows",
            expected=f"at least {max(first, 1)}",
            fix="return a fresh iterator from every __iter__, with the same data on every rank and in every run",
        )
