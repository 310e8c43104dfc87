"""One window over given micro-batches, from the first forward to the update."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.core.arrival import Arrivals
from macrobatch.core.events import Event, Listener, MicroBatchDone, Skipped, Updated
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.microstep import LossFn, MicroStep
from macrobatch.core.result import StepResult
from macrobatch.core.snapshot import Snapshot, check_unchanged, rng_states, set_rng_states, versions_of
from macrobatch.core.tally import Seeds, Tally
from macrobatch.core.twopass import TwoPass
from macrobatch.core.update import Update, Verdict
from macrobatch.core.weighting import Exact, Normalize, Plan
from macrobatch.core.window import Window
from macrobatch.errors import BatchError, NotYetError, WindowError
from macrobatch.sync.base import Again, Sync

__all__ = ["LossFn", "MicroBatch", "Smaller", "Step"]

T = TypeVar("T")
MicroBatch = tuple[Any, int]
"""A micro-batch and its number of samples."""
Smaller = Callable[[torch.OutOfMemoryError | None], Iterable[MicroBatch]]
"""From the error of a micro-batch that did not fit into memory, the whole window in smaller ones, or an error if it has
none to offer. From None, the same window once more."""


class Gradient(NamedTuple):
    """A finished window's gradient, apart from the numbers themselves, which lie in the buffer."""

    tally: Tally
    verdict: Verdict
    num_samples: int
    before: Snapshot
    plan: Plan
    micro_batches: Iterable[MicroBatch]
    versions: list[int] | None


class Step:
    """Everything one update needs, put together; `run` reads top to bottom.

    Equivalent plain loop, for a loss that sums over `weight` items and `total_weight` of the window:

    ```python
    for micro_batch in micro_batches:
        (loss_fn(model, micro_batch).total / total_weight).backward()
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        gradients: GradientBuffer,
        update: Update,
        window: Window,
        policy: Normalize,
        device: torch.device,
        sync: Sync,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.gradients = gradients
        self.update = update
        self.window = window
        self.policy = policy
        self.device = device
        self.listeners: list[Listener] = []
        self.sync = sync
        self.use(MicroStep())
        self.into: Callable[[GradientBuffer], AbstractContextManager[Any]] = nullcontext
        """Context of a window's forwards and backwards: how gradients get into the buffer, if not by autograd alone."""
        self._arrivals = Arrivals(device)
        self._seeds = Seeds()
        self._begun = False
        self._is_running = False
        self._spare: Any = None
        self._latest: Any = None

    def use(self, micro_step: MicroStep) -> None:
        """Run micro-batches by this from now on."""
        self.micro_step = micro_step.bind(
            self.model, self.gradients, precision=self.update.precision, device=self.device
        )

    def run(self, micro_batches: Iterable[MicroBatch], plan: Plan, smaller: Smaller | None = None) -> StepResult:
        """Accumulate the micro-batches and update. If anything fails before the update, nothing has changed."""
        if not self.streams:
            micro_batches = list(micro_batches)
        gradient = self.gradient(micro_batches, plan, smaller)
        result = StepResult(
            gradient.tally,
            grad_norm=gradient.verdict.grad_norm,
            skipped=gradient.verdict.skip,
            num_micro_batches=self.window.num_pending,
            num_samples=gradient.num_samples,
        )
        if result.skipped is None:
            self._apply(lambda: self._closure(gradient, result))
            self.window.applied()
        else:
            if result.skipped == "not finite":
                gradient.before.restore_buffers()  # running statistics are poisoned too
            self.window.skipped()
        if result.skipped in (None, "no weight"):
            self._spare = self._latest  # from a window without a NaN
        self.update.precision.update()
        if self.listeners and result.skipped is None:
            self._emit(Updated(result=result, num_updates=self.window.num_updates))
        elif self.listeners:
            self._emit(Skipped(result=result, reason=str(result.skipped)))
        return result

    def gradient(self, micro_batches: Iterable[MicroBatch], plan: Plan, smaller: Smaller | None = None) -> Gradient:
        """The window's gradient, finished and checked, in the buffer; the window is closed. Nothing else has moved,
        and nothing at all if this fails.

        If a micro-batch does not fit into memory, the window starts over with what `smaller` makes of it: the bits are
        those of a window that was cut so from the start.
        """
        self.begin()
        if self._is_running:
            raise WindowError(
                "the step",
                given="a call from within its own window",
                expected="one window at a time",
                fix="call it outside of loss_fn and of listeners, or build a second TrainStep",
            )
        self._is_running = True
        before = Snapshot(self.model, self.device)
        try:
            if isinstance(micro_batches, list):
                plan = plan._replace(spare=micro_batches[0][0] if micro_batches else self._spare)
            plan = plan._replace(is_coupled=isinstance(self.loss_fn, TwoPass), repeats=smaller is not None)
            gradient = self._until_it_fits(micro_batches, plan, before, smaller)
        except BaseException:
            self.window.discard()
            self.update.precision.cancel()
            before.restore()
            self.gradients.clear()
            raise
        finally:
            self._is_running = False
        return gradient

    def _until_it_fits(
        self, micro_batches: Iterable[MicroBatch], share: Plan, before: Snapshot, smaller: Smaller | None
    ) -> Gradient:
        plan = self.sync.plan(share)
        # A host does not raise OutOfMemoryError, and its peers are not asked to run again. Python's and NumPy's
        # generators take 60 us to note, a twentieth of a window of tiny micro-steps; PyTorch's are in the snapshot.
        may_run_again = smaller is not None or (self.sync.has_peers and self.device.type != "cpu")
        states = rng_states(self.device) if may_run_again else None
        while True:
            may_repeat = self.update.replays or (self.sync.has_peers and smaller is None)
            versions = versions_of(micro_batches) if may_repeat and isinstance(micro_batches, list) else None
            try:
                loss_fn = self._first_pass(micro_batches, plan, before, smaller)
                tally, num_samples = self._accumulate(self._admitted(micro_batches), plan, loss_fn, smaller)
                break
            except Again as again:
                micro_batches = again.micro_batches or self._same_again(micro_batches, versions, smaller)
            if isinstance(micro_batches, list):
                self.window.size = max(len(micro_batches), 1)
                if self.sync.in_step:
                    plan = self.sync.plan(share._replace(num_micro_batches=len(micro_batches), spare=plan.spare))
            self.window.restart()
            before.restore()
            if states is not None:
                set_rng_states(self.device, states)
        verdict = self.update.finish(self.gradients, tally)
        return Gradient(tally, verdict, num_samples, before, plan, micro_batches, versions)

    def _first_pass(
        self, micro_batches: Iterable[MicroBatch], plan: Plan, before: Snapshot, smaller: Smaller | None
    ) -> LossFn:
        try:
            return self.window_loss(micro_batches, plan, before)
        except torch.OutOfMemoryError as error:
            if smaller is None:
                raise
            raise self._again(error, smaller, lambda: None) from None

    def _accumulate(
        self,
        micro_batches: Iterable[tuple[Any, int, bool]],
        plan: Plan,
        loss_fn: LossFn,
        smaller: Smaller | None = None,
    ) -> tuple[Tally, int]:
        """Fill the gradient buffer; returns the weights and losses, and the number of samples."""
        self.gradients.start()
        tally = Tally(
            self.policy,
            expected=plan.expected,
            guess=plan.guess,
            num_micro_batches=plan.num_micro_batches,
            seeds=self._seeds,
        )
        num_samples, index, micro_batch = 0, 0, plan.spare
        try:
            with self.micro_step.window(), self.into(self.gradients):
                for index, (micro_batch, num_rows, is_last) in enumerate(self._padded(micro_batches, plan)):
                    num_samples += num_rows
                    with self.sync.micro_batch(self.gradients, is_last=is_last):
                        self.micro_step(loss_fn, micro_batch, num_rows, tally)
                    if self.listeners and num_rows:
                        self._emit(MicroBatchDone(index=index, is_last=is_last))
        except torch.OutOfMemoryError as error:
            if smaller is not None:
                rest = partial(self._idle, loss_fn, micro_batch, tally, (plan.num_to_run or 0) - index)
                raise self._again(error, smaller, rest) from None
            self.sync.close(self.gradients, None)
            raise
        except Exception:
            self.sync.close(self.gradients, None)
            raise
        self.sync.close(self.gradients, tally)
        return tally, num_samples

    def _again(self, error: torch.OutOfMemoryError, smaller: Smaller, rest: Callable[[], object]) -> Again:
        traceback.clear_frames(error.__traceback__)  # they hold the graph that did not fit
        self.sync.catch_up(self.gradients, rest)
        self.sync.again(self.gradients)
        return Again(self._told(lambda: smaller(error)))

    def _idle(self, loss_fn: LossFn, micro_batch: Any, tally: Tally, num: int) -> None:
        """Run the last micro-batches of a window with as little in them as a loss function may ask for."""
        few = tree.select(micro_batch, slice(0, 2))
        with self.micro_step.window(), self.into(self.gradients):
            for following in reversed(range(num)):
                with self.sync.micro_batch(self.gradients, is_last=not following):
                    self.micro_step(loss_fn, few, 0, tally)

    def _same_again(
        self, micro_batches: Iterable[MicroBatch], versions: list[int] | None, smaller: Smaller | None
    ) -> Iterable[MicroBatch]:
        """Memory ran out on another rank, which has sent a part of its gradients."""
        if smaller is not None:
            return self._told(lambda: smaller(None))
        self._told(lambda: check_unchanged(micro_batches, versions))
        return micro_batches

    def _told(self, action: Callable[[], T]) -> T:
        """What an action returns; of its error, the other ranks hear."""
        try:
            return action()
        except BaseException:
            self.sync.close(self.gradients, None)
            raise

    @torch.inference_mode(False)  # what it makes is to be used again
    def fail(self, *, counted: bool) -> None:
        """Tell the other ranks that this one has nothing for the window, not even an empty share."""
        self.begin()
        is_coupled = isinstance(self.loss_fn, TwoPass)
        self.sync.plan(Plan(None, 0.0, {} if counted else None, is_coupled=is_coupled))
        if not is_coupled:  # else they have heard of it, and not begun
            self.gradients.start()
            self.sync.close(self.gradients, None)

    @property
    def streams(self) -> bool:
        """Whether a window's micro-batches may come one by one, their number unknown."""
        return self.sync.streams and not self.update.replays and not isinstance(self.loss_fn, TwoPass)

    def begin(self) -> None:
        """Make the ranks equal, once, before anything is computed."""
        if not self._begun:
            self.sync.begin(self.model, self.gradients)
            self._begun = True

    def window_loss(self, micro_batches: Iterable[MicroBatch], plan: Plan, before: Snapshot) -> LossFn:
        """The loss function for the micro-batches of a window, in order."""
        if not isinstance(self.loss_fn, TwoPass):
            return self.loss_fn
        if self.policy != Exact():
            raise NotYetError(
                "TwoPass",
                given=f"{self.policy}",
                expected='normalize="exact": its loss is one number for the whole macro-batch',
                fix='leave normalize at "exact"',
            )
        versions = versions_of(micro_batches)
        runs = [run[:2] for run in self._padded(((*each, False) for each in micro_batches), plan)]
        loss_fn = self.loss_fn.over(
            self.model,
            runs,
            before=before,
            forward=self.update.precision.forward,
            device=self.device,
            among=self.sync.among,
        )
        check_unchanged(micro_batches, versions)
        return loss_fn

    def _apply(self, closure: Callable[[], Callable[[], Tensor]]) -> None:
        try:
            self.update.apply(self.gradients, closure)
        except BaseException:
            self.window.discard()
            self.update.precision.cancel()
            raise

    def _closure(self, gradient: Gradient, result: StepResult) -> Callable[[], Tensor]:
        """The window's loss and gradient as a function of the parameters, for an optimizer that asks for it: every
        call replays all micro-batches, with the same dropout and from the same module buffers."""
        lenient = replace(self.update, nonfinite="skip")  # a line search may try a point where the loss is infinite
        at_hand = [True]

        @torch.enable_grad()  # an optimizer that asks for it in its step may leave that to the closure
        def closure() -> Tensor:
            if at_hand:
                at_hand.clear()
                return torch.tensor(result.loss, dtype=torch.float64, device=self.device)
            micro_batches, plan, before = gradient.micro_batches, gradient.plan, gradient.before
            check_unchanged(micro_batches, gradient.versions)
            before.restore()
            loss_fn = self.window_loss(micro_batches, plan, before)
            tally, _ = self._accumulate(((*micro_batch, False) for micro_batch in micro_batches), plan, loss_fn)
            lenient.finish(self.gradients, tally)
            loss = sum(loss for loss, _ in tally.read().values())
            return torch.tensor(loss, dtype=torch.float64, device=self.device)

        return closure

    def _padded(self, micro_batches: Iterable[tuple[Any, int, bool]], plan: Plan) -> Iterator[tuple[Any, int, bool]]:
        """The window's micro-batches and, if other ranks run more, the last one again, as one of no samples."""
        spare, num = plan.spare, 0
        if plan.num_to_run is None:
            for spare, num_rows, is_last in micro_batches:
                yield spare, num_rows, is_last and not plan.num_idle
            if plan.num_idle:
                self._latest = spare
            for following in reversed(range(plan.num_idle)):
                yield tree.select(spare, slice(0, 2)), 0, not following
            return
        for spare, num_rows, _ in micro_batches:
            num += 1
            yield spare, num_rows, num == plan.num_to_run
        while num < plan.num_to_run:
            num += 1
            yield spare, 0, num == plan.num_to_run
        self._latest = spare

    def _admitted(self, micro_batches: Iterable[MicroBatch]) -> Iterator[tuple[Any, int, bool]]:
        """Each micro-batch with the window's answer to: is it the last? Looks one ahead, and copies that one to the
        device beside the work on this one."""
        rest = ((self._arrivals.start(micro_batch), num_rows) for micro_batch, num_rows in micro_batches)
        try:
            current = next(rest)
        except StopIteration:
            if self.sync.has_peers:  # an empty share; the window counts it as one micro-batch
                self.window.admit(end_of_data=True)
                return
            raise BatchError(
                "the window", given="no micro-batches", expected="at least one", fix="skip empty macro-batches"
            ) from None
        for following in rest:
            yield current[0].ready(), current[1], self.window.admit()
            current = following
        yield current[0].ready(), current[1], self.window.admit(end_of_data=True)

    def _emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
