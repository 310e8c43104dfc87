"""How ranks agree on a gradient: one strategy a file; `make_sync` finds the one that fits."""

from __future__ import annotations

import logging

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from macrobatch import env
from macrobatch.errors import ArgumentError
from macrobatch.sync.base import LocalSync, Sync
from macrobatch.sync.replicated import ReplicatedSync
from macrobatch.sync.sharded import Policy, ShardedSync
from macrobatch.sync.wrapped import LoneSync, WrappedSync

__all__ = ["LocalSync", "Policy", "ReplicatedSync", "ShardedSync", "Sync", "WrappedSync", "make_sync"]

_LOG = logging.getLogger("macrobatch")


def make_sync(sync: object, model: nn.Module, *, overlaps: bool = True, is_lean: bool = False) -> Sync:
    """The strategy for a name, for a strategy itself, or for what the process and the model are.

    Args:
        overlaps: whether backwards are autograd's own, so that a strategy may work during the last one.
        is_lean: hold as little as possible between micro-batches, where a strategy has the choice.

    Raises:
        ArgumentError: it is none of these, or "local" for a model that reduces by itself.

    ```pycon
    >>> make_sync("auto", nn.Linear(1, 1)).has_peers
    False

    ```
    """
    if isinstance(sync, Sync):
        sync.overlaps = sync.overlaps and overlaps
        return sync
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if sync == "local":
        if is_sharded:
            raise ArgumentError(
                "sync",
                given='"local" for a model that fully_shard has spread over ranks',
                expected='"auto" or a ShardedSync: its backwards reduce over ranks by themselves',
                fix='leave it at "auto", also on a single rank',
            )
        return LocalSync()
    if sync == "auto":
        if is_sharded:  # has to be set right even if alone
            return ShardedSync(policy=Policy(keep_parameters=False, reduce_last=False) if is_lean else None)
        if not dist.is_available() or not dist.is_initialized():
            _tell_alone()
            return LoneSync() if LoneSync.suits(model) else LocalSync()
        if dist.get_world_size() == 1:
            return LoneSync() if LoneSync.suits(model) else LocalSync()
        if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
            return WrappedSync()
        return ReplicatedSync(overlap=overlaps)
    raise ArgumentError("sync", given=repr(sync), expected='"auto", "local" or a Sync object', fix='leave it at "auto"')


def _tell_alone() -> None:
    """Warn in the log where several processes were started together and have not joined: nothing else would show it."""
    num = env.num_started()
    if num > 1:
        _LOG.warning(
            "sync: %d processes were started together, and this one has joined none of the others, so it trains a "
            'model of its own. Call macrobatch.launch.init() first, or pass sync="local" if that is meant',
            num,
        )
