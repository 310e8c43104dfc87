"""The native door: `TrainStep` makes one exact update per macro-batch, `accumulate` only the gradient."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch import tree
from macrobatch.arguments import (
    check_callables,
    check_global_batch,
    check_sparse_grad,
    check_surroundings,
    checked_listeners,
    checked_optimizers,
    checked_schedulers,
    parameters,
    tell_untrained,
)
from macrobatch.checks import check_flag
from macrobatch.core.autograd import set_gradient
from macrobatch.core.events import Listener
from macrobatch.core.fused import FusedLinear
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.loss import Loss, Weight, checked_counts
from macrobatch.core.microstep import MicroStep
from macrobatch.core.precision import Precision, make_precision
from macrobatch.core.result import StepResult
from macrobatch.core.step import LossFn, MicroBatch, Step
from macrobatch.core.update import NonFinite, Update
from macrobatch.core.weighting import Normalize, Plan, make_policy
from macrobatch.core.window import Window
from macrobatch.data import MacroBatchLoader
from macrobatch.errors import ArgumentError, BatchError, LossError, PeerError, StateError
from macrobatch.plan.autosize import Autosize, Cut, autosized
from macrobatch.plan.capture import Capture, captured
from macrobatch.plan.split import Auto, Split, make_split
from macrobatch.sync import LocalSync, Sync, make_sync

__all__ = ["TrainStep", "accumulate"]

Count = Callable[[Any], Mapping[str, Weight] | Weight]


class TrainStep:
    """One update per call: the exact gradient of the macro-batch, in micro-batches that fit.

    Equivalent plain loop, if every sample weighs the same and the memory were there:

    ```python
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    scheduler.step()
    ```

    If anything fails before the optimizer moves (an error in `loss_fn`, a NaN), model, optimizer, scheduler, module
    buffers and torch's default generators are as they were before the call, and gradients are None.
    After a call, each parameter's `.grad` holds the gradient that the optimizer saw, until the next call. To go on with
    a loop of your own, call `step.gradients.release()` first: 16-bit parameters then get gradients of their own dtype
    again. Inside a call, leave gradients alone: a `zero_grad()` there is refused, or, in place, undoes the window.

    Args:
        model: module to train. It is used as it is, not wrapped.
        optimizer: one, or several that share no parameter.
        loss_fn: `loss_fn(model, micro_batch)` returns a 0-d tensor, *the mean over the samples* of the micro-batch;
            or `Loss(total, weight)` to average over something else; or a dict of them for several terms (with `count`).
        micro_batch: samples per micro-batch, or `Rows(n)`, or `Tokens(n, lengths=...)`. "auto" finds out with the
            first macro-batch what is fastest within 0.9 of the memory; `Auto` has its options. A window for which
            memory does not suffice after all runs again in smaller micro-batches, to the bits of one that was cut so
            from the start.
        scheduler: one or several learning rate schedulers, stepped once per update.
        clip_norm: clip the 2-norm of the macro-batch's gradient to this.
        clip_value: clip its elements to [-clip_value, clip_value].
        precision: "fp32" computes in the model's own dtypes, "bf16" and "fp16" under autocast, "fp16" with a loss
            scaler; or a `Precision` object. Gradients accumulate in fp32 or wider in any case.
        normalize: "exact" divides by the weight the window saw; "uniform" and `Constant(n)` are there to reproduce
            the mean of means of other tools.
        count: from the whole macro-batch, the weight of each term of the loss, `{term: weight}`. Needed if there are
            several terms, since no later division can tell their gradients apart.
        nonfinite: "raise", "skip" or "ignore" a NaN or infinite loss or gradient. Only "ignore" never waits for the
            device; the others wait once, at the end of the window.
        sparse_grad: "refuse" or "densify" gradients of `nn.Embedding(sparse=True)`.
        listeners: called with each `Event`.
        sync: how ranks agree. "auto" finds out: one process, or replicas on all ranks of torch.distributed; "local"
            keeps this process to itself; or a `Sync` object.
        global_batch: samples of a full macro-batch over all ranks, any integer >= 1; what `loader` makes shares of.
        capture: how micro-batches run on a GPU without the cost of launching each kernel. "graph" records forward and
            backward once for each form of micro-batch as a CUDA graph, and replays it; "auto" does so too, but trusts
            a recording only after a window in which it agreed with eager runs, and, with micro_batch="auto", compiles
            where that is faster and agrees; "compile" always puts `loss_fn` through
            torch.compile, which fuses kernels. What cannot be captured runs eagerly, with a line in the log that
            says why. None, the default, runs eagerly. See docs/capture.md.
        fused_linear: let the matrix products of `nn.Linear` layers that compute in bf16 or fp16 add their weight
            gradients to the fp32 buffer themselves, which rounds once less and saves passes over the weights, and
            `nn.Embedding` layers add to the rows that were looked up; under autocast, round the weights once per
            window. Costs Python per layer, so it pays with `capture`, or where the device has enough to do.

    Raises:
        ArgumentError: an argument is out of its domain.
        GradientError: the model makes sparse gradients and they were not allowed.

    ```pycon
    >>> model = nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = TrainStep(model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=2)
    >>> result = step(torch.ones(5, 4))
    >>> result.num_micro_batches, result.num_samples, result.skipped
    (3, 5, None)

    ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss_fn: LossFn,
        *,
        micro_batch: int | Split | Auto | Literal["auto"] = "auto",
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: str | Precision = "fp32",
        normalize: str | Normalize = "exact",
        count: Count | None = None,
        nonfinite: NonFinite = "raise",
        sparse_grad: str = "refuse",
        listeners: Iterable[Listener] = (),
        sync: str | Sync = "auto",
        global_batch: int | None = None,
        capture: Capture | MicroStep | None = None,
        fused_linear: bool = False,
    ) -> None:
        check_callables(model, loss_fn, count)
        split = make_split(micro_batch, autos=True)
        self.optimizers = checked_optimizers(optimizer, model)
        self.schedulers = checked_schedulers(scheduler)
        device = parameters(self.optimizers)[0].device
        check_sparse_grad(sparse_grad, model)
        check_global_batch(global_batch)
        self.global_batch = global_batch
        self._count = count
        self._window, self._is_new = Window(1), True
        runs = captured(loss_fn, capture, device)
        # A replayed backward adds into fixed addresses, which are not to be lent to a reduction meanwhile.
        strategy = make_sync(sync, model, overlaps=not runs.replays)
        self._step = Step(
            model,
            runs.loss_fn,
            gradients=GradientBuffer(
                lambda: parameters(self.optimizers), header=strategy.header, widens=strategy.widens
            ),
            update=Update(
                optimizers=self.optimizers,
                schedulers=self.schedulers,
                precision=make_precision(precision, device),
                clip_norm=clip_norm,
                clip_value=clip_value,
                nonfinite=nonfinite,
            ),
            window=self._window,
            policy=make_policy(normalize),
            device=device,
            sync=strategy,
        )
        self._step.use(runs.micro_step)
        self._step.update.precision.groups = self._step.gradients.groups
        self._step.listeners += checked_listeners(listeners)
        check_flag("fused_linear", fused_linear)
        if fused_linear:
            self._step.into = FusedLinear(model, autocast=self._step.update.precision.autocast).into
        self.split = autosized(split, self._step, self._counted, capture, runs.other)

    @property
    def num_updates(self) -> int:
        """Updates made so far."""
        return self._window.num_updates

    @property
    def num_skipped(self) -> int:
        """Macro-batches that ended without an update."""
        return self._window.num_skipped

    @property
    def listeners(self) -> list[Listener]:
        """Who is told of each event; add to it or take away at any time between calls."""
        return self._step.listeners

    @property
    def gradients(self) -> GradientBuffer:
        """The flat buffer that every trained parameter's `.grad` is a view of."""
        return self._step.gradients

    def __call__(self, batch: Any) -> StepResult:
        """One update from a macro-batch: any tree of tensors with one row per sample.

        Over several ranks, `batch` is this rank's share, of any size; None if it has none. All ranks have to call.

        Raises:
            BatchError: it has no rows, or its leaves disagree on their number.
            LossError: `loss_fn` returned something else than a loss.
            NonFiniteError: the loss or the gradient is NaN or infinite.
        """
        try:
            check_surroundings(self.optimizers, self._step.device)
            if isinstance(self.split, Autosize):
                cut = self.split.cut(batch)
                micro_batches = [*cut]
            else:
                cut = None
                micro_batches = [] if batch is None else self.split.split(batch)
            expected = self._counted(batch)
        except PeerError:  # they have failed already
            raise
        except Exception:
            self._step.fail(counted=self._count is not None)
            raise
        plan = Plan(len(micro_batches), sum(rows for _, rows in micro_batches), expected)
        return self._run(micro_batches, plan, cut)

    def window(
        self, micro_batches: Iterable[Any], *, expected: Mapping[str, Weight] | Weight | None = None
    ) -> StepResult:
        """One update from micro-batches that are cut already, of any sizes; an iterator is looked one ahead.

        With `micro_batch="auto"`, those that are larger than the size found are cut to it, and what an iterator gave is
        kept until the window is over, in case that it has to run again.

        Args:
            micro_batches: at least one.
            expected: the window's weight, per term, if the loss has several terms.
        """
        try:
            check_surroundings(self.optimizers, self._step.device)
            if not isinstance(micro_batches, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise BatchError(
                    "micro_batches",
                    given=type(micro_batches).__name__,
                    expected="an iterable of micro-batches",
                    fix="pass a list of them, or call the step itself with the macro-batch",
                )
            counted = ((micro_batch, tree.num_rows(micro_batch)) for micro_batch in micro_batches)
            is_stream = not isinstance(micro_batches, Sequence) and self._step.streams
            cut = Cut(self.split, counted, is_stream=is_stream) if isinstance(self.split, Autosize) else None
            source = counted if cut is None else cut
            source = source if is_stream else list(source)
        except Exception:
            self._step.fail(counted=expected is not None)
            raise
        if isinstance(source, list):
            return self._run(source, Plan(len(source), sum(rows for _, rows in source), expected), cut)
        return self._run(source, Plan(None, 1, expected), cut)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            "TrainStep",
            given="a request for a copy of it",
            expected="one step per model and optimizer; its gradients are views of one buffer",
            fix="build a new TrainStep around the copied model and an optimizer of that copy",
        )

    def loader(self, dataset: Any, **options: Any) -> MacroBatchLoader:
        """A loader of this rank's shares of macro-batches of `global_batch` samples.

        The same samples make up an update whatever the number of ranks, none comes twice and none is left out. Where
        a rank cannot load its share, the others get a `PeerError` in that window (not under DistributedDataParallel).

        Args:
            dataset: with `len()` and `dataset[index]`, or an `IterableDataset`.
            **options: as for `MacroBatchLoader`: shuffle, seed, tail, collate_fn, device, num_workers, ...

        Raises:
            ArgumentError: the step was built without `global_batch`.
        """
        if self.global_batch is None:
            raise ArgumentError(
                "TrainStep.loader",
                given="a step without global_batch",
                expected="to know how many samples an update sees",
                fix="build the step with global_batch=1000",
            )
        sync = self._step.sync
        options.setdefault("ranks", sync.ranks(self._step.model))
        loader = MacroBatchLoader(dataset, self.global_batch, **options)
        if sync.has_peers:
            loader.on_error = lambda: self._step.fail(counted=self._count is not None)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """What the step itself knows: counters and the loss scale. Save model, optimizer and scheduler beside it."""
        return {"window": self._window.state_dict(), "precision": self._step.update.precision.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Refused as a whole if a part does not fit.

        Raises:
            StateError: what is wrong with it.
        """
        if not isinstance(state, Mapping) or set(state) != {"window", "precision"}:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise StateError(
                "TrainStep.load_state_dict",
                given=f"{state!r:.100}",
                expected="the keys ['precision', 'window']",
                fix="pass what TrainStep.state_dict returned",
            )
        trial = Window(1)
        trial.load_state_dict(state["window"])
        self._step.update.precision.load_state_dict(state["precision"])
        self._window.load_state_dict(state["window"])
        self._window.discard()  # a window that was under way when the state was saved begins anew

    def _counted(self, batch: Any) -> Mapping[str, Weight] | None:
        if self._count is None:
            return None
        if batch is None:
            return {}
        counts = checked_counts(self._count(batch))
        if counts is None:
            raise LossError("what count returned", given="None", expected="a weight for each term", fix="return it")
        return counts

    def _run(self, micro_batches: Iterable[MicroBatch], plan: Plan, cut: Cut | None) -> StepResult:
        if self._is_new:
            self._is_new = False
            tell_untrained(self.optimizers, self._step.model)
        self._window.size = plan.num_micro_batches or sys.maxsize
        result = self._step.run(micro_batches, plan, None if cut is None else cut.smaller)
        if cut is not None:
            cut.clean()
        return result


def accumulate(
    model: nn.Module, loss_fn: LossFn, batch: Any, *, micro_batch: int | Split, count: Count | None = None
) -> Loss:
    """Fill `.grad` with the gradient of the macro-batch's mean loss, and do nothing else.

    Equivalent to `loss_fn(model, batch).backward()` on parameters without gradients, in less memory. Every parameter
    that requires grad gets a `.grad` of its own dtype, summed in fp32 or wider; one that was not used gets None. What
    `.grad` held before is replaced.

    Args:
        model: module whose parameters get gradients.
        loss_fn: as for `TrainStep`.
        batch: the macro-batch.
        micro_batch: samples per micro-batch, `Rows` or `Tokens`.
        count: as for `TrainStep`; needed if the loss has several terms.

    Returns:
        The detached sum and weight of the loss, `Loss(total, weight)`; its `.mean` is the loss. Of several terms, the
        sum of their means, with weight 1.

    ```pycon
    >>> model = nn.Linear(2, 1, bias=False)
    >>> loss = accumulate(model, lambda model, x: model(x).mean(), torch.arange(6.0).view(3, 2), micro_batch=2)
    >>> model.weight.grad, loss.weight
    (tensor([[2., 3.]]), 3.0)

    ```
    """
    check_callables(model, loss_fn, count)
    held = [(param, param.grad) for param in model.parameters() if param.requires_grad]
    buffer = GradientBuffer(lambda: [param for param, _ in held])
    micro_batches = make_split(micro_batch).split(batch)
    if not held:
        raise ArgumentError("model", given="no parameter that requires grad", expected="one", fix="unfreeze a part")
    step = Step(
        model,
        loss_fn,
        gradients=buffer,
        update=Update(optimizers=(), precision=Precision()),
        window=Window(len(micro_batches)),
        policy=make_policy("exact"),
        device=held[0][0].device,
        sync=LocalSync(),
    )
    try:
        expected = None if count is None else count(batch)
        plan = Plan(len(micro_batches), sum(rows for _, rows in micro_batches), expected)
        tally = step.gradient(micro_batches, plan).tally
    except BaseException:
        buffer.release()
        for param, grad in held:
            set_gradient(param, grad)
        raise
    filled = buffer.used()
    buffer.release()
    for param, view in filled:
        param.grad = view.to(param.dtype)
    terms = list(tally.read().values())
    total, weight = (terms[0][0] * terms[0][1], terms[0][1]) if len(terms) == 1 else (sum(m for m, _ in terms), 1.0)
    return Loss(torch.tensor(total, dtype=torch.float64), weight)
