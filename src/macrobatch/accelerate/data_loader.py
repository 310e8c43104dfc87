"""Preparing loaders: which of the classes beside this module a loader becomes, and leaving out what was seen."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from macrobatch.accelerate.dispatching import DataLoaderDispatcher
from macrobatch.accelerate.loading import OPTIONS, DataLoaderShard, DataLoaderStateMixin, SkipDataLoader
from macrobatch.accelerate.sampling import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    get_sampler,
    set_sampler,
)
from macrobatch.accelerate.state import PartialState
from macrobatch.errors import ArgumentError

__all__ = [
    "BatchSamplerShard",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "DataLoaderStateMixin",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "SkipDataLoader",
    "get_sampler",
    "prepare_data_loader",
    "skip_first_batches",
]


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: Any = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: Any = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Any = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
) -> DataLoader[Any]:
    """A loader of one rank's share of what a loader has.

    Args:
        dispatch_batches: rank 0 reads for all; by default, for an `IterableDataset` that goes on a device.
        use_stateful_dataloader: after `load_state_dict`, the next iteration leaves out what was seen.

    Raises:
        ArgumentError: batches cannot be split evenly, or are to be dispatched to nowhere.
    """
    state = PartialState()
    num_ranks = int(state.num_processes if num_processes is None else num_processes)
    rank = int(state.process_index if process_index is None else process_index)
    is_stream = isinstance(dataloader.dataset, IterableDataset)
    dispatches = (put_on_device and is_stream) if dispatch_batches is None else dispatch_batches
    if dispatches and not put_on_device:
        raise ArgumentError(
            "dispatch_batches", given=True, expected="batches that go on a device", fix="pass put_on_device=True"
        )
    if split_batches:
        _check_divisible(dataloader, num_ranks)
    options: dict[str, Any] = {name: getattr(dataloader, name) for name in OPTIONS} | {
        "device": device if put_on_device else None,
        "_drop_last": dataloader.drop_last,
        "_non_blocking": non_blocking,
        "use_stateful_dataloader": use_stateful_dataloader,
        "torch_device_mesh": torch_device_mesh,
    }
    if use_seedable_sampler and isinstance(get_sampler(dataloader), RandomSampler):
        _seed(dataloader, data_seed)
    dataset: Any = dataloader.dataset
    if dispatches and num_ranks > 1:
        options |= {"split_batches": split_batches, "slice_fn": slice_fn_for_dispatch}
        options |= _indices_of(dataloader)
        return DataLoaderDispatcher(dataset, **options)
    generator = None
    if is_stream:
        if num_ranks > 1:
            generator = getattr(dataset, "generator", None)
            dataset = IterableDatasetShard(
                dataset, dataloader.batch_size or 1, dataloader.drop_last, num_ranks, rank, split_batches
            )
        own = (dataloader.batch_size or 1) // num_ranks if split_batches else dataloader.batch_size
        options |= {"batch_size": own, "drop_last": dataloader.drop_last}
    else:
        options |= _indices_of(dataloader)
        if num_ranks > 1:
            generator = _shared_generator(get_sampler(dataloader))
            name = "sampler" if dataloader.batch_sampler is None else "batch_sampler"
            options[name] = BatchSamplerShard(options[name], num_ranks, rank, split_batches, even_batches)
    kinds = [str(getattr(kind, "value", kind)) for kind in rng_types or ()]
    kinds = [kind for kind in kinds if kind != "generator" or generator is not None]
    return DataLoaderShard(dataset, rng_types=kinds, synchronized_generator=generator, **options)


def skip_first_batches(dataloader: DataLoader[Any], num_batches: int | None = None) -> DataLoader[Any]:
    """A loader without the first batches of its next epoch.

    Args:
        num_batches: of this rank. By default, of a loader that was restored: all that were yielded before, on however
            many ranks; of another: none.
    """
    is_whole = hasattr(num_batches, "__index__") and not isinstance(num_batches, bool)
    if num_batches is not None and (not is_whole or num_batches < 0):
        raise ArgumentError(
            "num_batches", given=repr(num_batches), expected="an integer >= 0", fix="pass how many were seen"
        )
    if not isinstance(dataloader, DataLoaderShard):
        return _skipping(dataloader, int(num_batches or 0))
    if isinstance(dataloader, DataLoaderDispatcher):
        skipping = copy.copy(dataloader)
    else:
        options: dict[str, Any] = {name: getattr(dataloader, name) for name in OPTIONS} | _indices_of(dataloader)
        skipping = SkipDataLoader(
            dataloader.dataset,
            device=dataloader.device,
            rng_types=dataloader.rng_types,
            synchronized_generator=dataloader.synchronized_generator,
            _drop_last=dataloader.drops_last,
            _non_blocking=dataloader.non_blocking,
            **options,
        )
    position = skipping.position = dataloader.position
    together = dataloader.num_skipped + int(num_batches or 0) * dataloader.num_at_once
    if num_batches is None and position.is_restored:
        together = position.num_together
    skipping.num_skipped_together = together
    skipping.skip_batches = -(-together // dataloader.num_at_once)
    return skipping


def _skipping(dataloader: DataLoader[Any], num_batches: int) -> DataLoader[Any]:
    """A loader that is not prepared, without its first batches; it can be prepared, unless it reads a stream."""
    options: dict[str, Any] = {name: getattr(dataloader, name) for name in OPTIONS} | _indices_of(dataloader)
    if isinstance(dataloader.dataset, IterableDataset):
        return SkipDataLoader(dataloader.dataset, num_batches, **options)
    name = "sampler" if dataloader.batch_sampler is None else "batch_sampler"
    options[name] = SkipBatchSampler(options[name], num_batches)
    return DataLoader(dataloader.dataset, **options)


def _indices_of(dataloader: DataLoader[Any]) -> dict[str, Any]:
    """The arguments of a loader that say what is in a batch."""
    if isinstance(dataloader.dataset, IterableDataset):
        return {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
    if dataloader.batch_sampler is None:
        return {"sampler": dataloader.sampler, "batch_size": None}
    return {"batch_sampler": dataloader.batch_sampler}


def _check_divisible(dataloader: Any, num_ranks: int) -> None:
    size = dataloader.batch_size or getattr(dataloader.batch_sampler, "batch_size", None)
    if size is None or (size > 1 and size % num_ranks):
        raise ArgumentError(
            "split_batches",
            given=f"batches of {size} for {num_ranks} processes",
            expected="a batch size that the number of processes divides",
            fix=f"choose a multiple of {num_ranks}, or split_batches=False",
        )


def _seed(dataloader: DataLoader[Any], data_seed: int | None) -> None:
    """Put a sampler that shuffles by seed and epoch in the place of a random one."""
    sampler: Any = get_sampler(dataloader)
    seeded = SeedableRandomSampler(
        sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=sampler.generator,
        data_seed=data_seed,
    )
    set_sampler(dataloader, seeded)


def _shared_generator(sampler: Any) -> torch.Generator | None:
    """The generator of a random sampler, made if it has none, so that ranks can agree on it."""
    if not hasattr(sampler, "generator") or isinstance(sampler, SeedableRandomSampler):
        return None
    if sampler.generator is None:
        sampler.generator = torch.Generator()
        sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    return sampler.generator
