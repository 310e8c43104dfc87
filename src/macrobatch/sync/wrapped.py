"""The user's own `DistributedDataParallel`: its collectives and communication hooks, its averaging undone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.tally import Tally
from macrobatch.core.weighting import Plan
from macrobatch.errors import ArgumentError
from macrobatch.sync.base import Sync
from macrobatch.sync.peers import Peers

__all__ = ["WrappedSync"]


class WrappedSync(Sync):
    """DDP with its `no_sync` around forward and backward of all micro-batches but the last.

    DDP decides in the forward whether it will reduce, so both have to be inside. What it asks of a model still holds:
    every parameter used in the last micro-batch, or `find_unused_parameters=True`. DDP does not let 16-bit parameters
    accumulate in float32; `ReplicatedSync`, on the module itself, does. A rank without samples runs another's, with
    weight zero.

    Args:
        cross_check: after the first window, compare a checksum of gradients and parameters over ranks.
    """

    has_peers = True
    widens = False

    def __init__(self, *, cross_check: bool = True) -> None:
        self._cross_check = cross_check
        self._model: DistributedDataParallel | None = None
        self._peers: Peers | None = None
        self._syncs_always = False

    def begin(self, model: nn.Module, gradients: GradientBuffer) -> None:
        """DDP has made the replicas equal when it was built.

        Raises:
            ArgumentError: the model is not wrapped.
        """
        if not isinstance(model, DistributedDataParallel):
            raise ArgumentError(
                "model", given=type(model).__name__, expected="a DistributedDataParallel", fix='use sync="auto"'
            )
        gradients.start()
        self._model = model
        self._peers = Peers(model.process_group, gradients.flats[0].storage.device)
        # In its first iteration a static graph is recorded by the hooks that no_sync leaves out (pytorch 143580).
        self._syncs_always = model.static_graph

    def plan(self, plan: Plan) -> Plan:
        """At least one micro-batch on every rank: the reduction is in its backward."""
        assert self._peers is not None
        num_to_run = max(plan.num_micro_batches or 0, 1)
        if self._syncs_always:
            num_to_run = round(self._peers.summed([float(num_to_run)], dist.ReduceOp.MAX)[0])
        return self._peers.plan(plan)._replace(num_to_run=num_to_run, spare=self._peers.spare(plan.spare))

    def micro_batch(self, gradients: GradientBuffer, *, is_last: bool) -> AbstractContextManager[Any]:
        """`no_sync`, but for the last."""
        assert self._model is not None
        if is_last or self._syncs_always:
            return super().micro_batch(gradients, is_last=is_last)
        return self._model.no_sync()

    def close(self, gradients: GradientBuffer, tally: Tally | None) -> None:
        """Make sums of DDP's means, and add up weights, losses and which parameters were used."""
        if tally is None:
            return
        assert self._peers is not None
        self._syncs_always = False
        gradients.collect(adopts=True)
        gradients.scale_(float(self._peers.num))
        self._peers.add_up(gradients, tally)
        assert self._model is not None
        self._peers.broadcast(self._model.buffers())
        if self._cross_check:
            self._cross_check = False
            self._peers.check_replicas(gradients)
