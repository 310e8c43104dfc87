"""Micro-steps on trial: forward and backward as in a window, and no trace of them.

Afterwards, module buffers, gradients and the default generators of torch, Python and NumPy are as before, to the bit;
parameters, optimizer, scheduler and counters were never touched. Not undone: the allocator's peak statistics, and what
a loss function does besides computing a loss.
"""

from __future__ import annotations

import inspect
import math
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch import tree
from macrobatch.core.autograd import set_gradient
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.loss import Weight
from macrobatch.core.microstep import LossFn, MicroStep
from macrobatch.core.snapshot import Snapshot, rng_states, set_rng_states
from macrobatch.core.step import Step
from macrobatch.core.tally import Tally
from macrobatch.core.twopass import TwoPass
from macrobatch.core.weighting import Plan
from macrobatch.plan.capture import Way
from macrobatch.plan.memory import Memory
from macrobatch.plan.trial import bound_for, distance

__all__ = ["Rehearsal", "pending_state_bytes"]

_MIN_TIMED_S, _MIN_TIMED, _MAX_TIMED = 0.2, 2, 5
_REFERRED = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError)


class Rehearsal:
    """Tries micro-batches on a step.

    Args:
        step: whose model, loss function, precision and gradient buffer are used.
        memory: of its device.
        expected: weights counted ahead for the macro-batch, if its loss has several terms.
    """

    def __init__(self, step: Step, memory: Memory, expected: Mapping[str, Weight] | Weight | None) -> None:
        self._step = step
        self._memory = memory
        self._expected = expected
        # In step, ranks hold most between two micro-batches, and what they hold is taken back in the last one.
        self._num_passes = 2 if step.sync.in_step else 1
        self._eager = self._bound(MicroStep())

    def _bound(self, micro_step: MicroStep) -> MicroStep:
        step = self._step
        return micro_step.bind(step.model, step.gradients, precision=step.update.precision, device=step.device)

    def peak_bytes(self, micro_batch: Any) -> int | None:
        """Most memory that a forward and backward takes; None if there is not enough of it.

        It is measured eagerly, since a capture would keep memory of each size that is tried. A step that keeps some
        for a capture needs it twice, and copies of the gradients to compare.
        """
        step, held, copies = self._step, 0, 0
        try:
            with self._memory.measured() as peak, self._undone():
                held = self._memory.held_bytes()
                copies = step.micro_step.num_copies * sum(flat.numbers.nbytes for flat in step.gradients.flats)
                self._run(micro_batch, self._eager, self._code, self._tally(micro_batch))
        except torch.OutOfMemoryError:
            peak = None
        if peak is None:  # what did not fit hung on the error, which is gone by now
            self._memory.release()
            return None
        return peak.num_bytes + step.micro_step.keeps_memory * (max(peak.num_bytes - held, 0) + copies)

    def seconds(self, micro_batch: Any, way: Way | None = None) -> float:
        """Least time of a few forwards and backwards, after those to warm up; infinite if memory ran out in one.

        Ranks that run in step run the same number of them.

        Args:
            micro_batch: to run.
            way: how; None means as the step does, captured if it captures.
        """
        loss_fn, like = way or (self._step.loss_fn, self._step.micro_step)
        micro_step = self._bound(like.fresh())
        num_timed = _MIN_TIMED if self._step.sync.in_step else _MAX_TIMED
        with self._undone():
            run = partial(
                self._run, micro_batch, micro_step, loss_fn, self._tally(micro_batch)
            )  # one window, all of it
            for _ in range(like.num_first):
                self._seconds(run)
            times: list[float] = []
            while len(times) < _MIN_TIMED or (len(times) < num_timed and sum(times) < _MIN_TIMED_S):
                times.append(self._seconds(run))
            micro_step.release()
        if micro_step.keeps_memory:
            self._memory.release()
        return min(times)

    def disagreement(self, micro_batch: Any, loss_fn: LossFn) -> str | None:
        """How a loss function's gradient differs from that of the step's own, run from the same state, by more than
        rounding; the rest of a sentence that begins with "since"."""
        found: list[list[Tensor]] = []
        for each in (self._code, loss_fn):
            with self._undone():
                self._run(micro_batch, self._eager, each, self._tally(micro_batch))
                found.append([flat.numbers.clone() for flat in self._step.gradients.flats])
                bound = bound_for(self._eager, [])
        off = distance(found[1], found[0])
        return None if off <= bound else f"its gradient is {off:.1e} from that of the code, beyond {bound:.0e}"

    @property
    def _code(self) -> LossFn:
        """The step's loss function, not compiled."""
        return getattr(self._step.loss_fn, "eager", self._step.loss_fn)

    def _tally(self, micro_batch: Any) -> Tally:
        guess = tree.num_rows(micro_batch)
        return Tally(self._step.policy, expected=self._expected, guess=guess, num_micro_batches=self._num_passes)

    def _seconds(self, run: Callable[[], None]) -> float:
        self._memory.synchronize()
        begin = time.perf_counter()
        try:
            run()
        except torch.OutOfMemoryError:
            return math.inf
        self._memory.synchronize()
        return (time.perf_counter() - begin) / self._num_passes

    def _run(self, micro_batch: Any, micro_step: MicroStep, loss_fn: LossFn, tally: Tally) -> None:
        step = self._step
        num_rows = tree.num_rows(micro_batch)
        if isinstance(loss_fn, TwoPass):
            before = Snapshot(step.model, step.device)
            loss_fn = step.window_loss([(micro_batch, num_rows)], Plan(1, num_rows), before)
        run = partial(self._pass, micro_step, loss_fn, tally)
        ahead, index = None, 0
        try:
            ahead = tree.to_device(micro_batch, step.device)  # as in a window, where the next one is copied meanwhile
            for index in range(self._num_passes):
                run(index, micro_batch, num_rows)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            del ahead
            few = tree.select(micro_batch, slice(0, 2))
            rest = range(index, self._num_passes)
            step.sync.catch_up(step.gradients, lambda: [run(each, few, 0) for each in rest])
            raise

    def _pass(
        self, micro_step: MicroStep, loss_fn: LossFn, tally: Tally, index: int, micro_batch: Any, num_rows: int
    ) -> None:
        step, is_last = self._step, self._step.sync.in_step and index == self._num_passes - 1
        with micro_step.window(), step.into(step.gradients), step.sync.micro_batch(step.gradients, is_last=is_last):
            micro_step(loss_fn, micro_batch, num_rows, tally)

    @contextmanager
    def _undone(self) -> Generator[None]:
        step = self._step
        before, states = Snapshot(step.model, step.device), rng_states(step.device)
        try:
            with _aside(step.gradients, step.update.optimizers):
                step.gradients.start()
                yield
        finally:
            before.restore()
            set_rng_states(step.device, states)


@contextmanager
def _aside(gradients: GradientBuffer, optimizers: Any) -> Generator[None]:
    """Lends the gradient buffer; afterwards, gradients are as they were."""
    held = [(p, p.grad) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    slots, flats = gradients.slots, gradients.flats
    used = [slot.used for slot in slots]
    saved = [flat.storage.cpu() for flat in flats] if any(used) else []  # to the host: it must not count
    try:
        yield
    finally:
        if not slots:
            gradients.release()
        elif gradients.flats is flats:
            for flat, storage in zip(flats, saved, strict=False):
                flat.storage.copy_(storage)
            for slot, was_used in zip(slots, used, strict=True):
                slot.used = was_used
        for param, gradient in held:
            if param.grad is not gradient:
                set_gradient(param, gradient)


def pending_state_bytes(optimizers: Any) -> int:
    """Bytes of state that optimizers have yet to allocate, in their first step.

    One of torch's own kinds is asked: its like takes a step on parameters of the same shapes on the meta device, which
    has no memory. Of others no code is run that nobody asked for; two float32 numbers per element are assumed.

    ```pycon
    >>> pending_state_bytes([torch.optim.AdamW(nn.Linear(10, 10).parameters())])  # two moments of 110, two counts
    888

    ```
    """
    return sum(map(_pending_bytes, optimizers))


def _pending_bytes(optimizer: Optimizer) -> int:
    fresh = [
        ({**group, "params": [p for p in group["params"] if p.requires_grad and p not in optimizer.state]})
        for group in optimizer.param_groups
    ]
    fresh = [group for group in fresh if group["params"]]
    numel = sum(_local(p).numel() for group in fresh for p in group["params"])
    if not numel:
        return 0
    kind = type(optimizer)
    if kind is torch.optim.LBFGS:
        history: Any = max(group["history_size"] for group in fresh)
        return (2 * history + 5) * numel * 4
    if not kind.__module__.startswith("torch.optim."):
        return 8 * numel
    try:
        return _state_bytes_on_meta(kind, fresh)
    except _REFERRED:
        return 8 * numel


def _state_bytes_on_meta(kind: type[Any], groups: list[dict[str, Any]]) -> int:
    switches = {"fused": False, "foreach": False, "capturable": False}
    like: list[dict[str, Any]] = []
    for group in groups:
        params = [nn.Parameter(torch.empty_like(_local(p), device="meta")) for p in group["params"]]
        for param in params:
            param.grad = torch.empty_like(param)
        off = {name: value for name, value in switches.items() if name in group}
        like.append({**group, **off, "params": params})
    twin: Any = kind(like)
    with torch.no_grad():
        inspect.unwrap(kind.step)(twin)  # unwrapped, since hooks of all optimizers are no business of this one
    values = [value for state in twin.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _local(param: Any) -> Tensor:
    return param.to_local() if hasattr(param, "to_local") else param
