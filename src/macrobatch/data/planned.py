"""Windows of samples of any lengths, planned over all ranks from the lengths alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from macrobatch.core.window import Tail
from macrobatch.data.loader import ShareLoader, checked_device, checked_options
from macrobatch.data.position import Position
from macrobatch.data.source import Indexed, num_batches
from macrobatch.data.windows import Windows, check_ranks, ranks_now
from macrobatch.errors import ArgumentError
from macrobatch.plan.lengths import Lengths, checked_lengths
from macrobatch.plan.pack import TokenBudget
from macrobatch.ranks import Ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from macrobatch.data.loader import Options

__all__ = ["WindowLoader", "WindowSampler"]


class WindowSampler(Sampler[list[list[int]]]):
    """Yields, for every window, the micro-batches of this rank, as lists of indices into the data set.

    A window's samples are those of `MacroBatchSampler`; they do not depend on the number of ranks. Which rank runs
    them, and in which micro-batches, follows from their lengths and is computed alike on every rank. Over ranks, no
    sample comes twice and none is left out. Equivalent plain loop, with `tail="apply"`:

    ```python
    order = torch.randperm(num_samples, generator=g) if shuffle else torch.arange(num_samples)
    for window in order.split(global_batch):
        plan = budget.pack(lengths[window], world_size=world_size)
        yield [window[micro_batch].tolist() for micro_batch in plan.of(rank)]
    ```

    A rank has no micro-batches in a window that has fewer samples than there are ranks. Each iteration is over the next
    epoch. `len()` is the number of windows of the epoch at hand.

    Args:
        lengths: tokens of each sample of the data set, integers >= 1, the same on every rank.
        global_batch: samples of a full window over all ranks, an integer >= 1.
        budget: the cap on a micro-batch's tokens, and the layout.
        ranks: this process among all; by default as in torch.distributed when an iteration begins.
        shuffle: a new order every epoch, by `seed` and epoch alone.
        seed: an integer >= 0, the same on every rank.
        tail: as for `MacroBatchSampler`.

    Raises:
        ArgumentError: an argument is out of its domain.
        BatchError: a sample of the data set is longer than the cap, or empty.

    ```pycon
    >>> budget = TokenBudget(8)
    >>> [list(WindowSampler([3, 8, 2, 5, 4], 4, budget, ranks=Ranks(rank=rank, world_size=2))) for rank in range(2)]
    [[[[1], [2]], [[4]]], [[[3, 0]], []]]

    ```
    """

    def __init__(
        self,
        lengths: Sequence[int] | Lengths | Tensor,
        global_batch: int,
        budget: TokenBudget,
        *,
        ranks: Ranks | None = None,
        shuffle: bool = False,
        seed: int = 0,
        tail: Tail = "apply",
    ) -> None:
        if not isinstance(budget, TokenBudget):
            raise ArgumentError("budget", given=repr(budget), expected="a TokenBudget", fix="pass TokenBudget(16384)")
        check_ranks(ranks)
        self.lengths = checked_lengths(lengths, budget.max_tokens)
        self.budget = budget
        self.ranks = ranks
        num = len(self.lengths)
        self.windows = Windows(num_samples=num, global_batch=global_batch, shuffle=shuffle, seed=seed, tail=tail)
        self._position = Position()

    @property
    def epoch(self) -> int:
        """The epoch that was begun last or, before it is begun, the next one."""
        return self._position.epoch

    def __len__(self) -> int:
        return self.windows.num_windows(self.epoch)

    def __iter__(self) -> Iterator[list[list[int]]]:
        at = self._position.begin()
        for micro_batches in self.micro_batches(at.epoch, at.first, ranks_now(self.ranks)):
            at.advance()
            yield micro_batches
        at.end()

    def micro_batches(self, epoch: int, first: int, ranks: Ranks) -> Iterator[list[list[int]]]:
        """A rank's micro-batches in each window of an epoch from the `first` on; moves no position."""
        for window in self.windows.shares(epoch, first, Ranks()):
            indices = np.array(window)
            packing = self.budget.pack(self.lengths[indices], world_size=ranks.world_size)
            yield [indices[part].tolist() for part in packing.micro_batches[ranks.rank]]

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration one over this epoch, from its start; a position loaded within it is kept."""
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position as plain values, the same on every rank: the windows that this sampler has handed out."""
        return self._position.state_dict(self.windows.identity())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration go on behind a saved position, of this or of another world size or budget.

        Raises:
            StateError: it belongs to another data set, or to other windows.
        """
        self._position.load_state_dict(state, self.windows.identity(), self.windows.num_windows)


class WindowLoader(ShareLoader):
    """Loads what a `WindowSampler` plans: each step of the loop is one window, an iterator of micro-batches.

    `step.window(window)` works it off; over several ranks, all of them call it, also those without a micro-batch. The
    position is the loader's own.

    Args:
        dataset: with `len()` and `dataset[index]`, of the samples whose lengths the sampler has.
        sampler: the plan.
        collate_fn: from a list of samples, a micro-batch; that of torch by default, which takes equal lengths only.
        device: as for `MacroBatchLoader`.
        **options: as for `MacroBatchLoader`.

    Raises:
        ArgumentError: an argument is out of its domain.

    ```pycon
    >>> dataset = [torch.arange(length) for length in (3, 8, 2, 5, 4)]
    >>> sampler = WindowSampler([len(sample) for sample in dataset], 4, TokenBudget(8))
    >>> for window in WindowLoader(dataset, sampler, collate_fn=torch.cat):
    ...     print([len(micro_batch) for micro_batch in window])
    [8, 5, 5]
    [4]

    ```
    """

    def __init__(
        self,
        dataset: Any,
        sampler: WindowSampler,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(sampler, WindowSampler):
            raise ArgumentError(
                "sampler", given=repr(sampler), expected="a WindowSampler", fix="build one from the lengths"
            )
        if num_batches(dataset) != len(sampler.lengths):
            raise ArgumentError(
                "dataset",
                given=f"{num_batches(dataset)} samples, for a sampler of {len(sampler.lengths)} lengths",
                expected="one length for each sample",
                fix="build the sampler with [len(sample) for sample in dataset]",
            )
        passed = checked_options(options, checked_device(device))
        super().__init__(
            _Planned(dataset, sampler, {"collate_fn": collate_fn, **passed}), ranks=sampler.ranks, device=device
        )

    def __iter__(self) -> Iterator[Iterator[Any]]:
        """One iterator of micro-batches per window. What is left of it when the next is asked for is passed over."""
        return self._windows(sys.maxsize)

    def micro_batches(self, micro_batch: int) -> Iterator[Iterator[Any]]:
        """Refused: the windows are cut already."""
        raise ArgumentError(
            "WindowLoader.micro_batches",
            given=repr(micro_batch),
            expected="no size: the sampler has cut the windows into micro-batches",
            fix="iterate over the loader itself",
        )


class _Planned(Indexed):
    """A data set whose windows are cut by a plan."""

    def __init__(self, dataset: Any, sampler: WindowSampler, options: dict[str, Any]) -> None:
        super().__init__(dataset, sampler.windows, options)
        self._sampler = sampler

    def cuts(self, epoch: int, first: int, size: int, ranks: Ranks) -> Iterator[list[list[int]]]:
        """The plan's."""
        return self._sampler.micro_batches(epoch, first, ranks)
