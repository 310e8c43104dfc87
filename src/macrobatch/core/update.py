"""From an accumulated gradient to an update: correct, check, clip, optimizer, scheduler.

`finish` changes nothing but the gradient and may refuse; `apply` changes the model and is never retried.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from macrobatch.checks import check_number
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.loss import to_host
from macrobatch.core.precision import Precision
from macrobatch.core.tally import Tally
from macrobatch.errors import ArgumentError, LossError, NonFiniteError

__all__ = ["NonFinite", "Update", "Verdict"]

NonFinite = Literal["raise", "skip", "ignore"]
"""What to do with a NaN or infinite loss or gradient: *raise* before anything has changed, *skip* the update, or
*ignore* it. Only *ignore* never waits for the device, not even once per window."""


class Verdict(NamedTuple):
    """What `Update.finish` found."""

    grad_norm: float | Tensor
    skip: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """How a window's gradient becomes an update.

    Attributes:
        optimizers: stepped in this order, once per window.
        schedulers: stepped after them, once per update; not on a skipped one.
        clip_norm: largest 2-norm of the whole gradient, or None.
        clip_value: largest absolute value of an element, or None. Applied after `clip_norm`.
        nonfinite: see `NonFinite`.
    """

    optimizers: Sequence[Optimizer]
    schedulers: Sequence[Any] = ()
    precision: Precision
    clip_norm: float | None = None
    clip_value: float | None = None
    nonfinite: NonFinite = "raise"

    def __post_init__(self) -> None:
        for name, limit in (("clip_norm", self.clip_norm), ("clip_value", self.clip_value)):
            if limit is not None:
                check_number(name, limit, is_positive=True, fix="pass None not to clip")
        if self.nonfinite not in get_args(NonFinite):
            raise ArgumentError(
                "nonfinite",
                given=repr(self.nonfinite),
                expected=f"one of {get_args(NonFinite)}",
                fix='leave it at "raise"',
            )
        if self.replays and (len(self.optimizers) > 1 or self.precision.rescales):
            raise ArgumentError(
                "optimizer",
                given=f"{[type(optimizer).__name__ for optimizer in self.optimizers]} in {self.precision.name}",
                expected="an optimizer that evaluates the loss itself (LBFGS) to be the only one, in fp32 or bf16",
                fix='pass it alone with precision="fp32"',
            )

    @property
    def replays(self) -> bool:
        """Whether an optimizer evaluates the loss itself, several times per update (LBFGS)."""
        return any(_demands_closure(type(optimizer)) for optimizer in self.optimizers)

    def finish(self, gradients: GradientBuffer, tally: Tally) -> Verdict:
        """Make the accumulated gradient the promised one, and clip it.

        Raises:
            NonFiniteError: under "raise", if the loss or the gradient is not finite.
            LossError: a weight is not the one counted ahead.
        """
        if self.nonfinite == "ignore" and not self.precision.rescales:
            return self._finish_unread(gradients, tally)
        terms = tally.read()
        if not any(weight for _, weight in terms.values()):
            return Verdict(0.0, "no weight")
        _check_weights({name: weight for name, (_, weight) in terms.items()})
        _check_used(gradients)
        if self.nonfinite != "ignore" and not all(math.isfinite(loss) for loss, _ in terms.values()):
            return self._refused(tally, "loss")
        correction = float(tally.correction({name: weight for name, (_, weight) in terms.items()}))
        self.precision.unscale(self.optimizers)
        norm = to_host([gradients.norm()])[0] * correction
        if not norm or not math.isfinite(norm):  # perhaps only the squares of its elements under- or overflow
            norm = to_host([gradients.norm(dtype=torch.float64)])[0] * correction
        if not math.isfinite(norm):
            return Verdict(norm, "overflow") if self.precision.rescales else self._refused(tally, "gradient")
        clip = 1.0 if self.clip_norm is None else min(1.0, self.clip_norm / (norm + 1e-6))
        self._scale_and_clamp(gradients, correction * clip)
        return Verdict(norm, None)

    def apply(self, gradients: GradientBuffer, replay: Callable[[], Callable[[], Tensor]]) -> None:
        """Step optimizers and schedulers. An error in here may leave a half-made update; it is passed on as it is.

        Args:
            replay: makes the closure for optimizers that ask for one; it computes the window's gradient anew and
                returns its loss.
        """
        if self.replays:
            self.optimizers[0].step(replay())  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            with gradients.lent_to(self.optimizers):
                for optimizer in self.optimizers:
                    optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def _finish_unread(self, gradients: GradientBuffer, tally: Tally) -> Verdict:
        weights = tally.weights()
        if all(not isinstance(weight, Tensor) and not weight for weight in weights.values()):
            return Verdict(0.0, "no weight")
        _check_used(gradients)
        self.precision.unscale(self.optimizers)
        factor = tally.correction(weights)
        norm = gradients.norm()
        if isinstance(factor, Tensor):
            factor = factor.to(norm.device)
        norm = norm * factor
        if self.clip_norm is not None:
            factor = factor * torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
        self._scale_and_clamp(gradients, factor)
        return Verdict(norm, None)

    def _scale_and_clamp(self, gradients: GradientBuffer, factor: float | Tensor) -> None:
        if isinstance(factor, Tensor) or factor != 1.0:
            gradients.scale_(factor)
        if self.clip_value is not None:
            gradients.clamp_(self.clip_value)

    def _refused(self, tally: Tally, what: str) -> Verdict:
        if self.nonfinite == "skip":
            return Verdict(math.nan, "not finite")
        index = tally.first_nonfinite()
        where = f"a NaN or infinite {what}"
        raise NonFiniteError(
            "the window",
            given=where if index is None else f"{where}, first in micro-batch {index} (counted from 0)",
            expected="finite numbers; no parameter, optimizer, scheduler or module buffer was changed",
            fix='look at that micro-batch (torch.autograd.detect_anomaly), or pass nonfinite="skip"',
        )


@cache
def _demands_closure(kind: type[Optimizer]) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _check_used(gradients: GradientBuffer) -> None:
    if not any(slot.used for slot in gradients.slots):
        raise LossError(
            "the loss",
            given="one that none of the trained parameters takes part in",
            expected="a loss that depends on the model given to the step and on its optimizer's parameters",
            fix="compute it from the model that loss_fn gets, and build the optimizer from that model",
        )


def _check_weights(weights: Mapping[str, float]) -> None:
    if not all(0 <= weight < math.inf for weight in weights.values()):
        raise LossError(
            "the weight of a Loss",
            given=f"{dict(weights)} over the window",
            expected="finite sums of numbers >= 0",
            fix="pass the number of items that total is a sum over",
        )
