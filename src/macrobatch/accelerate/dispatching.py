"""A loader that rank 0 reads, for all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch.distributed as dist

from macrobatch.accelerate.loading import DataLoaderShard, DataLoaderStateMixin, marked
from macrobatch.accelerate.state import PartialState
from macrobatch.accelerate.utils.operations import (
    concatenate,
    ignorant_find_batch_size,
    send_to_device,
    slice_tensors,
)
from macrobatch.errors import PeerError

__all__ = ["DataLoaderDispatcher"]


class DataLoaderDispatcher(DataLoaderShard):
    """Rank 0 reads, and every rank gets its rows: for streams, and for data that only one rank can see. An error there
    reaches the others as a `PeerError`.

    Args:
        split_batches: each batch is split over the ranks; otherwise, one batch for each rank is read and split.
        slice_fn: `(batch, slice, process_index=, num_processes=)` to cut rows out of a batch.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Any = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dataset,
            skip_batches=skip_batches,
            use_stateful_dataloader=use_stateful_dataloader,
            _drop_last=_drop_last,
            _non_blocking=_non_blocking,
            torch_device_mesh=torch_device_mesh,
            iteration=iteration,
            **kwargs,
        )
        self.split_batches = split_batches
        self.slice_fn = slice_tensors if slice_fn is None else slice_fn
        self.state = PartialState()

    def __len__(self) -> int:
        whole = super().__len__()
        if self.split_batches:
            return whole
        return whole // self.state.num_processes if self.drops_last else -(-whole // self.state.num_processes)

    @property
    def total_batch_size(self) -> int:
        """Samples of one batch of all ranks together."""
        return (self.batch_size or 1) * self.num_at_once

    @property
    def num_at_once(self) -> int:
        """Batches of the sampler, or of the stream, that are yielded to all ranks at once."""
        return 1 if self.split_batches else self.state.num_processes

    def begin(self) -> None:
        """An epoch begins."""
        DataLoaderStateMixin.begin(self)

    def _epoch(self) -> Iterator[Any]:
        shares = self._shares() if self.state.process_index == 0 else None
        position = self.position
        position.num_batches, position.num_together = self.num_skipped_here, self.num_skipped
        while True:
            received = self._scattered(shares)
            if received is None:
                return
            share, is_last, num_rows = received
            batch = share if self.device is None else send_to_device(share, self.device, self.non_blocking)
            self.end_of_dataloader = position.is_at_end = is_last
            if is_last:
                self.remainder = num_rows
            position.num_batches += 1
            position.num_together += self.num_at_once
            self.gradient_state._yielded(self, ignorant_find_batch_size(batch) or 1)  # pyright: ignore[reportPrivateUsage]
            yield batch
            if is_last:
                return

    def _scattered(self, shares: Iterator[list[Any]] | None) -> Any:
        """This rank's of what rank 0 reads for each, None at the end."""
        num_ranks = self.state.num_processes
        received: list[Any] = [None]
        if shares is None:
            dist.scatter_object_list(received, None, 0)
            if isinstance(received[0], str):
                raise PeerError(
                    "a dispatched batch",
                    given=f"on rank 0, {received[0]:.300}",
                    expected="rank 0 to read for all",
                    fix="see what that says",
                )
            return received[0]
        try:
            everyones = next(shares, [None] * num_ranks)
            if num_ranks == 1:
                return everyones[0]
            dist.scatter_object_list(received, everyones, 0)  # nothing has left if it cannot be pickled
        except Exception as error:
            if num_ranks > 1:
                dist.scatter_object_list([None], [f"{type(error).__name__}: {error}"] * num_ranks, 0)
            raise
        return received[0]

    def _shares(self) -> Iterator[list[Any]]:
        """On rank 0: for each batch of all ranks together, what every rank gets of it."""
        num_ranks = self.state.num_processes
        batches, _ = self._batches(0)
        head = list(islice(batches, self.num_at_once))
        if not head:
            return
        first = self._cut(_joined(head), slice(0, num_ranks))
        rest = islice(chain(head, batches), self.num_skipped, None)
        for batch, is_last in marked(self._together(rest), None):
            num_rows = ignorant_find_batch_size(batch) or 0
            missing = 0 if self.drops_last else -num_rows % num_ranks
            if missing:
                batch = concatenate([batch, *[first] * -(-missing // max(ignorant_find_batch_size(first) or 1, 1))])
            size = (num_rows + missing) // num_ranks
            yield [
                (self._cut(batch, slice(rank * size, (rank + 1) * size), rank), is_last, num_rows)
                for rank in range(num_ranks)
            ]

    def _cut(self, batch: Any, rows: slice, rank: int = 0) -> Any:
        return self.slice_fn(batch, rows, process_index=rank, num_processes=self.state.num_processes)

    def _together(self, batches: Iterator[Any]) -> Iterator[Any]:
        while group := list(islice(batches, self.num_at_once)):
            if len(group) < self.num_at_once and self.drops_last:
                return
            yield _joined(group)


def _joined(group: list[Any]) -> Any:
    return group[0] if len(group) == 1 else concatenate(group)
