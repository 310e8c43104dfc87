"""Which samples a rank gets: batches of a sampler, or elements of a stream, shared out over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from macrobatch.errors import ArgumentError

__all__ = [
    "BatchSamplerShard",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "get_sampler",
]


class SeedableRandomSampler(RandomSampler):
    """Shuffles as a function of seed and epoch.

    Args:
        data_seed: the seed; by default, torch's initial one.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed = torch.random.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        generator: Any = self.generator
        self.generator = torch.Generator() if generator is None else generator
        self.generator.manual_seed(self.initial_seed + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.epoch = epoch


class BatchSamplerShard(BatchSampler):
    """One rank's batches of a batch sampler.

    Args:
        split_batches: each rank gets a part of every batch, instead of every `num_processes`-th batch.
        even_batches: samples of the first batches fill up the last ones, so that all ranks have as many full batches;
            otherwise ranks may have other numbers of batches, and of other sizes.

    ```pycon
    >>> batches = BatchSampler(range(5), 2, drop_last=False)
    >>> [list(BatchSamplerShard(batches, 2, rank)) for rank in range(2)]
    [[[0, 1], [4, 0]], [[2, 3], [1, 2]]]
    >>> [list(BatchSamplerShard(batches, 2, rank, even_batches=False)) for rank in range(2)]
    [[[0, 1], [4]], [[2, 3]]]

    ```
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size: Any = getattr(batch_sampler, "batch_size", None)
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        if split_batches and (self.batch_size is None or self.batch_size % num_processes):
            raise _indivisible(self.batch_size, num_processes)

    @property
    def num_at_once(self) -> int:
        """Batches that are yielded to all ranks at once."""
        return 1 if self.split_batches else self.num_processes

    @property
    def total_length(self) -> int:
        """Batches of all ranks together."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.batch_sampler), self.num_processes)
        if self.split_batches:
            return len(self.batch_sampler)
        if not rest or self.drop_last:
            return whole
        return whole + (self.even_batches or self.process_index < rest)

    def __iter__(self) -> Iterator[list[Any]]:
        return self._parts() if self.split_batches else self._whole()

    def _parts(self) -> Iterator[list[Any]]:
        size = self.batch_size // self.num_processes
        own = slice(size * self.process_index, size * (self.process_index + 1))
        first: list[Any] = []
        for batch in self.batch_sampler:
            first = first or list(batch)
            if len(batch) == self.batch_size:
                yield batch[own]
            elif not self.drop_last:
                missing = self.batch_size - len(batch) if self.even_batches else 0
                part = [*batch, *islice(cycle(first), missing)][own]
                if part:
                    yield part

    def _whole(self) -> Iterator[list[Any]]:
        batches = iter(self.batch_sampler)
        first: list[list[Any]] = []
        while group := list(islice(batches, self.num_processes)):
            first = first or group
            is_full = len(group) == self.num_processes and (
                self.batch_size is None or self.batch_size == len(group[-1])
            )
            if is_full:
                yield group[self.process_index]
            elif self.drop_last:
                return
            elif self.even_batches:
                yield self._filled(group, first)[self.process_index]
            elif self.process_index < len(group):
                yield group[self.process_index]

    def _filled(self, group: list[list[Any]], first: list[list[Any]]) -> list[list[Any]]:
        """The last batches, filled up with the first samples (or batches, if they have no size)."""
        if self.batch_size is None:
            return [*group, *islice(cycle(first), self.num_processes - len(group))]
        fillings = cycle(chain.from_iterable(first))
        samples = [*chain.from_iterable(group)]
        samples += islice(fillings, self.num_processes * self.batch_size - len(samples))
        return [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]


class IterableDatasetShard(IterableDataset[Any]):
    """One rank's elements of a stream: of every `num_processes * batch_size` of them, its own `batch_size`.

    Args:
        batch_size: of one rank or, with `split_batches`, of all together.
        drop_last: drop what is left at the end, instead of filling it up with the first elements.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        if split_batches and batch_size > 1 and batch_size % num_processes:
            raise _indivisible(batch_size, num_processes)
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    @property
    def num_at_once(self) -> int:
        """Batches that are yielded to all ranks at once."""
        return 1 if self.split_batches else self.num_processes

    def __len__(self) -> int:
        whole = len(self.dataset) / (self.batch_size * self.num_processes)
        return (math.floor(whole) if self.drop_last else math.ceil(whole)) * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if isinstance(generator, torch.Generator) and not hasattr(self.dataset, "set_epoch"):
            generator.manual_seed(self.epoch)
        together = self.batch_size if self.split_batches else self.batch_size * self.num_processes
        size = together // self.num_processes
        elements, first = iter(self.dataset), None
        while group := list(islice(elements, together)):
            first = group if first is None else first
            if len(group) < together and self.drop_last:
                return
            group = [*group, *islice(cycle(first), together - len(group))]
            yield from group[size * self.process_index : size * (self.process_index + 1)]


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first batches."""

    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batch_sampler), self.skip_batches, None)

    @property
    def total_length(self) -> int:
        """Batches with those that are skipped."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return max(len(self.batch_sampler) - self.skip_batches, 0)


def get_sampler(dataloader: Any) -> Any:
    """The sampler of a loader's indices, whatever is around it; None if its batches come from elsewhere."""
    innermost = _innermost(dataloader)
    return getattr(innermost, "sampler", innermost if dataloader.batch_sampler is None else None)


def set_sampler(dataloader: Any, new: Any) -> None:
    """Put another sampler of indices there."""
    innermost = _innermost(dataloader)
    if innermost is dataloader.sampler and not isinstance(innermost, BatchSampler):
        object.__setattr__(dataloader, "sampler", new)  # a loader without batches; it refuses to be changed
    else:
        innermost.sampler = new


def _innermost(dataloader: Any) -> Any:
    """The batch sampler inside all others or, without batches, the sampler."""
    sampler = dataloader.sampler if dataloader.batch_sampler is None else dataloader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return sampler


EXACT = (
    DistributedSampler,
    RandomSampler,
    SeedableRandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
"""Samplers whose length is what they yield."""


def certain_length(indices: Any) -> int | None:
    """How many batches there will be, if that is certain: the length of a custom sampler may be an estimate."""
    if getattr(indices, "split_batches", False) and not indices.even_batches:
        return None  # a rank may have no part of the last batch
    layer = indices
    while type(layer) in (BatchSamplerShard, SkipBatchSampler):
        layer = layer.batch_sampler
    layer = layer.sampler if type(layer) is BatchSampler else layer
    return len(indices) if isinstance(layer, list | range) or type(layer) in EXACT else None


def _indivisible(batch_size: Any, num_processes: int) -> ArgumentError:
    return ArgumentError(
        "split_batches",
        given=f"batches of {batch_size} for {num_processes} processes",
        expected="a batch size that the number of processes divides",
        fix=f"choose a multiple of {num_processes}, or split_batches=False",
    )
