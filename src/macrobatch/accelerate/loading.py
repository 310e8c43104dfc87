"""A loader of one rank's batches, which knows when it is at its end and how to go on after a restart."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from macrobatch.accelerate.gradient_state import GradientState
from macrobatch.accelerate.sampling import (
    BatchSamplerShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    get_sampler,
    set_sampler,
)
from macrobatch.accelerate.utils.operations import ignorant_find_batch_size, send_to_device
from macrobatch.accelerate.utils.random import synchronize_rng_states
from macrobatch.errors import StateError

__all__ = ["OPTIONS", "DataLoaderShard", "DataLoaderStateMixin", "Position", "SkipDataLoader", "marked"]

OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


class Position:
    """Where a loader is: in which epoch, after how many batches, and from which random state the epoch's order came."""

    def __init__(self) -> None:
        self.epoch = 0
        self.num_batches = 0
        """Batches of this rank that the epoch has yielded."""
        self.start: dict[str, Any] | None = None
        self.is_restored = False
        self.num_restored = 0
        """Batches of all ranks together that were yielded before."""


class DataLoaderStateMixin:
    """What a loader tells the `GradientState` of."""

    end_of_dataloader = False
    remainder = -1
    gradient_state: GradientState

    def reset(self) -> None:
        """Nothing is known of the last batch."""
        self.end_of_dataloader = False
        self.remainder = -1

    def begin(self) -> None:
        """An epoch begins."""
        self.reset()
        self.gradient_state._add_dataloader(self)  # pyright: ignore[reportPrivateUsage]

    def end(self) -> None:
        """An epoch is over, or was left."""
        self.gradient_state._remove_dataloader(self)  # pyright: ignore[reportPrivateUsage]


class DataLoaderShard(DataLoaderStateMixin, DataLoader[Any]):
    """A loader of one rank's batches, on its device.

    If the length is known, so is the last batch, and none is read ahead; otherwise each batch is held until the next
    one is there.

    Args:
        device: where batches go; None leaves them.
        rng_types: generators that all ranks take over from rank 0 when an epoch begins.
        skip_batches: how many to leave out at the beginning of an epoch.
        kwargs: as for `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        device: Any = None,
        rng_types: Any = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.device = device
        self.rng_types = rng_types
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()
        self.position = Position()
        self.position.epoch = iteration
        self.drops_last = _drop_last
        self.non_blocking = _non_blocking
        self._is_accelerate_prepared = True

    @property
    def iteration(self) -> int:
        """The epoch, counted from 0."""
        return self.position.epoch

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self.position.epoch = iteration

    @property
    def base_dataloader(self) -> DataLoader[Any]:
        """The loader itself."""
        return self

    @property
    def total_batch_size(self) -> int:
        """Samples of one batch of all ranks together."""
        sampler: Any = self.batches_of_indices
        size: Any = sampler.batch_size if sampler is not None else self.batch_size
        split = sampler is None or getattr(sampler, "split_batches", False)
        return size if split else size * getattr(sampler, "num_processes", 1)

    @property
    def total_dataset_length(self) -> int:
        """Samples of all ranks together."""
        return getattr(self.dataset, "total_length", None) or len(self.dataset)  # pyright: ignore[reportArgumentType]

    @property
    def batches_of_indices(self) -> Any:
        return self.sampler if isinstance(self.sampler, BatchSampler) else self.batch_sampler

    def begin(self) -> None:
        """An epoch begins."""
        super().begin()
        sampler = self.batches_of_indices
        if not self.drops_last and getattr(sampler, "batch_size", None) and hasattr(self.dataset, "__len__"):
            self.remainder = self.total_dataset_length % self.total_batch_size

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        self.set_epoch(self.iteration)
        self.begin()
        try:
            yield from self._epoch()
            self.position.epoch += 1
            self.position.num_batches = 0
            self.position.is_restored = False
        finally:
            self.end()

    def _epoch(self) -> Iterator[Any]:
        position = self.position
        batches, total = self._resumed() if position.is_restored else self._fresh()
        position.num_batches = self.skip_batches
        state = self.gradient_state
        for batch, is_last in marked(batches, total):
            moved = batch if self.device is None else send_to_device(batch, self.device, self.non_blocking)
            self.end_of_dataloader = is_last
            position.num_batches += 1
            state._yielded(self, ignorant_find_batch_size(moved) or 1)  # pyright: ignore[reportPrivateUsage]
            yield moved

    def _fresh(self) -> tuple[Iterator[Any], int | None]:
        """This epoch's batches, in an order that is drawn now, and how many there are, if that is known."""
        sampler = get_sampler(self)
        generator = getattr(sampler, "generator", None)
        self.position.start = {
            "torch": torch.get_rng_state(),
            "generator": None if generator is None else generator.get_state(),
            "initial_seed": getattr(sampler, "initial_seed", None),
        }
        batches = super().__iter__()
        if isinstance(self.dataset, IterableDataset):
            return islice(batches, self.skip_batches, None), None
        return islice(batches, self.skip_batches, None), max(len(self) - self.skip_batches, 0)

    def _resumed(self) -> tuple[Iterator[Any], int | None]:
        """The rest of a restored epoch, in the order that was drawn when it began."""
        if isinstance(self.dataset, IterableDataset) or self.batches_of_indices is None:
            return self._fresh()
        whole: Any = self.batches_of_indices
        while isinstance(whole, SkipBatchSampler):
            whole = whole.batch_sampler
        with self._as_at_the_start():
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # what a loader draws for its workers
            base = list(whole.batch_sampler if isinstance(whole, BatchSamplerShard) else whole)
        if isinstance(whole, BatchSamplerShard):
            together = 1 if whole.split_batches else whole.num_processes
            shard = copy.copy(whole)
            shard.batch_sampler = _Listed(base[self._num_skipped(together) :], whole.batch_size, whole.drop_last)
            rest = list(shard)
        else:
            rest = base[self._num_skipped(1) :]
        options = {name: getattr(self, name) for name in OPTIONS if name != "persistent_workers"}
        loader: DataLoader[Any] = DataLoader(self.dataset, batch_sampler=rest, **options)
        with self._as_at_the_start():
            return iter(loader), len(rest)

    def _num_skipped(self, num_together: int) -> int:
        """Batches of all ranks together that come before the rest."""
        return self.skip_batches * num_together

    @contextmanager
    def _as_at_the_start(self) -> Generator[None]:
        """Context with the generators as they were when the restored epoch began."""
        start, sampler = self.position.start, get_sampler(self)
        now = torch.get_rng_state()
        own = getattr(sampler, "generator", None)
        assert start is not None
        torch.set_rng_state(start["torch"])
        if isinstance(sampler, SeedableRandomSampler):
            sampler.set_epoch(self.iteration)
        elif isinstance(sampler, RandomSampler):
            sampler.generator = None
            if start["generator"] is not None:
                sampler.generator = torch.Generator() if own is None else own
                sampler.generator.set_state(start["generator"])
        try:
            yield
        finally:
            torch.set_rng_state(now)
            if isinstance(sampler, RandomSampler) and not isinstance(sampler, SeedableRandomSampler):
                sampler.generator = own if start["generator"] is None else sampler.generator

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.iteration = epoch
        sampler = get_sampler(self)
        for each in (self.batch_sampler, sampler):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        if not hasattr(sampler, "set_epoch") and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]

    def get_sampler(self) -> Any:
        """The sampler of indices."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Another sampler of indices."""
        set_sampler(self, sampler)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position in it, and the random state that its order came from."""
        sampler: Any = self.batches_of_indices
        together = 1 if getattr(sampler, "split_batches", False) else getattr(sampler, "num_processes", 1)
        return {
            "epoch": self.position.epoch,
            "num_batches": self.position.num_batches,
            "num_batches_together": self.position.num_batches * together,
            "start": self.position.start,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The next iteration is of the saved epoch, in its order; `skip_first_batches` leaves out what was seen.

        Raises:
            StateError: it is not a loader's state.
        """
        expected = {"epoch", "num_batches", "num_batches_together", "start"}
        if not isinstance(state_dict, Mapping) or set(state_dict) != expected:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StateError(
                "a loader's load_state_dict",
                given=f"{state_dict!r:.100}",
                expected=f"the keys {sorted(expected)}",
                fix="pass what state_dict returned",
            )
        position = self.position
        position.epoch, position.start = state_dict["epoch"], state_dict["start"]
        position.is_restored = state_dict["start"] is not None and state_dict["num_batches"] > 0
        position.num_restored = state_dict["num_batches_together"]
        sampler = get_sampler(self)
        start = state_dict["start"]
        if start is not None and isinstance(sampler, SeedableRandomSampler):
            sampler.initial_seed = start["initial_seed"]
        elif (
            start is not None
            and not position.is_restored
            and start["generator"] is not None
            and hasattr(sampler, "generator")
        ):
            sampler.generator = sampler.generator or torch.Generator()


class SkipDataLoader(DataLoaderShard):
    """A loader without the first batches of its epoch; the one that it was made from counts on with it."""

    def __init__(self, dataset: Any, skip_batches: int = 0, **kwargs: Any) -> None:
        super().__init__(dataset, skip_batches=skip_batches, **kwargs)
        self.num_skipped_together: int | None = None

    def __len__(self) -> int:
        return max(super().__len__() - self.skip_batches, 0)

    def _fresh(self) -> tuple[Iterator[Any], int | None]:
        batches, total = super()._fresh()
        return batches, None if total is None else len(self)

    def _num_skipped(self, num_together: int) -> int:
        if self.num_skipped_together is None:
            return super()._num_skipped(num_together)
        return self.num_skipped_together


def marked(batches: Iterator[Any], total: int | None) -> Iterator[tuple[Any, bool]]:
    """Each batch with whether it is the last: by counting or, if their number is not known, by looking one ahead."""
    if total is not None:
        for index, batch in enumerate(batches, start=1):
            yield batch, index == total
        return
    try:
        current = next(batches)
    except StopIteration:
        return
    for following in batches:
        yield current, False
        current = following
    yield current, True


class _Listed:
    """Batches that are known already, as a batch sampler."""

    def __init__(self, batches: list[Any], batch_size: Any, drop_last: bool) -> None:
        self.batches, self.batch_size, self.drop_last = batches, batch_size, drop_last

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
