"""What one update reports. Tensors stay on their device until somebody looks."""

from __future__ import annotations

from torch import Tensor

from macrobatch.core.tally import Tally

__all__ = ["StepResult"]


class StepResult:
    """The outcome of one window. Reading a number waits for the device; making a result does not.

    Attributes:
        skipped: None if the update was made, else why not: "no weight", "not finite" or "overflow".
        num_micro_batches: how many the window had.
        num_samples: rows of the macro-batch on this rank.
    """

    __slots__ = ("_grad_norm", "_tally", "num_micro_batches", "num_samples", "skipped")

    def __init__(
        self,
        tally: Tally,
        *,
        grad_norm: float | Tensor,
        skipped: str | None,
        num_micro_batches: int,
        num_samples: int,
    ) -> None:
        self._tally = tally
        self._grad_norm = grad_norm
        self.skipped = skipped
        self.num_micro_batches = num_micro_batches
        self.num_samples = num_samples

    @property
    def losses(self) -> dict[str, float]:
        """Mean of each term of the loss over its own weight; `{"loss": ...}` if there is one term."""
        return {name: loss for name, (loss, _) in self._tally.read().items()}

    @property
    def weights(self) -> dict[str, float]:
        """What each term was averaged over: samples, tokens, whatever the loss counted."""
        return {name: weight for name, (_, weight) in self._tally.read().items()}

    @property
    def loss(self) -> float:
        """The window's loss: the sum of its terms' means."""
        return sum(self.losses.values())

    @property
    def weight(self) -> float:
        """What the loss was averaged over; of several terms, the first one's."""
        return next(iter(self.weights.values()), 0.0)

    @property
    def grad_norm(self) -> float:
        """2-norm of the window's gradient, before clipping."""
        self._grad_norm = float(self._grad_norm)
        return self._grad_norm

    def __repr__(self) -> str:
        fate = f"skipped: {self.skipped}" if self.skipped else "updated"
        num = f"{self.num_micro_batches} micro-batch{'es' * (self.num_micro_batches != 1)}"
        return (
            f"StepResult({fate}, loss={self.loss:.6g}, weight={self.weight:g}, grad_norm={self.grad_norm:.6g}, "
            f"{num}, {self.num_samples} samples)"
        )
