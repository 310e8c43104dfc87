"""Loaders of macro-batches: each step of the loop is one window, and this rank's share of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from macrobatch.checks import check_integer
from macrobatch.core.window import Tail
from macrobatch.data.position import Position
from macrobatch.data.prefetch import on_device
from macrobatch.data.source import Indexed, Piece, Source, num_batches
from macrobatch.data.stream import Stream
from macrobatch.data.windows import Windows, check_ranks, ranks_now
from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class Options(TypedDict, total=False):
        """Options of torch's DataLoader that are passed on."""

        num_workers: int
        pin_memory: bool
        persistent_workers: bool
        prefetch_factor: int | None
        timeout: float
        worker_init_fn: Callable[[int], None] | None
        multiprocessing_context: Any
        generator: torch.Generator | None


__all__ = ["MacroBatchLoader", "ShareLoader", "checked_device", "checked_options"]


class ShareLoader:
    """This rank's share of each window that a source makes. `MacroBatchLoader` and `shard` build it.

    Each iteration is over the next epoch; the first one after `load_state_dict` goes on where the saved run stood.
    """

    def __init__(self, source: Source, *, ranks: Ranks | None, device: torch.device | str | None) -> None:
        check_ranks(ranks)
        self._source = source
        self._ranks = ranks
        self._device = checked_device(device)
        self._position = Position()
        self.on_error: Callable[[], object] = lambda: None
        """Called where a window could not be loaded, before the error is raised: other ranks may wait for it."""

    @property
    def epoch(self) -> int:
        """The epoch that was begun last or, before it is begun, the next one."""
        return self._position.epoch

    def __len__(self) -> int:
        """Number of windows of the epoch at hand.

        Raises:
            TypeError: the data have no length.
        """
        num = self._source.num_windows(self.epoch)
        if num is None:
            raise TypeError(f"{type(self).__name__} has no length: its data have none")
        return num

    def __iter__(self) -> Iterator[Any]:
        """One batch per window: this rank's share, or None if that is empty."""
        for share in self._windows(sys.maxsize):
            yield next(share, None)

    def micro_batches(self, micro_batch: int) -> Iterator[Iterator[Any]]:
        """As iterating, but each window's share comes as an iterator of micro-batches, loaded one by one.

        For shares that are too large to be collated in one piece: `step.window(micro_batches)` works them off. What is
        left of an iterator when the next one is asked for is passed over.

        Args:
            micro_batch: samples per micro-batch, an integer >= 1; the last one of a share takes what is left.

        ```pycon
        >>> loader = MacroBatchLoader(torch.arange(5), 4)
        >>> [[part.tolist() for part in share] for share in loader.micro_batches(3)]
        [[[0, 1, 2], [3]], [[4]]]

        ```
        """
        check_integer("micro_batch", micro_batch, "the samples in a micro-batch", fix="pass micro_batch=16")
        return self._windows(micro_batch)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration one over this epoch, from its start; a position loaded within it is kept.

        Needed only to repeat or to skip epochs, since each iteration moves on to the next by itself.
        """
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position as plain values: the epoch, and the windows of it that were handed out (not those that workers
        have loaded ahead). It is the same on every rank."""
        return self._position.state_dict(self._source.identity())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration go on behind a saved position, of this or of another world size.

        Raises:
            StateError: it belongs to another data set, or to other settings.
        """
        self._position.load_state_dict(state, self._source.identity(), self._source.num_windows)

    def _windows(self, size: int) -> Iterator[Iterator[Any]]:
        at = self._position.begin()
        pieces = self._source.pieces(at.epoch, at.first, size, ranks_now(self._ranks))
        pieces = on_device(pieces, self._device)
        while True:
            try:
                piece = next(pieces)
            except StopIteration:
                break
            except Exception:
                self.on_error()
                raise
            at.advance()
            share = _share(piece, pieces)
            del piece  # while the loop works on the share, it alone decides how long a micro-batch lives
            yield share
            for _ in share:
                pass
        at.end()


class MacroBatchLoader(ShareLoader):
    """Loads this rank's share of each macro-batch of a data set, as one batch.

    Equivalent plain loop over a data set with a length, on each of `world_size` ranks:

    ```python
    for window in order(epoch).split(global_batch):  # the same on every rank
        yield collate_fn([dataset[i] for i in window.tensor_split(world_size)[rank]])
    ```

    No sample comes twice and none is left out, whatever the number of ranks, and a window's samples do not depend on
    it. Of an `IterableDataset` each rank reads the same stream and keeps every world_size-th sample of a window.

    Args:
        dataset: with `len()` and `dataset[index]`; or an `IterableDataset` that yields the same single samples in the
            same order on every rank. If it has a `set_epoch`, that is called with each epoch.
        global_batch: samples of a full window over all ranks, an integer >= 1.
        ranks: this process among all; by default as in torch.distributed when an iteration begins.
        shuffle: a new order every epoch, by `seed` and epoch alone. A stream has to shuffle itself.
        seed: an integer >= 0, the same on every rank.
        tail: the samples that do not fill a window at the end of an epoch: "apply" makes them a short window, "drop"
            leaves them out, "carry" begins the next epoch's first window with them (not for a stream).
        collate_fn: from a list of samples, a batch; that of torch by default.
        device: where the batches' tensors go. Copies to a CUDA device run one batch ahead. None leaves them on the
            host.
        **options: `num_workers`, `pin_memory` (by default for a CUDA device), `persistent_workers`, `prefetch_factor`,
            `timeout`, `worker_init_fn`, `multiprocessing_context` and `generator` of torch's DataLoader. For a stream:
            one worker at most, which is started anew for every pass.

    Raises:
        ArgumentError: an argument is out of its domain.
        BatchError: while iterating: a stream has no window.

    Source:
        https://docs.pytorch.org/docs/stable/data.html

    ```pycon
    >>> ranks = [Ranks(rank=rank, world_size=2) for rank in range(2)]
    >>> loaders = [MacroBatchLoader(torch.arange(5), 3, ranks=each) for each in ranks]
    >>> [[batch.tolist() for batch in loader] for loader in loaders]
    [[[0, 1], [3]], [[2], [4]]]
    >>> loaders[0].epoch, len(loaders[0])
    (1, 2)

    ```
    """

    def __init__(
        self,
        dataset: Any,
        global_batch: int,
        *,
        ranks: Ranks | None = None,
        shuffle: bool = False,
        seed: int = 0,
        tail: Tail = "apply",
        collate_fn: Callable[[list[Any]], Any] | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[Options],
    ) -> None:
        passed = checked_options(options, checked_device(device))
        if collate_fn is not None and not callable(collate_fn):
            raise ArgumentError("collate_fn", given=repr(collate_fn), expected="a function or None", fix="leave it out")
        if isinstance(dataset, IterableDataset):
            _refuse_shuffle(shuffle)
            source: Source = Stream(dataset, global_batch, seed=seed, tail=tail, collate_fn=collate_fn, options=passed)
        else:
            num = _checked_length(dataset)
            windows = Windows(num_samples=num, global_batch=global_batch, shuffle=shuffle, seed=seed, tail=tail)
            source = Indexed(dataset, windows, {"collate_fn": collate_fn, **passed})
        super().__init__(source, ranks=ranks, device=device)


def _share(piece: Piece, rest: Iterator[Piece]) -> Iterator[Any]:
    """The micro-batches of one window, of which the first piece has been drawn."""
    held, is_last = [piece.batch], piece.is_last
    del piece
    while True:
        if held[0] is not None:
            yield held.pop()
        if is_last:
            return
        batch, is_last = next(rest)
        held = [batch]
        del batch


def checked_device(device: Any) -> torch.device | None:
    """The device that was asked for; None stays None.

    Raises:
        ArgumentError: it is not a device, or not one of this machine.
    """
    if device is None:
        return None
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(
            "device", given=repr(device), expected="a torch.device, its name, or None", fix='pass device="cuda"'
        ) from None
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", given=repr(checked), expected="a device of this machine", fix='pass device="cpu"')
    return checked


def checked_options(options: Mapping[str, Any], device: torch.device | None) -> dict[str, Any]:
    """What to pass on to torch's DataLoader.

    Raises:
        ArgumentError: an option that macrobatch decides.
    """
    fixes = {
        "batch_size": "pass global_batch, the samples of one update over all ranks",
        "batch_sampler": "pass DataLoader(dataset, batch_sampler=...) to macrobatch.data.shard",
        "sampler": "pass DataLoader(dataset, batch_size=..., sampler=...) to macrobatch.data.shard",
        "drop_last": 'pass tail="drop"',
        "in_order": "leave it out: a window's samples belong to that window",
    }
    for name in options.keys() & fixes.keys():
        raise ArgumentError(name, given=repr(options[name]), expected="nothing: macrobatch decides it", fix=fixes[name])
    num_workers = options.get("num_workers", 0)
    check_integer("num_workers", num_workers, "processes that load samples", fix="pass num_workers=4", at_least=0)
    return {"pin_memory": device is not None and device.type == "cuda", **options}


def _refuse_shuffle(shuffle: object) -> None:
    if shuffle is not False:
        raise ArgumentError(
            "shuffle",
            given=f"{shuffle!r} for an IterableDataset",
            expected="False: a stream has no order that could be drawn",
            fix="shuffle in the data set, by a seed that is the same on every rank",
        )


def _checked_length(dataset: Any) -> int:
    num = num_batches(dataset)
    is_usable = hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping | type)
    if isinstance(dataset, DataLoader | ShareLoader) or num is None or not is_usable:
        raise ArgumentError(
            "dataset",
            given=type(dataset).__name__,
            expected="a data set with len() and dataset[index], or an IterableDataset",
            fix="pass macrobatch.data.shard(loader) for a DataLoader, one split of a mapping of splits, "
            "and an IterableDataset whose __iter__ makes the generator for a generator",
        )
    if num < 1:
        raise ArgumentError("dataset", given="no samples", expected="at least one", fix="check how it is filled")
    return num
