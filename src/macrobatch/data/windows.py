"""Which samples make up which window, and which of them are whose: pure functions of epoch, index and rank.

The epochs' orders follow one another in one endless row of positions; a window is a stretch of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist

from macrobatch.checks import check_flag, check_integer
from macrobatch.core.window import Tail
from macrobatch.data.randomness import seed_of
from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks

__all__ = ["Windows", "check_ranks", "check_tail", "ranks_now", "share"]


def share(num: int, ranks: Ranks) -> range:
    """Which of `num` consecutive samples are this rank's: sizes differ by at most one, the first ranks have more.

    ```pycon
    >>> [share(1000, Ranks(rank=rank, world_size=3)) for rank in range(3)]
    [range(0, 334), range(334, 667), range(667, 1000)]

    ```
    """
    size, rest = divmod(num, ranks.world_size)
    begin = ranks.rank * size + min(ranks.rank, rest)
    return range(begin, begin + size + (ranks.rank < rest))


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """The windows of every epoch over a data set of known length.

    Args:
        num_samples: length of the data set, an integer >= 1.
        global_batch: samples of a full window over all ranks, an integer >= 1.
        shuffle: a new order every epoch, by `seed` and epoch alone.
        seed: an integer >= 0.
        tail: what becomes of the samples that do not fill a window at the end of an epoch. "apply" makes them a short
            window, "drop" leaves them out, "carry" begins the next epoch's first window with them.

    Raises:
        ArgumentError: an argument is out of its domain.

    ```pycon
    >>> windows = Windows(num_samples=5, global_batch=2, tail="carry")
    >>> [list(windows.shares(epoch, 0, Ranks())) for epoch in (0, 1)]
    [[[0, 1], [2, 3]], [[4, 0], [1, 2], [3, 4]]]

    ```
    """

    num_samples: int
    global_batch: int
    shuffle: bool = False
    seed: int = 0
    tail: Tail = "apply"

    def __post_init__(self) -> None:
        check_integer("num_samples", self.num_samples, "the length of the data set", fix="pass a data set with samples")
        check_integer("global_batch", self.global_batch, "the samples of one update over all ranks", fix="pass 1024")
        check_integer("seed", self.seed, "the same on every rank", fix="pass seed=0", at_least=0)
        check_tail(self.tail)
        check_flag("shuffle", self.shuffle)
        if self.tail == "drop" and self.num_samples < self.global_batch:
            raise ArgumentError(
                "tail",
                given=f'"drop" with {self.num_samples} samples in windows of {self.global_batch}: nothing is left',
                expected="at least one full window per epoch",
                fix='pass tail="apply" for one short window, or a smaller global_batch',
            )

    def num_windows(self, epoch: int) -> int:
        """How many windows an epoch has: under "carry", those that end in it."""
        if self.tail == "apply":
            return -(-self.num_samples // self.global_batch)
        if self.tail == "drop":
            return self.num_samples // self.global_batch
        return (epoch + 1) * self.num_samples // self.global_batch - self._num_before(epoch)

    def shares(self, epoch: int, first: int, ranks: Ranks) -> Iterator[list[int]]:
        """This rank's samples in each window of an epoch from the `first` on, as indices into the data set."""
        held: tuple[int, Sequence[int]] = (-1, ())  # an order costs a permutation; neighbours need the same one
        for index in range(first, self.num_windows(epoch)):
            window = self._window(epoch, index)
            part = share(len(window), ranks)
            begin, end = window.start + part.start, window.start + part.stop
            indices: list[int] = []
            while begin < end:
                at, offset = divmod(begin, self.num_samples)
                if held[0] != at:
                    held = at, self._order(at)
                num = min(end - begin, self.num_samples - offset)
                indices += _values(held[1][offset : offset + num])
                begin += num
            yield indices

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a position to mean the same samples."""
        return {
            "num_samples": self.num_samples,
            "global_batch": self.global_batch,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "tail": self.tail,
        }

    def _num_before(self, epoch: int) -> int:
        """Under "carry": how many windows end before an epoch."""
        return epoch * self.num_samples // self.global_batch

    def _window(self, epoch: int, index: int) -> range:
        """Where a window lies in the row of all epochs."""
        if self.tail == "carry":
            begin = (self._num_before(epoch) + index) * self.global_batch
            return range(begin, begin + self.global_batch)
        begin, end = epoch * self.num_samples + index * self.global_batch, (epoch + 1) * self.num_samples
        return range(begin, min(begin + self.global_batch, end))

    def _order(self, epoch: int) -> Any:
        if not self.shuffle:
            return range(self.num_samples)
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(self.num_samples, generator=generator)


def check_ranks(ranks: object) -> None:
    """Refuse what is neither None nor a `Ranks` object."""
    if ranks is not None and not isinstance(ranks, Ranks):
        raise ArgumentError(
            "ranks", given=repr(ranks), expected="a Ranks object, or None", fix="pass Ranks(rank=0, world_size=3)"
        )


def ranks_now(ranks: Ranks | None) -> Ranks:
    """The given ranks; for None, those of torch.distributed as it is now, or one process."""
    if ranks is not None:
        return ranks
    if dist.is_available() and dist.is_initialized():
        return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
    return Ranks()


def check_tail(tail: object, allowed: Sequence[str] = get_args(Tail)) -> None:
    """Refuse what is not a tail policy."""
    if not isinstance(tail, str) or tail not in allowed:
        names = " or ".join(f'"{name}"' for name in allowed)
        raise ArgumentError("tail", given=repr(tail), expected=names, fix='pass tail="apply" for a short last window')


def _values(indices: Any) -> list[int]:
    return indices.tolist() if isinstance(indices, torch.Tensor) else list(indices)
