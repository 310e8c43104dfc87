"""An existing DataLoader, divided over ranks: its batches become the windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from macrobatch.checks import check_integer
from macrobatch.core.window import Tail
from macrobatch.data.loader import MacroBatchLoader, ShareLoader
from macrobatch.data.sampler import MacroBatchSampler
from macrobatch.data.source import Indexed, Rows, Sampled
from macrobatch.data.windows import check_tail
from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks

__all__ = ["shard"]


def shard(
    loader: Iterable[Any],
    *,
    ranks: Ranks | None = None,
    seed: int = 0,
    tail: Tail | None = None,
    device: torch.device | str | None = None,
) -> ShareLoader:
    """Divide the batches of a DataLoader over ranks: each of its batches is one window, of which a rank gets its share.

    ```text
    the loader                                        becomes
    batch_size, sequential or shuffle=True            MacroBatchLoader(dataset, global_batch=batch_size, ...)
    batch_size with a sampler, or a batch_sampler     its lists of indices are cut: ranks load their own samples only
    an IterableDataset; batch_size=None; an           its batches are cut by rows: every rank loads all of them
    `__iter__` of its own; another iterable
    ```

    Data set, collate function, workers and the other options are kept. Samplers and streams draw their random numbers
    from `seed` and epoch instead of the global generators, and so are the same on every rank and after a resume;
    `shuffle=True` does so with a generator, too. Another sampler that has a generator of its own has to be seeded alike
    on every rank, and is not wound back by `load_state_dict`.

    Args:
        loader: a DataLoader, or another iterable that can be iterated once per epoch.
        ranks: this process among all; by default as in torch.distributed when an iteration begins.
        seed: an integer >= 0, the same on every rank.
        tail: instead of the loader's `drop_last`; only where that is what decides about the tail.
        device: where the batches' tensors go, as in `MacroBatchLoader`.

    Raises:
        ArgumentError: it is no loader, or it is one rank's part already.

    ```pycon
    >>> loader = DataLoader(torch.arange(5), batch_size=3)
    >>> [[batch.tolist() for batch in shard(loader, ranks=Ranks(rank=r, world_size=2))] for r in range(2)]
    [[[0, 1], [3]], [[2], [4]]]

    ```
    """
    _refuse_parts(loader)
    check_integer("seed", seed, "the same on every rank", fix="pass seed=0", at_least=0)
    if tail is not None:
        check_tail(tail)
    if not isinstance(loader, DataLoader):
        _refuse_tail(tail)
        return ShareLoader(Rows(loader, seed), ranks=ranks, device=device)
    is_plain = type(loader).__iter__ is DataLoader.__iter__
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None or not is_plain:
        _refuse_tail(tail)
        return ShareLoader(Rows(loader, seed), ranks=ranks, device=device)
    options = _options(loader)
    if _is_standard(loader):
        policy: Tail = tail or ("drop" if loader.drop_last else "apply")
        return MacroBatchLoader(
            loader.dataset,
            loader.batch_size or 1,
            ranks=ranks,
            shuffle=isinstance(loader.sampler, RandomSampler),
            seed=seed,
            tail=policy,
            device=device,
            **options,
        )
    _refuse_tail(tail)
    windows = Sampled(loader.batch_sampler, len(loader.dataset), seed)  # pyright: ignore[reportArgumentType]
    return ShareLoader(Indexed(loader.dataset, windows, options), ranks=ranks, device=device)


def _is_standard(loader: DataLoader[Any]) -> bool:
    """Whether its order is one that `Windows` makes as well: all samples once, as they lie or at random."""
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_sampler.sampler is not sampler:
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(loader.dataset)  # pyright: ignore[reportArgumentType]
    return type(sampler) is SequentialSampler


def _options(loader: DataLoader[Any]) -> dict[str, Any]:
    names = ["collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "persistent_workers"]
    if loader.num_workers:
        names += ["prefetch_factor", "multiprocessing_context"]
    return {name: getattr(loader, name) for name in names}


def _refuse_parts(loader: Any) -> None:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers.append(getattr(samplers[1], "sampler", None))
    part = next((each for each in (loader, *samplers) if isinstance(each, _PARTS)), None)
    if part is not None:
        raise ArgumentError(
            "loader",
            given=f"one with a {type(part).__name__}, which is one rank's part already",
            expected="a loader of whole batches, built alike on every rank",
            fix="build the DataLoader without it, with the batch size over all ranks",
        )
    if getattr(loader, "in_order", True) is False:
        raise ArgumentError(
            "loader",
            given="one with in_order=False",
            expected="the same batches in the same order on every rank",
            fix="build the DataLoader without it",
        )
    if isinstance(loader, str | Iterator) or not isinstance(loader, Iterable):
        raise ArgumentError(
            "loader",
            given=type(loader).__name__,
            expected="a DataLoader, or an iterable that can be iterated once per epoch",
            fix="pass the DataLoader itself, not iter(loader)",
        )


_PARTS = (ShareLoader, MacroBatchSampler, DistributedSampler)


def _refuse_tail(tail: Tail | None) -> None:
    if tail is not None:
        raise ArgumentError(
            "tail",
            given=repr(tail),
            expected="None for a loader whose own sampler or data set decides where batches end",
            fix="leave it out, or set drop_last on the DataLoader",
        )
