"""Each data-parallel rank's share of a data set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from macrobatch.colossalai.context import ParallelMode
from macrobatch.colossalai.context.parallel_context import checked_seed
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.data.randomness import seed_of
from macrobatch.errors import ArgumentError

__all__ = ["DataParallelSampler", "get_dataloader"]


class DataParallelSampler(DistributedSampler[Any]):
    """torch's DistributedSampler over the data-parallel ranks; each iteration is over the next epoch by itself.

    All ranks have as many samples: with `drop_last` a few are left out of an epoch, without it a few come twice.

    Args:
        dataset: with a length.
        shuffle: a new order every epoch, by seed and epoch alone.
        seed: the same on every rank.
        drop_last: whether to leave out what does not divide by the number of ranks.
    """

    def __init__(self, dataset: Dataset[Any], shuffle: bool = False, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(
            dataset,
            num_replicas=gpc.get_world_size(ParallelMode.DATA),
            rank=gpc.get_local_rank(ParallelMode.DATA),
            shuffle=shuffle,
            seed=checked_seed(seed),
            drop_last=drop_last,
        )

    def __iter__(self) -> Iterator[Any]:
        indices = super().__iter__()
        self.epoch += 1
        return indices


def get_dataloader(
    dataset: Dataset[Any],
    shuffle: bool = False,
    seed: int = 1024,
    add_sampler: bool = True,
    drop_last: bool = False,
    pin_memory: bool = False,
    num_workers: int = 0,
    **kwargs: Any,
) -> DataLoader[Any]:
    """A torch DataLoader, on several data-parallel ranks over each one's share.

    Args:
        dataset: what to load.
        shuffle: a new order every epoch.
        seed: for the order on several ranks, which is the same on all of them, and for what workers draw at random,
            which is never the same in two of them. An integer from 0 to 2^32 - 1.
        add_sampler: whether ranks share the data set. False for a data set that every rank is to see as a whole.
        drop_last: whether to leave out the last batch if it is short.
        pin_memory: whether batches are in memory that a GPU copies from quickly.
        num_workers: processes that load.
        kwargs: other arguments of DataLoader, such as `batch_size`; a `sampler` or `batch_sampler` of your own is used
            as it is.

    Raises:
        ArgumentError: `add_sampler` on several ranks for a data set that has no length.

    Source:
        https://docs.pytorch.org/docs/stable/data.html

    ```pycon
    >>> loader = get_dataloader(list(range(5)), batch_size=2)
    >>> [batch.tolist() for batch in loader]
    [[0, 1], [2, 3], [4]]

    ```
    """
    is_shared = (
        add_sampler and gpc.get_world_size(ParallelMode.DATA) > 1 and not {"sampler", "batch_sampler"} & {*kwargs}
    )
    if is_shared and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")):
        raise ArgumentError(
            "get_dataloader",
            given=f"a {type(dataset).__name__} without a length, on several ranks",
            expected="a data set that can be shared out by index",
            fix="give each rank its share within the data set, and pass add_sampler=False",
        )
    if is_shared:
        kwargs["sampler"] = DataParallelSampler(dataset, shuffle=shuffle, seed=seed, drop_last=drop_last)
    elif "batch_sampler" not in kwargs and "sampler" not in kwargs:
        kwargs["shuffle"] = shuffle or None
    if "batch_sampler" not in kwargs:
        kwargs["drop_last"] = drop_last
    init = _WorkerSeed(checked_seed(seed), gpc.get_local_rank(ParallelMode.DATA), kwargs.pop("worker_init_fn", None))
    return DataLoader(dataset, pin_memory=pin_memory, num_workers=num_workers, worker_init_fn=init, **kwargs)


class _WorkerSeed:
    """Seeds a worker by rank, worker and epoch: what two of them draw at random, or one in two epochs, is unrelated."""

    def __init__(self, seed: int, rank: int, then: Callable[[int], None] | None) -> None:
        self._seed = seed
        self._rank = rank
        self._then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        assert info is not None  # a worker runs this
        seed = seed_of(self._seed, self._rank, info.seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        if self._then is not None:
            self._then(worker)
