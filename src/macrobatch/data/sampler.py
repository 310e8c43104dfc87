"""A batch sampler for torch's own DataLoader: this rank's share of every window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Sampler

from macrobatch.core.window import Tail
from macrobatch.data.position import Position
from macrobatch.data.windows import Windows, check_ranks, ranks_now
from macrobatch.ranks import Ranks

__all__ = ["MacroBatchSampler"]


class MacroBatchSampler(Sampler[list[int]]):
    """Cuts one order of all samples, the same on every rank, into windows, and these into one share per rank.

    Over ranks the shares of a window add up to the window: no sample comes twice and none is left out, for any number
    of ranks. The windows do not depend on that number. Equivalent plain loop for the ranks together, with
    `tail="apply"`:

    ```python
    order = torch.randperm(num_samples, generator=g) if shuffle else torch.arange(num_samples)
    for window in order.split(global_batch):
        yield window.tensor_split(world_size)[rank].tolist()
    ```

    A share is empty if its window has fewer samples than there are ranks; the collate functions of torch do not take
    an empty list, so use `MacroBatchLoader` there. Each iteration is over the next epoch. `len()` is the number of
    windows of the epoch at hand.

    Args:
        num_samples: length of the data set, an integer >= 1.
        global_batch: samples of a full window over all ranks, an integer >= 1; it may exceed the data set, which is
            then one short window.
        ranks: this process among all; by default as in torch.distributed when an iteration begins.
        shuffle: a new order every epoch, by `seed` and epoch alone.
        seed: an integer >= 0, the same on every rank.
        tail: the samples that do not fill a window at the end of an epoch: "apply" makes them a short window, "drop"
            leaves them out, "carry" begins the next epoch's first window with them (which may then hold a sample
            twice, once from either epoch).

    Raises:
        ArgumentError: an argument is out of its domain.

    Source:
        Unlike https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.distributed.DistributedSampler, which
        repeats samples or drops them until every rank has as many.

    ```pycon
    >>> [list(MacroBatchSampler(5, 3, ranks=Ranks(rank=rank, world_size=2))) for rank in range(2)]
    [[[0, 1], [3]], [[2], [4]]]

    ```
    """

    def __init__(
        self,
        num_samples: int,
        global_batch: int,
        *,
        ranks: Ranks | None = None,
        shuffle: bool = False,
        seed: int = 0,
        tail: Tail = "apply",
    ) -> None:
        self._windows = Windows(
            num_samples=num_samples, global_batch=global_batch, shuffle=shuffle, seed=seed, tail=tail
        )
        check_ranks(ranks)
        self._ranks = ranks
        self._position = Position()

    @property
    def epoch(self) -> int:
        """The epoch that was begun last or, before it is begun, the next one."""
        return self._position.epoch

    def __len__(self) -> int:
        return self._windows.num_windows(self.epoch)

    def __iter__(self) -> Iterator[list[int]]:
        at = self._position.begin()
        for indices in self._windows.shares(at.epoch, at.first, ranks_now(self._ranks)):
            at.advance()
            yield indices
        at.end()

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration one over this epoch, from its start; a position loaded within it is kept."""
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position as plain values: what this sampler has handed out, which a DataLoader with workers asks for
        ahead of its time. `MacroBatchLoader` counts what reached the training loop."""
        return self._position.state_dict(self._windows.identity())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration go on behind a saved position, of this or of another world size.

        Raises:
            StateError: it belongs to another data set, or to other settings.
        """
        self._position.load_state_dict(state, self._windows.identity(), self._windows.num_windows)
