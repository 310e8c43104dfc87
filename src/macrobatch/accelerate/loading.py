"""A loader of one rank's batches, which knows when it is at its end and how to go on after a restart."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from macrobatch.accelerate.gradient_state import GradientState
from macrobatch.accelerate.position import Position, check_state
from macrobatch.accelerate.sampling import (
    EXACT,
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    certain_length,
    get_sampler,
    set_sampler,
)
from macrobatch.accelerate.utils.absent import refuse_absent
from macrobatch.accelerate.utils.operations import ignorant_find_batch_size, send_to_device
from macrobatch.accelerate.utils.random import synchronize_rng_states
from macrobatch.data.lookahead import lookahead

__all__ = ["OPTIONS", "DataLoaderShard", "DataLoaderStateMixin", "SkipDataLoader", "marked"]

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

    If the length is known, so is the last batch, and none is read ahead unless `reads_ahead` is set; otherwise each
    batch is held until the next one is there.

    Args:
        device: where batches go; None leaves them.
        rng_types: generators that all ranks take over from rank 0 when an epoch begins.
        skip_batches: how many to leave out at the beginning of an epoch.
        use_stateful_dataloader: after `load_state_dict`, the next iteration leaves out what was seen; without it,
            `skip_first_batches` does.
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
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        refuse_absent(torch_device_mesh=torch_device_mesh)
        super().__init__(dataset, **kwargs)
        self.device = device
        self.rng_types = rng_types
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.num_skipped_together: int | None = None
        self.resumes = use_stateful_dataloader
        self._num_seen: int | None = None
        self.gradient_state = GradientState()
        self.position = Position()
        self.position.epoch = iteration
        self.drops_last = _drop_last
        self.non_blocking = _non_blocking
        self.reads_ahead = False
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
        shares: Any = self.dataset if isinstance(self.dataset, IterableDatasetShard) else self.batches_of_indices
        size = getattr(shares, "batch_size", None) or self.batch_size or 1
        return size * self.num_at_once if shares is self.dataset else size * getattr(shares, "num_at_once", 1)

    @property
    def total_dataset_length(self) -> int:
        """Samples of all ranks together."""
        dataset: Any = self.dataset
        return len(dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset)

    @property
    def batches_of_indices(self) -> Any:
        """What yields the indices of a batch, or of an element where there are no batches; None for a stream."""
        if isinstance(self.dataset, IterableDataset):
            return None
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    @property
    def num_at_once(self) -> int:
        """Batches of the sampler, or of the stream, that are yielded to all ranks at once."""
        shares = self.dataset if isinstance(self.dataset, IterableDatasetShard) else self.batches_of_indices
        return getattr(shares, "num_at_once", 1)

    def begin(self) -> None:
        """An epoch begins."""
        super().begin()
        if not self.drops_last and self.batch_size_of_indices:
            with suppress(TypeError):  # a stream without a length
                self.remainder = self._num_samples % self.total_batch_size

    @property
    def _num_samples(self) -> int:
        """Samples of an epoch of all ranks together: those of the sampler, which may leave some of the data out."""
        sampler = get_sampler(self)
        return len(sampler) if type(sampler) in EXACT else self.total_dataset_length

    @property
    def batch_size_of_indices(self) -> int | None:
        """Samples of one of the sampler's batches, if they are all of one size."""
        return getattr(self.batches_of_indices, "batch_size", None) or self.batch_size

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        position = self.position
        if position.is_restored and position.is_at_end and self.num_skipped < position.num_together:
            self._finish()
        self.set_epoch(self.iteration)
        self.begin()
        try:
            yield from self._epoch()
            self._advance()
            self.gradient_state._exhausted(self)  # pyright: ignore[reportPrivateUsage]
        finally:
            self._num_seen = None
            self.end()

    def _advance(self) -> None:
        position = self.position
        position.epoch += 1
        position.num_batches = position.num_together = 0
        position.is_restored = position.is_at_end = False

    def _finish(self) -> None:
        """Of an epoch that was restored after its last batch: draw what it drew, so that the next one is next."""
        if self.batches_of_indices is not None:
            self._drawn()
        self._advance()

    def _epoch(self) -> Iterator[Any]:
        position = self.position
        batches, total = self._batches(self.num_skipped)
        position.num_batches, position.num_together = self.num_skipped_here, self.num_skipped
        state, num_at_once = self.gradient_state, self.num_at_once
        device = self.device if torch.accelerator.is_available() else None  # else there is no other device to leave
        for batch, is_last in marked(batches, None if self.reads_ahead else total):
            moved = batch if device is None else send_to_device(batch, device, self.non_blocking)
            self.end_of_dataloader = position.is_at_end = is_last
            position.num_batches += 1
            position.num_together += num_at_once
            state._yielded(self, ignorant_find_batch_size(moved) or 1)  # pyright: ignore[reportPrivateUsage]
            yield moved

    @property
    def num_skipped(self) -> int:
        """Batches of the sampler that are left out, for all ranks together."""
        if self.num_skipped_together is not None:
            return self.num_skipped_together
        return self.skip_batches * self.num_at_once if self._num_seen is None else self._num_seen

    @property
    def num_skipped_here(self) -> int:
        """Batches that are left out, of this rank."""
        return -(-self.num_skipped // self.num_at_once)

    def _batches(self, num_skipped: int) -> tuple[Iterator[Any], int | None]:
        """The epoch's batches without the first, and how many there are, if that is known."""
        indices = self.batches_of_indices
        if self.position.is_restored and indices is not None:
            return self._rest(self._drawn(), num_skipped)
        if not self.position.is_restored:
            self.position.start = {"torch": torch.get_rng_state(), "generator": self._generator_state()}
        num_own = -(-num_skipped // self.num_at_once)
        if not num_own or indices is None:
            return islice(super().__iter__(), num_own, None), certain_length(indices)
        rest = SkipBatchSampler(indices, num_own)
        return iter(self._loader_of(rest)), certain_length(rest)

    def _rest(self, base: list[Any], num_skipped: int) -> tuple[Iterator[Any], int]:
        """A restored epoch's batches without the first: those that an uninterrupted one has, on as many ranks."""
        indices = self.batches_of_indices
        if isinstance(indices, BatchSamplerShard):
            whole, rest = divmod(num_skipped, self.num_at_once)
            own = copy.copy(indices)
            own.batch_sampler = base[num_skipped:] if rest else base
            batches = list(own)[0 if rest else whole :]
        else:
            batches = base[num_skipped:]
        if self.remainder >= 0:
            self.remainder = sum(map(len, base[num_skipped:])) % self.total_batch_size
        with torch.random.fork_rng(devices=[]):  # the seed of its workers has been drawn before
            own_state = None if self.generator is None else self.generator.get_state()
            iterator = iter(self._loader_of(batches))
            if self.generator is not None and own_state is not None:
                self.generator.set_state(own_state)
        return iterator, len(batches)

    def _loader_of(self, batches: Any) -> DataLoader[Any]:
        """A plain loader like this one, of other batches of indices."""
        options: dict[str, Any] = {name: getattr(self, name) for name in OPTIONS if name != "persistent_workers"}
        if self.batch_sampler is None:
            return DataLoader(self.dataset, sampler=batches, batch_size=None, **options)
        return DataLoader(self.dataset, batch_sampler=batches, **options)

    def _drawn(self) -> list[Any]:
        """All batches of indices of the restored epoch, for all ranks."""
        indices = self.batches_of_indices
        with self._as_at_the_start():
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # what a loader draws for its workers
            return list(indices.batch_sampler if isinstance(indices, BatchSamplerShard) else indices)

    def _generator_state(self) -> Tensor | None:
        """State of the sampler's own generator, if its order depends on that."""
        sampler = get_sampler(self)
        generator = None if isinstance(sampler, SeedableRandomSampler) else getattr(sampler, "generator", None)
        return generator.get_state() if isinstance(generator, torch.Generator) else None

    @contextmanager
    def _as_at_the_start(self) -> Generator[None]:
        """Context with the generators as they were when the restored epoch began. The sampler's own stays where it is
        when the order has been drawn: samplers draw at the end of an epoch, too."""
        start, sampler = self.position.start, get_sampler(self)
        assert start is not None
        own: Any = getattr(sampler, "generator", None)
        is_own = self._generator_state() is not None
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(start["torch"])
            if is_own and start["generator"] is not None:
                own.set_state(start["generator"])
            elif is_own:
                sampler.generator = None
            try:
                yield
            finally:
                if is_own:
                    sampler.generator = own

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.iteration = epoch
        sampler = get_sampler(self)
        layers = [sampler, self.batches_of_indices]
        while (inner := getattr(layers[-1], "batch_sampler", None)) is not None:
            layers.append(inner)
        for each in layers:
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)
        if not hasattr(sampler, "set_epoch") and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]

    def get_sampler(self) -> Any:
        """The sampler of indices."""
        return get_sampler(self)

    def set_sampler(self, sampler: Any) -> None:
        """Another sampler of indices."""
        set_sampler(self, sampler)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position in it, the random state that its order came from, and the one that the next will."""
        return {
            "epoch": self.position.epoch,
            "num_batches": self.position.num_batches,
            "num_batches_together": self.position.num_together,
            "start": self.position.start,
            "generator": self._generator_state(),
            "initial_seed": getattr(get_sampler(self), "initial_seed", None),
            "is_at_end": self.position.is_at_end,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The next iteration is of the saved epoch, in its order; what was seen is left out by `skip_first_batches` or,
        with `use_stateful_dataloader`, by itself.

        Raises:
            StateError: it is not a loader's state.
        """
        check_state(state_dict)
        position, sampler = self.position, get_sampler(self)
        position.epoch, position.start = state_dict["epoch"], state_dict["start"]
        position.num_batches, position.num_together = state_dict["num_batches"], state_dict["num_batches_together"]
        position.is_restored, position.is_at_end = position.num_batches > 0, state_dict["is_at_end"]
        self._num_seen = position.num_together if self.resumes and not position.is_at_end else None
        if isinstance(sampler, SeedableRandomSampler) and state_dict["initial_seed"] is not None:
            sampler.initial_seed = state_dict["initial_seed"]
        elif hasattr(sampler, "generator") and state_dict["generator"] is not None:
            sampler.generator = sampler.generator or torch.Generator()
            sampler.generator.set_state(state_dict["generator"])


class SkipDataLoader(DataLoaderShard):
    """A loader without the first batches of its epoch; the one that it was made from counts on with it."""

    def __init__(
        self, dataset: Any, skip_batches: int = 0, use_stateful_dataloader: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dataset, skip_batches=skip_batches, **kwargs)

    def __len__(self) -> int:
        indices = self.batches_of_indices
        if isinstance(indices, BatchSamplerShard) and self.num_skipped % self.num_at_once:
            rest = copy.copy(indices)
            rest.batch_sampler = range(self.num_skipped, len(indices.batch_sampler))
            return len(rest)
        return max(super().__len__() - self.skip_batches, 0)


def marked(batches: Iterator[Any], total: int | None) -> Iterator[tuple[Any, bool]]:
    """Each batch with whether it is the last: by counting or, if their number is not known, by looking one ahead."""
    if total is not None:
        for index, batch in enumerate(batches, start=1):
            yield batch, index == total
    else:
        yield from lookahead(batches)
