"""The user's own `DistributedDataParallel` or `FullyShardedDataParallel`: its collectives, its averaging undone."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from macrobatch.checks import check_flag
from macrobatch.core.gradients import GradientBuffer, Slot
from macrobatch.core.tally import Tally
from macrobatch.core.weighting import Plan
from macrobatch.errors import ArgumentError, NoMemoryError, NotYetError
from macrobatch.ranks import Ranks
from macrobatch.sync.base import Sync
from macrobatch.sync.peers import Peers, ranks_in, sparing_buffers, trained_in

__all__ = ["LoneSync", "WrappedSync"]


_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)  # pyright: ignore[reportPrivateUsage]


class WrappedSync(Sync):
    """The wrapper's `no_sync` around forward and backward of all micro-batches but the last.

    DDP decides in the forward whether it will reduce, so both have to be inside. What it asks of a model still holds:
    every parameter used in the last micro-batch, or `find_unused_parameters=True`. FSDP1 gathers parameters in each
    forward, so all its ranks run the same number of micro-batches. Neither lets 16-bit parameters accumulate in
    float32; `ReplicatedSync`, on the module itself, does. A rank with too few micro-batches runs its last one, or
    another's, with weight zero. Module buffers that DDP leaves to each rank stay there. An error on one rank cannot be
    told to the others; they end with the group's timeout. Where a window may have to be run again because memory does
    not suffice, DDP reduces in a micro-batch of weight zero behind all others, so that a rank can begin anew by itself.

    Args:
        cross_check: after the first window, compare a checksum of replicas' gradients and parameters over ranks.
    """

    has_peers = True
    streams = False
    substitutes = True
    widens = False

    def __init__(self, *, cross_check: bool = True) -> None:
        check_flag("cross_check", cross_check)
        self._cross_check = cross_check
        self._model: DistributedDataParallel | FullyShardedDataParallel | None = None
        self._peers: Peers | None = None
        self._num_own = math.inf  # micro-batches of this rank that are to come in a window that lends it others
        self._runs_alike = False
        self._syncs_always = False
        self._watches = False
        self._watched: list[Slot] = []
        self._hooks: list[RemovableHandle] = []
        self._seen: set[int] = set()  # parameters that an own micro-batch used
        self._taken_up: set[int] | None = None  # parameters that the window used before it was saved
        self._is_idle_last = False

    def ranks(self, model: nn.Module) -> Ranks:
        """This process in the group."""
        return ranks_in(_group_of(model))

    def repeats(self, model: nn.Module) -> bool:
        """Under DDP, unless its graph is static: that one synchronises in the middle of a window, as FSDP1 does."""
        return isinstance(model, DistributedDataParallel) and not model.static_graph

    def begin(self, model: nn.Module, gradients: GradientBuffer) -> None:
        """The wrapper has made the ranks equal when it was built.

        Raises:
            ArgumentError: the model is not wrapped, or trains parameters that its wrapper leaves out.
        """
        group: dist.ProcessGroup | None
        if isinstance(model, DistributedDataParallel):
            group = model.process_group
            self.substitutes = model.mixed_precision is not None
            # In its first iteration a static graph is recorded by the hooks that no_sync leaves out (pytorch 143580).
            self._syncs_always = self._runs_alike = model.static_graph
            self._watches = model.find_unused_parameters or model.static_graph
        elif isinstance(model, FullyShardedDataParallel):
            shards = _shards_by_parameter(model)
            if not all(id(param) in shards for param in model.parameters() if param.requires_grad):
                raise ArgumentError(
                    "model",
                    given="trained parameters that FullyShardedDataParallel was told to ignore",
                    expected="all of them in its hands; it would leave these to every rank for itself",
                    fix="freeze them, or wrap the whole model",
                )
            if any(each.sharding_strategy in _HYBRID for each in FullyShardedDataParallel.fsdp_modules(model)):
                raise ArgumentError(
                    "model",
                    given="FSDP1 with a hybrid sharding strategy",
                    expected="FULL_SHARD, SHARD_GRAD_OP or NO_SHARD",
                    fix="use torch.distributed.fsdp.fully_shard on a two-dimensional mesh",
                )
            gradients.shards = lambda param: shards[id(param)]
            group = model.process_group
            self._runs_alike, self._cross_check = True, False  # ranks differ in what they hold
        else:
            raise ArgumentError(
                "model",
                given=type(model).__name__,
                expected="a DistributedDataParallel or FullyShardedDataParallel",
                fix='use sync="auto"',
            )
        gradients.start()
        self._model = model
        self._peers = self.among = Peers(group, gradients.flats[0].storage.device)

    def plan(self, plan: Plan) -> Plan:
        """At least one micro-batch on every rank: the reduction is in its backward."""
        assert self._peers is not None
        self._seen.clear()
        self._taken_up = None
        self._is_idle_last = plan.repeats
        if plan.repeats:
            self._num_own = math.inf
            spare = self._peers.spare(plan.spare)
            return self._peers.plan(plan)._replace(num_idle=int(spare is not None), spare=spare)
        num_to_run = plan.num_micro_batches or 0
        if self._runs_alike or plan.is_coupled:
            assert self._model is not None
            num_to_run = self._peers.longest(plan.num_micro_batches, trained=trained_in(self._model))
            if plan.num_micro_batches is None:
                return plan
        if not plan.lends:
            self._num_own = math.inf
            return self._peers.plan(plan)
        num_to_run = max(num_to_run, 1)
        self._num_own = math.inf if num_to_run == plan.num_micro_batches else plan.num_micro_batches or 0
        spare = self._peers.spare(plan.spare)
        num_to_run = 0 if spare is None else num_to_run  # no rank has had a sample yet
        return self._peers.plan(plan)._replace(num_to_run=num_to_run, spare=spare)

    def micro_batch(self, gradients: GradientBuffer, *, is_last: bool) -> AbstractContextManager[Any]:
        """`no_sync`, but for the last."""
        assert self._model is not None
        if isinstance(self._model, FullyShardedDataParallel):  # keeps gradients of its own, whole ones in no_sync
            for slot in gradients.slots:
                if slot.param.grad is slot.view:
                    slot.param.grad = None
        else:
            self._model.require_forward_param_sync = False  # `close` broadcasts buffers, when nobody is behind
        if self._watches and self._watched is not gradients.slots:
            self._watch(gradients.slots)
        self._num_own = -1 if is_last and self._is_idle_last else self._num_own - 1
        syncs = (is_last and self._taken_up is None) or self._syncs_always
        context = super().micro_batch(gradients, is_last=is_last) if syncs else self._model.no_sync()
        return context if self._num_own >= 0 else sparing_buffers(self._model, context)

    def bring_in(self, gradients: GradientBuffer, *, keeps: bool) -> None:
        """DDP leaves them in the buffer, or in its buckets.

        Raises:
            NotYetError: FSDP1 keeps them to itself.
        """
        if keeps and isinstance(self._model, FullyShardedDataParallel):
            raise NotYetError(
                "a window under way",
                given="gradients that FSDP1 keeps to itself until the last micro-batch",
                expected="to be saved between two windows, and to know in front of a backward whether it is the last",
                fix="save after an update, put each micro-batch into a block of accumulate, or use fully_shard",
            )
        for slot in gradients.slots if keeps else ():
            if slot.param.grad is not None and slot.param.grad is not slot.view:
                slot.local.copy_(slot.param.grad)

    def take_up(self, gradients: GradientBuffer) -> None:
        """DDP knows nothing of them, and would leave those that are not used again to each rank."""
        self._taken_up = {id(slot.param) for slot in gradients.slots if slot.has_moved}

    def close(self, gradients: GradientBuffer, tally: Tally | None) -> None:
        """Make sums of the wrapper's means, and add up weights, losses and which parameters were used."""
        self._num_own = math.inf
        if tally is None:
            return
        assert self._peers is not None
        assert self._model is not None
        is_reduced = self._taken_up is None or self._syncs_always
        if self._syncs_always:
            self._syncs_always = self._runs_alike = False
        gradients.collect(adopts=True)
        if self._watches:
            self._seen |= self._taken_up or set()
            for slot in gradients.slots:
                slot.used = id(slot.param) in self._seen
            self._seen.clear()
        self._taken_up = None
        if is_reduced:
            gradients.scale_(float(self._peers.num))
        else:
            self._peers.add(gradients)
        source = self._peers.add_up(gradients, tally)
        self._peers.broadcast(_shared_buffers(self._model), source=source)
        if self._cross_check:
            self._cross_check = False
            self._peers.check_replicas(gradients)

    def catch_up(self, gradients: GradientBuffer, rest: Callable[[], object]) -> None:
        """Outside of the reduction, nobody waits.

        Raises:
            NoMemoryError: inside of it.
        """
        self._seen.clear()
        if self._num_own < 0:
            raise NoMemoryError(
                "the reduction of a window",
                given="memory that ran out in it, where ranks cannot begin anew one by one",
                expected="room for its buckets, and a micro-batch of two samples",
                fix="lower Auto(memory_fraction=...), or leave DDP out and let the step synchronise the model inside",
            )

    def _watch(self, slots: list[Slot]) -> None:
        """Note which parameters get gradients. Afterwards it is not to be seen: a bucket has zeros for those that were
        not used, and a borrowed micro-batch leaves zeros in those that it used."""

        def note(param: Tensor) -> None:
            if self._num_own >= 0:
                self._seen.add(id(param))

        for hook in self._hooks:
            hook.remove()
        self._hooks = [slot.param.register_post_accumulate_grad_hook(note) for slot in slots]
        self._watched = slots


class LoneSync(Sync):
    """`DistributedDataParallel` that has nobody to reduce with, inside its `no_sync` all the time: its reducer would
    wait for ever for the rest of a backward that has failed, and a window could not be run again."""

    def begin(self, model: nn.Module, gradients: GradientBuffer) -> None:
        """Nothing is to be made equal."""
        self._model = model

    def micro_batch(self, gradients: GradientBuffer, *, is_last: bool) -> AbstractContextManager[Any]:
        """`no_sync`."""
        return self._model.no_sync()  # pyright: ignore[reportCallIssue]

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether a wrapper can do without its reducer: not a static graph, which that records in its first backward,
        nor DDP's own mixed precision."""
        return isinstance(model, DistributedDataParallel) and not model.static_graph and model.mixed_precision is None


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    return model.process_group if isinstance(model, DistributedDataParallel | FullyShardedDataParallel) else None


def _shared_buffers(model: DistributedDataParallel | FullyShardedDataParallel) -> list[Tensor]:
    """The module buffers that are to be alike on all ranks."""
    if not isinstance(model, DistributedDataParallel):
        return list(model.buffers())
    if not model.broadcast_buffers:
        return []
    return [buffer for name, buffer in model.module.named_buffers() if name not in model.parameters_to_ignore]


def _shards_by_parameter(model: FullyShardedDataParallel) -> dict[int, tuple[dist.ProcessGroup, ...]]:
    """From the `id` of each parameter that FSDP1 handles, the group over which it is cut into pieces."""
    shards: dict[int, tuple[dist.ProcessGroup, ...]] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = module._handle  # pyright: ignore[reportPrivateUsage]
        if handle is None:
            continue
        flat: Any = handle.flat_param
        params: list[Tensor] = [flat, *(flat._params or ()), *(flat._shared_params or ())]
        groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
        shards.update((id(param), groups) for param in params)
    return shards
