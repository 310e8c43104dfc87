"""Every rank has a shard of each parameter: FSDP2 (`fully_shard`), used for what it is, with its averaging off.

Two choices for the time between micro-batches, P being the number of parameters, W the ranks they are spread over:

| | more memory | less memory |
|---|---|---|
| parameters meanwhile | kept: gathered once per window, 2 or 4 B/P | resharded: gathered in each micro-batch |
| gradients meanwhile | kept: reduced once per window, 4 B/P | reduced in each micro-batch, 4/W B/P |

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from macrobatch.checks import check_flag, check_integer
from macrobatch.core.gradients import GradientBuffer, Slot
from macrobatch.core.tally import Tally
from macrobatch.core.weighting import Plan
from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks
from macrobatch.sync.base import Again, Sync
from macrobatch.sync.peers import Peers, ranks_in, sparing_buffers, trained_in
from macrobatch.sync.realign import Realigned, forget, groups_in

__all__ = ["Policy", "ShardedSync"]

_HALF = (torch.bfloat16, torch.float16)
_LOG = logging.getLogger("macrobatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What a rank holds between the micro-batches of a window.

    Attributes:
        keep_parameters: whole, instead of resharding them after each micro-batch.
        reduce_last: gradients whole, to be reduced once per window, instead of in each micro-batch.
    """

    keep_parameters: bool
    reduce_last: bool

    def __post_init__(self) -> None:
        check_flag("keep_parameters", self.keep_parameters)
        check_flag("reduce_last", self.reduce_last)

    def extra_bytes(self, parameter_bytes: int, gradient_bytes: int) -> int:
        """What it holds beyond the leanest policy, from the sizes of all parameters and gradients as a whole."""
        return self.keep_parameters * parameter_bytes + self.reduce_last * gradient_bytes


_LEANEST = Policy(keep_parameters=False, reduce_last=False)
_BY_SPEED = (  # as measured on two H200 with a 1.1 B GPT: what is gathered once weighs more than what is reduced once
    Policy(keep_parameters=True, reduce_last=True),
    Policy(keep_parameters=True, reduce_last=False),
    Policy(keep_parameters=False, reduce_last=True),
    _LEANEST,
)


class ShardedSync(Sync):
    """FSDP2: reduce-scatter of sums, in every micro-batch or in the last.

    Works with a model that the user has sharded, on plain and hybrid (HSDP) meshes. FSDP2's collectives are in forward
    and backward, so all ranks run the same number of micro-batches: a rank with fewer runs its last one again, with
    weight zero. An error in front of a window (a batch that cannot be split) reaches the others as a `PeerError`; after
    one in a forward or backward, they end when the process group times out. Where memory runs out and the window can be
    run again, the rank that it happened to keeps sending what the others wait for, and all run it again.

    Args:
        policy: what to hold between micro-batches; None chooses the fastest that fits, from the memory that the second
            window, with the optimizer's state in place, left free.
        memory_limit_bytes: what may be used per rank; None means the device's memory, less a tenth.
        group: the ranks over which the macro-batch is spread; all of them by default.
        cross_check: after the first window, compare a checksum of gradients and parameters over the replicas of a
            hybrid mesh. `fully_shard` makes nobody's parameters equal.
    """

    has_peers = True
    streams = False
    substitutes = True
    in_step = True

    def __init__(
        self,
        *,
        policy: Policy | None = None,
        memory_limit_bytes: int | None = None,
        group: dist.ProcessGroup | None = None,
        cross_check: bool = True,
    ) -> None:
        if policy is not None and not isinstance(policy, Policy):  # pyright: ignore[reportUnnecessaryIsInstance]
            fix = "pass Policy(keep_parameters=True, reduce_last=True), or leave it out to have it chosen"
            raise ArgumentError("policy", given=repr(policy), expected="a Policy or None", fix=fix)
        check_integer("memory_limit_bytes", memory_limit_bytes, at_least=0, or_none=True, fix="leave it out")
        check_flag("cross_check", cross_check)
        self._cross_check = cross_check
        self.policy = _LEANEST if policy is None else policy
        self._num_lean = None if policy is not None else 0
        self._limit = memory_limit_bytes
        self._group = group
        self._num_own = math.inf  # micro-batches of this rank that are to come in a window that lends it others
        self._modules: list[FSDPModule] = []
        self._is_16_bit = False
        self._model: nn.Module | None = None
        self._peers: Peers | None = None
        self._line: Realigned | None = None
        self._is_behind = False
        self._is_planned = self._is_unfinished = False

    def ranks(self, model: nn.Module) -> Ranks:
        """This process in the group."""
        return ranks_in(self._group)

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The least of each number over the group."""
        assert self._peers is not None
        self._peers.longest(0)  # what a rank sends that has failed in front of its window
        self._be_ready()
        return self._peers.summed(numbers, dist.ReduceOp.MIN)

    def begin(self, model: nn.Module, gradients: GradientBuffer) -> None:
        """Turn FSDP2's averaging off: sums are divided once, by the window's weight.

        Raises:
            ArgumentError: the model is not sharded, or would accumulate whole gradients in 16 bits.
        """
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if not self._modules:
            raise ArgumentError(
                "model",
                given="a model without an FSDPModule",
                expected="one that fully_shard has been applied to",
                fix="call torch.distributed.fsdp.fully_shard on its blocks and on itself before building the optimizer",
            )
        gradients.start()
        if not all(isinstance(slot.param, DTensor) for slot in gradients.slots):
            raise ArgumentError(
                "model",
                given="trained parameters that are not sharded",
                expected="all of them in FSDP2's hands; it would leave these to every rank for itself",
                fix="call fully_shard on the whole model too, after its blocks",
            )
        device = gradients.flats[0].storage.device
        self._model = model
        self._peers = self.among = Peers(self._group, device)
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            if device.type == "cpu":  # gloo cannot multiply while it sums
                module.set_force_sum_reduction_for_comms(True)
        self._keep()
        self._is_16_bit = any(slot.param.dtype in _HALF for slot in gradients.slots)
        if self.policy.reduce_last and self._reduces_in_16_bits():
            raise ArgumentError(
                "policy",
                given="reduce_last with gradients that are 16-bit until they are reduced",
                expected="float32 where a window is summed up",
                fix="shard with MixedPrecisionPolicy(..., reduce_dtype=torch.float32), or reduce_last=False",
            )

    def plan(self, plan: Plan) -> Plan:
        """As many micro-batches on every rank as the longest share has.

        Raises:
            ArgumentError: the trained parameters have changed, and not alike on all ranks.
        """
        assert self._peers is not None
        assert self._model is not None
        longest = self._peers.longest(plan.num_micro_batches, trained=trained_in(self._model))
        if plan.num_micro_batches is None:
            return plan
        if self._is_planned:  # else what is under way is this window's first forward
            self._forget()
        self._is_planned = True
        if not plan.lends:
            self._num_own = math.inf
            return self._peers.plan(plan)
        if plan.repeats:
            self._be_ready()
        self._num_own = plan.num_micro_batches if longest > plan.num_micro_batches else math.inf
        return self._peers.plan(plan)._replace(num_to_run=longest, spare=self._peers.spare(plan.spare))

    def micro_batch(self, gradients: GradientBuffer, *, is_last: bool) -> AbstractContextManager[Any]:
        """Set what FSDP2 does in the forward and backward that follow."""
        assert self._model is not None
        self._set_for(is_last=is_last)
        if self._line is not None:
            self._line.redo() if self._is_behind else self._line.begin()
            self._is_behind = False
        self._is_unfinished = True
        self._num_own -= 1
        context = super().micro_batch(gradients, is_last=is_last)
        return context if self._num_own >= 0 else sparing_buffers(self._model, context)

    def bring_in(self, gradients: GradientBuffer, *, keeps: bool) -> None:
        """Reduce what the policy holds whole, and reshard parameters that it keeps: as in the last backward, in which
        nothing arrives. The sum is the same, but for the order of its roundings."""
        if not keeps:
            self._forget()
            return
        self._set_for(is_last=True)
        roots = [state for state in map(_state_of, self._modules) if state._is_root]
        for state in roots:
            state._root_post_backward_final_callback()

    def stand_ins(self) -> dict[int, Tensor]:
        """Whole parameters, which a model shows where the policy keeps them between micro-batches."""
        params = [param for group in groups_in(self._modules) for param in group.fsdp_params]
        return {id(p._unsharded_param): p.sharded_param for p in params if hasattr(p, "_unsharded_param")}

    def close(self, gradients: GradientBuffer, tally: Tally | None) -> None:
        """Add up weights, losses and which parameters were used: one small all-reduce."""
        self._num_own = math.inf
        if tally is None:
            return
        assert self._peers is not None
        super().close(gradients, tally)
        source = self._peers.add_up(gradients, tally)
        self._is_planned = self._is_unfinished = False
        assert self._model is not None
        self._peers.broadcast(self._model.buffers(), source=source)
        if self._cross_check:
            self._cross_check = False
            self._check_replicas(gradients.slots, self._peers)
        if self._num_lean is not None:
            self._num_lean += 1
            if self._num_lean == 2:
                self._choose(gradients.slots)

    def catch_up(self, gradients: GradientBuffer, rest: Callable[[], object]) -> None:
        """Send what the others wait for: in what is left of the micro-batch, and in those after it."""
        self._is_behind = True
        gc.collect()
        rest()

    def again(self, gradients: GradientBuffer) -> None:
        """In the sums at the window's end, the others hear that they have to run it again."""
        self._num_own = math.inf
        assert self._peers is not None
        if self._line is not None:
            self._line.end()
        with suppress(Again):
            self._peers.add_up(gradients, None)

    def _forget(self) -> None:
        """What is left of a window that has failed, or was given up."""
        if self._is_unfinished:
            forget(self._modules)
        self._is_planned = self._is_unfinished = False

    def _set_for(self, *, is_last: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(is_last or not self.policy.reduce_last, recurse=False)
            module.set_reshard_after_backward(is_last or not self.policy.keep_parameters, recurse=False)
            module.set_is_last_backward(is_last)

    def _be_ready(self) -> None:
        """Memory may run out from here on, in front of the first micro-batch too."""
        self._line = self._line or Realigned.of(self._modules)
        self._line.end()

    def _check_replicas(self, slots: list[Slot], peers: Peers) -> None:
        """Refuse replicas of a shard that differ, on all ranks together."""
        by_group: dict[dist.ProcessGroup, list[Slot]] = {}
        for slot in slots:
            param: Any = slot.param
            for axis, placement in enumerate(param.placements):
                if placement.is_replicate():
                    by_group.setdefault(param.device_mesh.get_group(axis), []).append(slot)
        if not by_group:
            return
        with peers.together():
            for group, members in by_group.items():
                replicas = Peers(group, peers.device)
                params: list[Any] = [slot.param for slot in members]
                replicas.check_alike("parameters", [param.detach().to_local() for param in params])
                replicas.check_alike("gradients", [slot.local.detach() for slot in members])

    def _choose(self, slots: list[Slot]) -> None:
        """After two lean windows: the fastest policy that fits into what they left free, on every rank."""
        assert self._peers is not None
        self._num_lean = None
        computed_in = [policy.param_dtype for policy in self._precisions() if policy.param_dtype is not None]
        itemsize = max((dtype.itemsize for dtype in computed_in), default=slots[0].param.element_size())
        parameter_bytes = sum(slot.param.numel() * itemsize for slot in slots)
        gradient_bytes = sum(slot.param.numel() * 4 for slot in slots)
        (headroom,) = self._peers.summed([self._headroom()], dist.ReduceOp.MIN)
        options = [option for option in _BY_SPEED if not (option.reduce_last and self._reduces_in_16_bits())]
        fitting = [o for o in options if o.extra_bytes(parameter_bytes, gradient_bytes) <= headroom]
        self.policy = fitting[0] if fitting else _LEANEST
        self._keep()
        _LOG.info(
            "sharded: parameters %s, gradients reduced %s: %.2f GB more than the leanest, %.2f GB were free",
            "kept" if self.policy.keep_parameters else "resharded",
            "in the last micro-batch" if self.policy.reduce_last else "in each micro-batch",
            self.policy.extra_bytes(parameter_bytes, gradient_bytes) / 1e9,
            headroom / 1e9,
        )

    def _keep(self) -> None:
        """Kept parameters stay whole between forward and backward, too; otherwise, what the user chose there stands."""
        if self.policy.keep_parameters:
            for module in self._modules:
                module.set_reshard_after_forward(False, recurse=False)

    def _headroom(self) -> float:
        assert self._peers is not None
        device = self._peers.device
        if device.type != "cuda":
            return float("inf") if self._limit is None else float(self._limit)
        limit = 0.9 * torch.cuda.get_device_properties(device).total_memory if self._limit is None else self._limit
        return float(limit - torch.cuda.max_memory_allocated(device))

    def _reduces_in_16_bits(self) -> bool:
        return any(
            policy.reduce_dtype in _HALF
            or (policy.reduce_dtype is None and policy.param_dtype in _HALF)
            or (policy.reduce_dtype is None and policy.param_dtype is None and self._is_16_bit)
            for policy in self._precisions()
        )

    def _precisions(self) -> list[MixedPrecisionPolicy]:
        return [_state_of(module)._mp_policy for module in self._modules]


def _state_of(module: FSDPModule) -> Any:
    return module._get_fsdp_state()  # pyright: ignore[reportPrivateUsage]
