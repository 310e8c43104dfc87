"""One term of a window's loss, micro-batch by micro-batch, and the factors that backwards start from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from macrobatch.core.loss import Weight, to_device

__all__ = ["DIGIT", "Seeds", "Term", "counts_of", "is_saved_term", "summed"]

DIGIT = 2.0**12
"""What one digit of a weight that travels counts up to: float32 adds such digits up exactly over 4,096 ranks."""


class Seeds:
    """0-d tensors that backwards start from, made once per value and on their device, without a copy from the host."""

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, torch.device], dict[float, Tensor]] = {}

    def like(self, tensor: Tensor) -> dict[float, Tensor]:
        """Those made so far for a tensor's dtype and device, by value."""
        made = self._made.setdefault((tensor.dtype, tensor.device), {})
        if len(made) >= 1024:
            made.clear()
        return made


class Term:
    """One term of the loss over the window, by micro-batch: `tensors[i] * factors[i]` is a sum over `weights[i]`."""

    __slots__ = ("expected", "factors", "promised", "rounded", "scale", "seeds", "tensors", "weights")

    def __init__(self, expected: Weight, *, promised: bool, rounded: bool, seeds: dict[float, Tensor]) -> None:
        self.expected = expected
        self.promised = promised
        self.rounded = rounded
        self.scale = _scale(expected, rounded=rounded)
        self.seeds = seeds
        self.tensors: list[Tensor] = []
        self.factors: list[float] = []
        self.weights: list[Weight] = []

    def sums_on_host(self) -> list[float]:
        """As `sums`, in Python, which is faster where the numbers are at hand: a tenth of a small window."""
        totals = [float(tensor) * factor for tensor, factor in zip(self.tensors, self.factors, strict=True)]
        weights = [float(weight) for weight in self.weights]
        means = [total / weight for total, weight in zip(totals, weights, strict=True) if weight > 0]
        return [*_digits(sum(weights)), sum(totals), float(len(means)), sum(means)]

    def sums(self, device: torch.device) -> Tensor:
        """Over its micro-batches: the weight in digits, the sum of losses, how many have weight, the sum of means."""
        totals = torch.stack(self.tensors).double() * to_device(self.factors, torch.float64, device)
        numbers = [weight for weight in self.weights if not isinstance(weight, Tensor)]
        if len(numbers) == len(self.weights):
            weights = to_device(numbers, torch.float64, device)
        else:
            each = [torch.as_tensor(weight, dtype=torch.float64, device=device) for weight in self.weights]
            weights = torch.stack(each)
        counts = weights > 0
        means = torch.where(counts, totals / torch.where(counts, weights, 1.0), 0.0)
        return torch.stack([*_digits(weights.sum()), totals.sum(), counts.double().sum(), means.sum()])


def _scale(expected: Weight, *, rounded: bool) -> float | Tensor:
    if isinstance(expected, Tensor):
        expected = expected.double()
        scale = torch.exp2(-torch.round(torch.log2(expected))) if rounded else 1.0 / expected
        return torch.where(expected > 0, scale, torch.zeros_like(expected))
    if expected <= 0:
        return 0.0
    return 2.0 ** -round(math.log2(expected)) if rounded else 1.0 / expected


def _digits(weight: Any) -> list[Any]:
    """A weight, a float or a 0-d tensor, as two digits under a third, and a fraction; of NaN or infinity, NaN."""
    whole, upper = weight // 1.0, weight // DIGIT
    top = upper // DIGIT
    return [top, upper - top * DIGIT, whole - upper * DIGIT, weight - whole]


def is_saved_term(saved: Any) -> bool:
    """Whether it is one term of a `Tally.state_dict`."""
    if not isinstance(saved, Mapping) or set(saved) != {"expected", "rounded", "losses", "factors", "weights"}:  # pyright: ignore[reportUnknownArgumentType]
        return False
    columns = saved["losses"], saved["factors"], saved["weights"]
    return (
        all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        and all(isinstance(loss, Tensor) for loss in columns[0])
        and isinstance(saved["expected"], float | int | Tensor)
    )


def counts_of(weight: Weight) -> Weight:
    """1 for a micro-batch that has weight, else 0."""
    return (weight > 0).to(torch.float32) if isinstance(weight, Tensor) else float(weight > 0)


def summed(weights: Sequence[Weight]) -> Weight:
    """Their sum: a number if the host knows all of them, else a 0-d tensor."""
    on_device = [weight for weight in weights if isinstance(weight, Tensor)]
    on_host = math.fsum(weight for weight in weights if not isinstance(weight, Tensor))
    if not on_device:
        return on_host
    # float64 counts exactly to 2^53; adding float32 counts would round beyond 2^24 tokens.
    return torch.stack(on_device).sum(dtype=torch.float64) + on_host
