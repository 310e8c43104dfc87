"""What a loss function may return, and how it is taken in."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from macrobatch.errors import LossError

__all__ = ["Loss", "Part", "Weight", "beside", "checked_counts", "taken_apart", "to_device", "to_host"]

Weight = int | float | Tensor
"""A weight known to the host, or a 0-d tensor that stays on its device."""


class Loss(NamedTuple):
    """A loss as a sum and what it is a sum over: `total / weight` is its mean.

    Several terms with different denominators are a dictionary of them: `{"tokens": Loss(...), "kl": Loss(...)}`.

    Attributes:
        total: 0-d tensor, the loss summed over its items.
        weight: how many items, >= 0: a number, or a 0-d tensor (which is not read in a micro-step).

    ```pycon
    >>> per_token = torch.tensor([1.0, 2.0, 6.0])
    >>> Loss(per_token.sum(), weight=3).mean
    tensor(3.)

    ```
    """

    total: Tensor
    weight: Weight

    @property
    def mean(self) -> Tensor:
        """0-d tensor: total / weight, and 0 where the weight is 0."""
        weight = torch.as_tensor(self.weight, dtype=self.total.dtype, device=self.total.device)
        divisor = torch.where(weight > 0, weight, torch.ones_like(weight))  # so that no gradient is 0 × ∞
        return torch.where(weight > 0, self.total / divisor, torch.zeros_like(self.total))


class Part(NamedTuple):
    """One micro-batch's share of a term: `tensor * factor` is a sum over `weight` items."""

    tensor: Tensor
    factor: float
    weight: Weight


def taken_apart(output: Any, num_samples: int) -> dict[str, Part]:
    """The terms of what a loss function returned for a micro-batch of `num_samples`.

    Raises:
        LossError: it is not a loss.
    """
    if isinstance(output, Tensor):  # a mean over samples
        return {"loss": Part(_checked_total(output), num_samples, num_samples)}
    if isinstance(output, Loss):
        return {"loss": _part(output)}
    if isinstance(output, Mapping) and output and all(isinstance(term, Loss) for term in output.values()):
        return {name: _part(term) for name, term in output.items()}
    raise LossError(
        "what loss_fn returned",
        given=f"{type(output).__name__}" + (f" with keys {list(output)}" if isinstance(output, Mapping) else ""),
        expected="a 0-d tensor (a mean over samples), a Loss(total, weight), or a dict of Loss terms",
        fix="return the loss tensor itself, for example model(**batch).loss, or Loss(total, num_tokens)",
    )


def beside(tensor: Tensor, weight: Any) -> Any:
    """A weight that is on the host as a number, if the tensor is not there: to go to it would make the host wait."""
    is_apart = isinstance(weight, Tensor) and weight.is_cpu and not tensor.is_cpu and not weight.ndim
    return weight.item() if is_apart else weight


def _part(term: Loss) -> Part:
    total = _checked_total(term.total)
    return Part(total, 1.0, _checked_weight(beside(total, term.weight)))


def _checked_total(total: object) -> Tensor:
    if isinstance(total, Tensor) and total.ndim == 0 and total.is_floating_point():
        return total
    given = f"a {total.dtype} tensor of shape {tuple(total.shape)}" if isinstance(total, Tensor) else repr(total)
    raise LossError(
        "the loss",
        given=given,
        expected="a real 0-d tensor",
        fix="reduce it: .sum() together with Loss(total, weight), or .mean() over samples",
    )


def _checked_weight(weight: object) -> Weight:
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise LossError(
            "the weight of a Loss",
            given="a tensor that depends on the parameters",
            expected="a count or a sum of constants; a quotient of two functions does not add up over micro-batches",
            fix="detach it if its gradient is not meant, or compute the loss over the whole macro-batch with TwoPass",
        )
    if isinstance(weight, Tensor) and weight.ndim == 0 and not weight.is_complex():
        return weight
    if isinstance(weight, Real) and not isinstance(weight, bool) and 0 <= weight <= sys.float_info.max:  # pyright: ignore[reportOperatorIssue]
        return float(weight)
    raise LossError(
        "the weight of a Loss",
        given=f"a tensor of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight),
        expected="a finite number >= 0 or a 0-d tensor",
        fix="pass the number of items that total is a sum over, for example (labels != -100).sum()",
    )


def checked_counts(expected: Mapping[str, Weight] | Weight | None) -> dict[str, Weight] | None:
    """Weights counted ahead, by term; a single one goes by the name "loss".

    Raises:
        LossError: one of them is not a weight.
    """
    if expected is None:
        return None
    terms: Mapping[Any, Weight] = expected if isinstance(expected, Mapping) else {"loss": expected}
    try:
        return {name: _checked_weight(weight) for name, weight in terms.items()}
    except LossError as error:
        raise LossError(
            "what count returned",
            given=error.given,
            expected="a finite number >= 0, a 0-d tensor, or a dict of them, one per term",
            fix="count over the whole macro-batch, for example lambda batch: (batch['labels'] != -100).sum()",
        ) from None


def to_host(tensors: Sequence[Tensor]) -> list[float]:
    """The values of 0-d tensors as Python numbers: one copy and one wait per device and dtype, not one per tensor."""
    values: dict[int, float] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.device.type == "cpu":
            values[i] = tensor.item()
        else:
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    for members in groups.values():
        values.update(zip(members, torch.stack([tensors[i] for i in members]).tolist(), strict=True))
    return [values[i] for i in range(len(tensors))]


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Python numbers as a tensor. The host does not wait for what the device has to do before it gets them."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
