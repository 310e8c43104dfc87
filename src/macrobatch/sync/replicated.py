"""Every rank has the whole model: one all-reduce of the flat buffer per window.

The buffer is cut into buckets, from its end to its front, since gradients become ready in that order. In the last
micro-batch's backward, each bucket is sent off as soon as all of its parameters have theirs; the rest follows when the
backward is through. All ranks send in the same order, whatever their own order of readiness, and send every bucket,
whatever they used. What has to travel beside the gradients (weights, losses, which parameters were used, whether a rank
failed) is in the header of the first buffer, which goes last: small models need one collective per window.

While a bucket is under way its parameters' `.grad` is None. A gradient that comes late (a weight that two re-entrant
checkpoints share, a second backward in one loss function) thus lands in a tensor of its own. All ranks hear of it
through the header and add up the latecomers in a second round. What autograd has not put there is not one of them, and
is refused.

A rank whose set of trained parameters has changed says so, once, in what would be a window of the old set. Where all
ranks say it, they compare their sets and go on; where not all do, all hear of it.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from macrobatch.checks import check_flag, check_integer
from macrobatch.core.gradients import GradientBuffer, Slot
from macrobatch.core.tally import NUM_SUMS, Tally
from macrobatch.core.weighting import Plan
from macrobatch.errors import ArgumentError, GradientError, PeerError
from macrobatch.ranks import Ranks
from macrobatch.sync.base import Again, Sync
from macrobatch.sync.peers import Peers, joined, ranks_in, unlike

__all__ = ["ReplicatedSync"]

_FAILED, _LATE, _CHANGED, _AGAIN, _SUMS = range(5)  # where the numbers of the header begin


class ReplicatedSync(Sync):
    """All-reduce of the flat gradient buffer, overlapped with the last backward.

    Nothing is armed in a forward. Legal are: parameters unused in the last micro-batch, on one rank or on all; several
    forwards before their backwards; checkpointing of both kinds; other numbers of micro-batches on other ranks, none
    included. An error on one rank reaches the others as a `PeerError` at the end of the window.

    Args:
        group: the ranks; all of them by default.
        bucket_bytes: size of a bucket. Smaller ones start earlier, larger ones travel faster; what may not start early
            is not cut, unless it has another `wire_dtype`.
        wire_dtype: send gradients in this dtype, `torch.bfloat16` for half the traffic at bf16's accuracy.
        overlap: send buckets during the last backward; without it, after it.
        cross_check: after the first window, compare a checksum of gradients and parameters over ranks.
    """

    has_peers = True

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = 25 * 2**20,
        wire_dtype: torch.dtype | None = None,
        overlap: bool = True,
        cross_check: bool = True,
    ) -> None:
        check_integer("bucket_bytes", bucket_bytes, fix="leave it at its default")
        check_flag("overlap", overlap)
        check_flag("cross_check", cross_check)
        if wire_dtype is not None and not getattr(wire_dtype, "is_floating_point", False):
            raise ArgumentError(
                "wire_dtype",
                given=repr(wire_dtype),
                expected="a floating point dtype or None",
                fix="pass torch.bfloat16",
            )
        self._group = group
        self._bucket_bytes = bucket_bytes
        self._wire_dtype = wire_dtype
        self._overlap = overlap
        self._cross_check = cross_check
        self._model: nn.Module | None = None
        self._buckets: list[_Bucket] = []
        self._layout: list[Slot] = []
        self._header: Tensor | None = None
        self._is_told = False
        self._unpredictable: set[int] = set()
        self._late: set[int] = set()
        self._flying: list[tuple[_Bucket, dist.Work, Tensor | None]] = []
        self._peers: Peers | None = None

    def ranks(self, model: nn.Module) -> Ranks:
        """This process in the group."""
        return ranks_in(self._group)

    def begin(self, model: nn.Module, gradients: GradientBuffer) -> None:
        """Broadcast parameters and buffers from the group's first rank.

        Raises:
            ArgumentError: the ranks train different sets of parameters.
        """
        if self._model is not None:
            raise ArgumentError(
                "sync",
                given="a ReplicatedSync that another step uses",
                expected="one for each step",
                fix="build a ReplicatedSync for each TrainStep",
            )
        if any(isinstance(param, DTensor) for param in model.parameters()):
            raise ArgumentError(
                "model",
                given="parameters that are spread over ranks (tensor parallel)",
                expected="the whole of each parameter on every rank",
                fix="shard it with fully_shard and let sync='auto' find that out; tensor parallelism is not supported",
            )
        if any(isinstance(module, DistributedDataParallel | FullyShardedDataParallel) for module in model.modules()):
            raise ArgumentError(
                "model",
                given="a module that synchronises a part of it by itself (DistributedDataParallel or FSDP1)",
                expected="the plain model, or DistributedDataParallel around all of it",
                fix="pass the module inside, or the wrapper itself",
            )
        gradients.start()
        self._peers = peers = Peers(self._group, gradients.flats[0].storage.device)
        peers.check_layout(gradients, model)
        self._model, self.among = model, peers
        tensors = [*(slot.param for slot in gradients.slots), *model.parameters(), *model.buffers()]
        peers.broadcast(tensors, spares_equal=True)

    def header(self, num_parameters: int) -> int:
        """Room for: a rank failed; a gradient came late; the parameters changed; a rank has to run the window again;
        the tally's sums; which parameters were used."""
        return _SUMS + NUM_SUMS + num_parameters

    def plan(self, plan: Plan) -> Plan:
        """One collective in the first window; later, only if weights are counted ahead."""
        assert self._peers is not None
        self._is_told = False
        if plan.is_coupled:
            self._peers.longest(plan.num_micro_batches)
            if plan.num_micro_batches is None:
                return plan
        return self._peers.plan(plan)

    def micro_batch(self, gradients: GradientBuffer, *, is_last: bool) -> AbstractContextManager[Any]:
        """In the last one, send buckets as they become ready.

        Raises:
            ArgumentError: the trained parameters have changed since the last window, and not alike on all ranks.
        """
        self._is_told = False
        try:
            self._cut(gradients)
        except ArgumentError:
            self._is_told = True
            raise
        if is_last and self._starts_early and len(self._buckets) > 1:  # the one with the header goes last in any case
            return self._sending(gradients)
        return super().micro_batch(gradients, is_last=is_last)

    def close(self, gradients: GradientBuffer, tally: Tally | None) -> None:
        """Send what is left, the header last, and read what it says."""
        assert self._peers is not None
        assert self._model is not None
        if self._is_told:
            return
        late = self._latecomers()
        refused: GradientError | None = None
        try:
            if tally is not None:
                gradients.collect()
        except GradientError as error:  # the others must hear of it before it is raised
            tally, refused = None, error
        try:
            self._cut(gradients)
        except ArgumentError:
            if tally is None and refused is None:
                return
            raise
        self._fill_header(gradients, tally, late)
        self._exchange()
        header = gradients.flats[0].header[: self.header(len(gradients.slots))].tolist()
        if refused is not None:
            raise refused
        if tally is None:
            return
        _check_peers(header)
        if header[_AGAIN]:
            raise Again
        if header[_LATE]:
            self._add_latecomers(gradients, late)
        for slot, uses in zip(gradients.slots, header[_SUMS + NUM_SUMS :], strict=True):
            slot.used = uses > 0
        tally.absorb(header[_SUMS : _SUMS + NUM_SUMS])
        if self._cross_check:
            self._cross_check = False
            self._peers.check_replicas(gradients)
        self._peers.broadcast(self._model.buffers())

    def again(self, gradients: GradientBuffer) -> None:
        """Alone, as long as nothing has left. Buckets that have left hold sums on all ranks, which cannot be taken
        apart: the rest follows them, with a word in the header, and all ranks run the window again."""
        if not self._flying:
            return
        self._latecomers()
        self._fill_header(gradients, None, [])
        header = gradients.flats[0].header
        header[_FAILED], header[_AGAIN] = 0.0, 1.0
        self._exchange()
        _check_peers(header[:_SUMS].tolist())

    def _exchange(self) -> None:
        """Send what has not left yet, and wait for all of it."""
        for bucket in self._buckets[len(self._flying) :]:
            self._send(bucket)
        for bucket, work, wire in self._flying:
            work.wait()
            if wire is not None:
                numbers = bucket.numbers
                (torch.view_as_real(numbers) if numbers.is_complex() else numbers).copy_(wire)
        self._flying.clear()

    @contextmanager
    def _sending(self, gradients: GradientBuffer) -> Generator[None]:
        self._cut(gradients)
        waiting = [{id(slot.param) for slot in bucket.slots} for bucket in self._buckets]
        home = {id(slot.param): index for index, bucket in enumerate(self._buckets) for slot in bucket.slots}
        held = {home[param] for param in self._unpredictable if param in home} | {len(self._buckets) - 1}

        def ready(param: Tensor, *_: Any) -> None:
            if home[id(param)] < len(self._flying):
                self._late.add(id(param))
            waiting[home[id(param)]].discard(id(param))
            while (following := len(self._flying)) not in held and not waiting[following]:
                if any(slot.param.grad is not slot.view for slot in self._buckets[following].slots):
                    return  # somebody has set it, which `collect` refuses
                for slot in self._buckets[following].slots:
                    slot.param.grad = None
                self._send(self._buckets[following])

        # Unlike hooks of parameters, those of nodes fire also where a backward has written to the buffer itself.
        nodes = [get_gradient_edge(slot.param).node for slot in gradients.slots]  # held: autograd does not
        handles = [
            node.register_hook(partial(ready, slot.param)) for node, slot in zip(nodes, gradients.slots, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _send(self, bucket: _Bucket) -> None:
        numbers = torch.view_as_real(bucket.numbers) if bucket.numbers.is_complex() else bucket.numbers
        wire = None if self._wire_dtype is None or bucket.has_header else numbers.to(self._wire_dtype)
        work = dist.all_reduce(numbers if wire is None else wire, group=self._group, async_op=True)
        assert work is not None
        self._flying.append((bucket, work, wire))

    def _latecomers(self) -> list[tuple[Slot, Tensor]]:
        """Gradients that arrived after their bucket had left. Every `.grad` is its view again, but those that came from
        elsewhere."""
        late: list[tuple[Slot, Tensor]] = []
        for bucket, *_ in self._flying:
            for slot in bucket.slots:
                grad = slot.param.grad
                if grad is not None and id(slot.param) not in self._late:
                    continue
                slot.param.grad = slot.view
                if grad is not None:
                    late.append((slot, grad))
        self._late.clear()
        return late

    def _add_latecomers(self, gradients: GradientBuffer, late: list[tuple[Slot, Tensor]]) -> None:
        for flat in gradients.flats:
            extra = torch.zeros_like(flat.numbers)
            for slot, grad in late:
                if slot.flat is flat:
                    slot.within(extra).copy_(grad)
            dist.all_reduce(torch.view_as_real(extra) if extra.is_complex() else extra, group=self._group)
            flat.numbers.add_(extra)
        self._unpredictable.update(id(slot.param) for slot, _ in late)

    @property
    def _starts_early(self) -> bool:
        return self._overlap and self.overlaps

    def _cut(self, gradients: GradientBuffer) -> None:
        """Cut the buffers into buckets, from the end to the front, the one with the header last."""
        if self._layout is gradients.slots:
            return
        if self._layout and _places(self._layout) != _places(gradients.slots):
            self._agree_on(gradients)
        self._layout = gradients.slots
        self._header = gradients.flats[0].header
        self._buckets = []
        is_cut = self._starts_early or self._wire_dtype is not None  # of which a copy travels, a bucket at a time
        bucket_bytes = self._bucket_bytes if is_cut else math.inf
        for flat in reversed(gradients.flats):
            end = flat.numbers.numel()
            slots: list[Slot] = []
            for slot in reversed([slot for slot in gradients.slots if slot.flat is flat]):
                slots.append(slot)
                if (end - slot.start) * flat.numbers.element_size() >= bucket_bytes and slot.start:
                    self._buckets.append(_Bucket(flat.numbers[slot.start : end], slots, has_header=False))
                    end, slots = slot.start, []
            room = flat.storage.numel() - flat.numbers.numel()
            self._buckets.append(_Bucket(flat.storage[: room + end], slots, has_header=room > 0))

    def _agree_on(self, gradients: GradientBuffer) -> None:
        """The trained parameters have changed here: find out whether they have alike on all ranks; broadcast new ones.

        Raises:
            ArgumentError: on every rank, if not.
        """
        assert self._peers is not None
        assert self._model is not None
        assert self._header is not None
        for bucket in self._buckets:
            bucket.numbers.zero_()
        self._header[_CHANGED] = 1.0
        self._exchange()
        num_changed = round(float(self._header[_CHANGED]))
        if num_changed < self._peers.num:
            raise unlike(f"others than before on {num_changed} of {self._peers.num} ranks, this one among them")
        self._peers.check_layout(gradients, self._model)
        known = {id(slot.param) for slot in self._layout}
        self._peers.broadcast([s.param for s in gradients.slots if id(s.param) not in known], spares_equal=True)

    def _fill_header(self, gradients: GradientBuffer, tally: Tally | None, late: list[tuple[Slot, Tensor]]) -> None:
        header = gradients.flats[0].header
        flags = [float(tally is None), float(bool(late)), 0.0, 0.0]
        used = [float(slot.used and tally is not None) for slot in gradients.slots]
        sums = [0.0] * NUM_SUMS if tally is None else tally.pack(header.dtype, header.device)
        header[: _SUMS + NUM_SUMS + len(used)] = joined([flags, sums, used], header.dtype, header.device)


def _check_peers(header: list[float]) -> None:
    """Raise what other ranks have told of."""
    if header[_CHANGED]:
        raise unlike(f"others than before on {header[_CHANGED]:.0f} ranks, and the same on this one")
    if header[_FAILED]:
        raise PeerError(
            "the window",
            given=f"{header[_FAILED]:.0f} of the other ranks failed in it",
            expected="every rank to reach the end of the window; nothing was changed on this one",
            fix="look at the error of the rank that failed",
        )


def _places(slots: list[Slot]) -> list[tuple[int, int, torch.dtype]]:
    return [(id(slot.param), slot.start, slot.view.dtype) for slot in slots]


class _Bucket(NamedTuple):
    """A stretch of a flat buffer that travels at once, and the parameters in it."""

    numbers: Tensor
    slots: list[Slot]
    has_header: bool
