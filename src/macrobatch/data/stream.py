"""Data sets without a length or an index: every rank reads the same stream and keeps its own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from macrobatch.checks import check_integer
from macrobatch.core.window import Tail
from macrobatch.data.collate import collation
from macrobatch.data.randomness import apart
from macrobatch.data.source import Piece, check_windows, num_batches, tell_epoch
from macrobatch.data.windows import check_tail
from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks

__all__ = ["Stream"]


class _Order(NamedTuple):
    """What to read: windows of `global_batch` samples from the `first` on, in pieces of at most `size`."""

    global_batch: int
    tail: Tail
    ranks: Ranks = Ranks()
    first: int = 0
    size: int = 1


class _End(NamedTuple):
    """Comes after the last piece, with the number of windows that were in the stream."""

    num_windows: int


class Stream:
    """An IterableDataset, read by every rank from its start; position i of a window is rank i % world_size's.

    (A rank with consecutive samples, as with an index, would have to hold a whole window until it is known to be full.)

    Args:
        dataset: yields single samples, the same ones in the same order on every rank.
        global_batch: samples of a full window over all ranks.
        seed: for what the data set draws at random from the global generators.
        tail: "apply" or "drop".
        options: for the DataLoader; at most one worker.

    Raises:
        ArgumentError: an argument is out of its domain.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        global_batch: int,
        *,
        seed: int,
        tail: Tail,
        collate_fn: Callable[[list[Any]], Any] | None,
        options: dict[str, Any],
    ) -> None:
        check_integer("global_batch", global_batch, "the samples of one update over all ranks", fix="pass 1024")
        check_integer("seed", seed, "the same on every rank", fix="pass seed=0", at_least=0)
        check_tail(tail, ("apply", "drop"))
        if options.get("num_workers", 0) > 1:
            raise ArgumentError(
                "num_workers",
                given=f"{options['num_workers']} for an IterableDataset",
                expected="0 or 1: of several workers each would read the whole stream",
                fix="pass num_workers=1 and do the expensive part in collate_fn, which a rank runs for its own samples "
                "only; or, if the data set divides itself over workers, shard a DataLoader with macrobatch.data.shard",
            )
        self._dataset = dataset
        self._order = _Order(global_batch, tail)
        self._seed = seed
        self._collate_fn = collation(collate_fn)
        self._options = options
        self._loader([])  # refuses wrong options now

    def identity(self) -> dict[str, Any]:
        """Length (None if it has none), windows and seed."""
        return {
            "num_samples": num_batches(self._dataset),
            "global_batch": self._order.global_batch,
            "shuffle": False,
            "seed": self._seed,
            "tail": self._order.tail,
        }

    def num_windows(self, epoch: int) -> int | None:
        """Known if the data set has a length."""
        num = num_batches(self._dataset)
        if num is None:
            return None
        return num // self._order.global_batch if self._order.tail == "drop" else -(-num // self._order.global_batch)

    def pieces(self, epoch: int, first: int, size: int, ranks: Ranks) -> Iterator[Piece]:
        """Windows before the `first` are read and passed over."""
        tell_epoch(epoch, self._dataset)
        # A worker is started anew for every pass, so that it sees the epoch that was set.
        order = self._order._replace(ranks=ranks, first=first, size=size)
        reader = _Reader(self._dataset, order, self._collate_fn)
        num_windows = 0
        for item in apart(self._loader(reader), self._seed, epoch):  # a worker's seed is drawn in here, too
            if isinstance(item, _End):
                num_windows = item.num_windows
            else:
                yield item
        check_windows(epoch, first, num_windows)

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, **self._options)


class _Reader(IterableDataset[Any]):
    """Reads a stream, in the worker if there is one: what other ranks keep is neither collated nor sent."""

    def __init__(self, dataset: Iterable[Any], order: _Order, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._order = order
        self._collate_fn = collate_fn

    def __iter__(self) -> Iterator[Piece | _End]:
        global_batch, tail, ranks, first, size = self._order
        index = -1
        ready: list[list[Any]] = []  # full pieces of the window at hand
        samples: list[Any] = []  # the piece that is being filled
        for index, sample in enumerate(self._dataset):
            if index < first * global_batch:
                continue
            offset = index % global_batch
            if offset % ranks.world_size == ranks.rank:
                if len(samples) == size:
                    ready.append(samples)
                    samples = []
                samples.append(sample)
            is_full = offset == global_batch - 1
            if is_full or tail == "apply":  # under "drop" it is not known before whether the window counts
                yield from (self._piece(each, is_last=False) for each in ready)
                ready = []
            if is_full:
                yield self._piece(samples, is_last=True)
                samples = []
        num_windows, rest = divmod(index + 1, global_batch)
        if rest and tail == "apply" and num_windows >= first:
            yield self._piece(samples, is_last=True)
        yield _End(num_windows + (rest > 0 and tail == "apply"))

    def _piece(self, samples: list[Any], *, is_last: bool) -> Piece:
        return Piece(self._collate_fn(samples) if samples else None, is_last)


def _as_it_is(item: Any) -> Any:
    return item
