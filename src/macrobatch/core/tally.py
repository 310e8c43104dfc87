"""The weights and losses of one window: the one place of the package that divides.

Each backward starts from the factor that would be right if the window turned out as expected (`Tally.admit`); the
close multiplies the gradient once by what is missing (`Tally.correction`), which is exactly 1 when nothing is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from macrobatch.core.loss import Part, Weight, beside, checked_counts, taken_apart, to_device, to_host
from macrobatch.core.term import DIGIT, Seeds, Term, counts_of, summed
from macrobatch.core.weighting import Constant, Exact, Normalize, Uniform
from macrobatch.errors import LossError

__all__ = ["NUM_SUMS", "Seeds", "Tally"]

_MAX_TERMS = 8
_HEAD = 4
_PER_TERM = 7
NUM_SUMS = _HEAD + _PER_TERM * _MAX_TERMS
"""How many numbers `Tally.pack` returns."""


class Tally:
    """The weights and losses of one window.

    Args:
        policy: what to divide by.
        expected: the weight the whole window should have, one per term or one for the only term, from a count made
            ahead. None if nobody counted.
        guess: the weight to expect where nobody counted; a power-of-ten error in it costs nothing but fp16 range.
        num_micro_batches: how many there will be, or None if that is not known.
        seeds: a cache shared between windows.
    """

    __slots__ = ("_counted", "_everywhere", "_guess", "_num", "_policy", "_read", "_seeds", "terms")

    def __init__(
        self,
        policy: Normalize,
        *,
        expected: Mapping[str, Weight] | Weight | None = None,
        guess: float,
        num_micro_batches: int | None,
        seeds: Seeds | None = None,
    ) -> None:
        self._policy = policy
        self._counted = checked_counts(expected)
        self._guess = guess
        self._num = num_micro_batches
        self._seeds = seeds or Seeds()
        self._read: dict[str, tuple[float, float]] | None = None
        self._everywhere: dict[str, tuple[float, float]] | None = None
        self.terms: dict[str, Term] = {}

    def admit(self, output: Any, num_samples: int) -> tuple[list[Tensor], list[Tensor]]:
        """Take in what a loss function returned for one micro-batch of `num_samples` samples.

        Returns:
            The tensors to run backward from, and the gradient each of them starts with (0-d, same dtype and device).

        Raises:
            LossError: the output is not a loss.
        """
        parts = taken_apart(output, num_samples)
        self.begin(parts)
        tensors = [part.tensor for part in parts.values() if part.tensor.requires_grad]
        seeds = self.over_weights(parts, self.seeds(parts))
        self.note(parts)
        if not tensors and any(not isinstance(part.weight, float) or part.weight for part in parts.values()):
            raise LossError(
                "the loss",
                given="a tensor that does not require grad",
                expected="a loss that depends on the model's trainable parameters",
                fix="compute it from the model's output, without detach(), item() or no_grad()",
            )
        return tensors, seeds

    def begin(self, parts: Mapping[str, Part]) -> None:
        """Open the window's terms with those of its first micro-batch; later ones must have the same.

        Raises:
            LossError: they have not.
        """
        if not self.terms:
            self._open(parts)
        elif parts.keys() != self.terms.keys():
            raise _term_error(parts, self.terms)

    def seeds(self, parts: Mapping[str, Part]) -> list[Tensor]:
        """What the backward of each part that requires grad starts from, as far as that is known before the forward
        (0-d, the part's dtype and device). Once per window is enough for parts that differ in nothing but numbers on
        the device."""
        return [
            self._seed(self.terms[name], part.tensor, part.factor, part.weight)
            for name, part in parts.items()
            if part.tensor.requires_grad
        ]

    def over_weights(self, parts: Mapping[str, Part], seeds: list[Tensor]) -> list[Tensor]:
        """`seeds`, made what they should be where each micro-batch enters with its mean over a weight on the device."""
        if isinstance(self._policy, Exact):
            return seeds
        weights = [part.weight for part in parts.values() if part.tensor.requires_grad]
        return [
            torch.where(weight > 0, seed / weight.to(seed.dtype), torch.zeros_like(seed))
            if isinstance(weight, Tensor)
            else seed
            for weight, seed in zip(weights, seeds, strict=True)
        ]

    def note(self, parts: Mapping[str, Part]) -> None:
        """Keep the losses and weights of one micro-batch, for whoever reads them when the window is over."""
        self._read = None
        for name, (tensor, factor, weight) in parts.items():
            term = self.terms[name]
            # A loss that is a parameter, or a view of one, would change with it before anybody reads it.
            shares = tensor.grad_fn is None or tensor._is_view()
            term.tensors.append(tensor.detach().clone() if shares else tensor.detach())
            term.factors.append(factor)
            term.weights.append(weight)

    def join(self, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Take in a further loss over the items that were admitted last, as if both had been added up before."""
        (term,) = self.terms.values()
        _, factor, weight = taken_apart(loss, 1)["loss"]._replace(factor=term.factors[-1], weight=term.weights[-1])
        self._read = None
        term.tensors[-1] = term.tensors[-1] + loss.detach()
        return ([loss], [self._seed(term, loss, factor, weight).to(loss)]) if loss.requires_grad else ([], [])

    def rehearse(self, output: Any, num_samples: int) -> tuple[list[Tensor], list[Tensor]]:
        """As `admit`, for a micro-batch that counts nothing: its backward starts from zero."""
        tensors = [part.tensor for part in taken_apart(output, num_samples).values() if part.tensor.requires_grad]
        return tensors, [torch.zeros_like(tensor) for tensor in tensors]

    def weights(self) -> dict[str, Weight]:
        """The weight the window has seen so far, per term: a number if all of it was known to the host."""
        if self._everywhere is not None:
            return {name: weight for name, (weight, _) in self._everywhere.items()}
        return {name: summed(term.weights) for name, term in self.terms.items()}

    def pack(self, dtype: torch.dtype, device: torch.device) -> Tensor | list[float]:
        """What other ranks need of this one's tally, as `NUM_SUMS` numbers that may be added up over ranks: a list if
        the device is the host.

        For the rank: whether it has terms, how many, a checksum of their names, whether their scale is a power of two.
        For each term: its weight, the sum of its losses, its micro-batches with weight, the sum of their means. A
        weight is cut into digits of 12 bits, which float32 adds up exactly over 4,096 ranks, and a fraction.
        """
        if not self.terms:
            return [0.0] * NUM_SUMS
        if len(self.terms) > _MAX_TERMS:
            raise LossError(
                "the loss",
                given=f"{len(self.terms)} terms",
                expected=f"at most {_MAX_TERMS} over several ranks",
                fix="add up terms that share a weight",
            )
        rounded = any(term.rounded for term in self.terms.values())
        head = [1.0, float(len(self.terms)), _checksum(self.terms), float(rounded)]
        if device.type == "cpu":
            numbers = head + [number for term in self.terms.values() for number in term.sums_on_host()]
            return numbers + [0.0] * (NUM_SUMS - len(numbers))
        sums = [to_device(head, torch.float64, device)]
        sums += [term.sums(device) for term in self.terms.values()]
        return F.pad(torch.cat(sums), (0, NUM_SUMS - _HEAD - _PER_TERM * len(self.terms))).to(dtype)

    def absorb(self, sums: Sequence[float]) -> None:
        """Take over what the tallies of all ranks add up to; loss, weight and correction are then the same on all.

        Raises:
            LossError: the ranks do not agree on the loss's terms or its dtype.
        """
        num_ranks, num_terms, checksum, num_rounded = sums[:_HEAD]
        names = _checksum(self.terms)
        if num_ranks and not self.terms:
            self._open_unseen(round(num_terms / num_ranks), rounded=bool(num_rounded))
            names = checksum / num_ranks
        mine = [1.0, len(self.terms), names, float(any(t.rounded for t in self.terms.values()))]
        if not all(math.isclose(a * num_ranks, b, rel_tol=1e-5) for a, b in zip(mine, sums[:_HEAD], strict=True)):
            raise LossError(
                "the loss",
                given=f"the terms {sorted(self.terms)} on this rank and others, or of another dtype, on other ranks",
                expected="the same terms in the same dtype on every rank",
                fix="let loss_fn return every term on every rank; one that does not apply has total 0 and weight 0",
            )
        if len(self.terms) > 1 and isinstance(self._policy, Uniform):
            raise _uniform_error(f"{len(self.terms)} terms over several ranks")
        self._everywhere, self._read = {}, {}
        for index, name in enumerate(self.terms):
            begin = _HEAD + _PER_TERM * index
            top, upper, lower, fraction, total, num_weighted, means = sums[begin : begin + _PER_TERM]
            weight = (top * DIGIT + upper) * DIGIT + lower + fraction
            self._everywhere[name] = (weight, num_weighted)
            match self._policy:
                case Exact():
                    mean = total / weight if weight else 0.0
                case Uniform():
                    mean = means / num_weighted if num_weighted else 0.0
                case Constant(n):
                    mean = means / n
            self._read[name] = (mean, weight)

    def correction(self, weights: Mapping[str, Weight]) -> float | Tensor:
        """What the accumulated gradient has to be multiplied by; the number 1 if by nothing.

        Args:
            weights: of the whole window, over all ranks if there are several.

        Raises:
            LossError: a weight differs from the one counted ahead.
        """
        if isinstance(self._policy, Exact):
            for name, term in self.terms.items():
                if term.promised:
                    _check_promise(name, term.expected, weights[name])
        if len(self.terms) > 1:
            return 1.0
        (term,), (weight,) = self.terms.values(), weights.values()
        due, scale = self._denominator(term, weight), term.scale
        if isinstance(due, Tensor) or isinstance(scale, Tensor):
            product: Any = due * scale
            return torch.where(product > 0, 1 / product, torch.zeros_like(product))
        return 1.0 if not due or 1.0 / due == scale else 1.0 / (due * scale)

    def read(self) -> dict[str, tuple[float, float]]:
        """Mean loss and weight of every term, as the policy averages them. Waits for the device, once."""
        if self._read is not None:
            return self._read
        terms = self.terms.values()
        tensors = [tensor for term in terms for tensor in term.tensors]
        on_device = [weight for term in terms for weight in term.weights if isinstance(weight, Tensor)]
        numbers = to_host([*tensors, *on_device] if on_device else tensors)
        totals, weights = iter(numbers), iter(numbers[len(tensors) :])
        self._read = {
            name: self._mean(
                [factor * total for factor, total in zip(term.factors, totals, strict=False)],
                [next(weights) if isinstance(weight, Tensor) else weight for weight in term.weights],
            )
            for name, term in self.terms.items()
        }
        return self._read

    def state_dict(self) -> dict[str, Any]:
        """The window so far, as tensors and plain values."""
        return {
            name: {
                "expected": term.expected,
                "rounded": term.rounded,
                "losses": [tensor.detach().cpu() for tensor in term.tensors],
                "factors": list(term.factors),
                "weights": list(term.weights),
            }
            for name, term in self.terms.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with a window that was begun elsewhere, with the scale that it was begun with."""
        for name, saved in state.items():
            losses = [loss.to(device) for loss in saved["losses"]]
            like = losses[0] if losses else torch.zeros((), device=device)
            term = Term(saved["expected"], promised=False, rounded=saved["rounded"], seeds=self._seeds.like(like))
            term.tensors, term.factors, term.weights = losses, list(saved["factors"]), list(saved["weights"])
            self.terms[name] = term

    def first_nonfinite(self) -> int | None:
        """Index of the first micro-batch whose loss is NaN or infinite. Waits for the device."""
        columns = [to_host(term.tensors) for term in self.terms.values()]
        bad = [i for i, row in enumerate(zip(*columns, strict=True)) if not all(map(math.isfinite, row))]
        return bad[0] if bad else None

    def _mean(self, totals: list[float], weights: list[float]) -> tuple[float, float]:
        if min(weights) < 0:
            raise LossError(
                "the weight of a Loss", given=min(weights), expected="a number >= 0", fix="count items, each once"
            )
        weight = math.fsum(weights)
        if isinstance(self._policy, Exact):
            return (math.fsum(totals) / weight if weight else 0.0), weight
        means = [total / w for total, w in zip(totals, weights, strict=True) if w]
        if isinstance(self._policy, Uniform) and len(self.terms) > 1 and len(means) < len(weights):
            raise _uniform_error(f"{len(self.terms)} terms, one of them without weight in a micro-batch,")
        num = self._policy.num_micro_batches if isinstance(self._policy, Constant) else len(means)
        return (math.fsum(means) / num if means else 0.0), weight

    def _denominator(self, term: Term, weight: Weight) -> Weight:
        match self._policy:
            case Exact():
                return weight
            case Uniform():
                return self._num_weighted(term)
            case Constant(n):
                return n

    def _open(self, parts: Mapping[str, Part]) -> None:
        counted = self._counted if self._counted is not None else {}
        if len(parts) == 1 and len(counted) == 1:
            counted = dict(zip(parts, counted.values(), strict=True))
        if isinstance(self._policy, Exact) and (counted or len(parts) > 1) and parts.keys() != counted.keys():
            raise LossError(
                "the loss",
                given=f"{len(parts)} terms {sorted(parts)} with weights counted ahead for {sorted(counted)}",
                expected="a weight counted over the whole macro-batch for each term, before the first backward",
                fix="pass count=lambda batch: {term: weight of the macro-batch, ...} with these names, "
                "or add the terms up if they share a weight",
            )
        if isinstance(self._policy, Uniform) and self._num is None and len(parts) > 1:
            raise LossError(
                "the loss",
                given=f"{len(parts)} terms, in a stream of unknown length",
                expected='the number of micro-batches, to give each the same share (normalize="uniform")',
                fix='pass the micro-batches as a list, or leave normalize at "exact"',
            )
        for name, part in sorted(parts.items()):  # in one order on all ranks
            self.terms[name] = self._term(
                beside(part.tensor, counted.get(name)),
                # A power of two survives the rounding of a 16-bit loss; the correction at the close, in the
                # gradient's precision, supplies the rest.
                rounded=len(parts) == 1 and part.tensor.dtype in (torch.bfloat16, torch.float16),
                seeds=self._seeds.like(part.tensor),
            )

    def _open_unseen(self, num_terms: int, *, rounded: bool) -> None:
        """Open the terms that only other ranks have seen."""
        counted = self._counted or {}
        for name in sorted(counted) if len(counted) == num_terms else [f"loss {i}" for i in range(num_terms)]:
            self.terms[name] = self._term(counted.get(name), rounded=rounded, seeds={})

    def _term(self, counted: Weight | None, *, rounded: bool, seeds: dict[float, Tensor]) -> Term:
        match self._policy:
            case Exact():
                expected = self._guess if counted is None else counted
            case Uniform():
                expected = self._num or 1
            case Constant(n):
                expected = n
        return Term(expected, promised=counted is not None, rounded=rounded, seeds=seeds)

    def _num_weighted(self, term: Term) -> Weight:
        if self._everywhere is not None:
            return next(num for name, (_, num) in self._everywhere.items() if self.terms[name] is term)
        return summed(list(map(counts_of, term.weights)))

    def _seed(self, term: Term, tensor: Tensor, factor: float, weight: Weight) -> Tensor:
        scale = term.scale
        if not isinstance(self._policy, Exact) and not isinstance(weight, Tensor):
            factor = factor / weight if weight else 0.0  # each micro-batch enters with its mean
        if isinstance(scale, Tensor):
            return (scale * factor).to(tensor)
        seed = term.seeds.get(scale * factor)
        if seed is None:
            seed = term.seeds[scale * factor] = torch.full((), scale * factor, dtype=tensor.dtype, device=tensor.device)
        return seed


def _checksum(names: Iterable[str]) -> float:
    return float(zlib.crc32("\0".join(names).encode()) % 2**14)  # adds up exactly in float32, over 1,024 ranks


def _check_promise(name: str, expected: Weight, seen: Weight) -> None:
    if isinstance(seen, Tensor):
        return
    expected = float(expected)
    are_counts = expected.is_integer() and seen == int(seen)
    if expected == seen or (not are_counts and math.isclose(expected, seen, rel_tol=1e-6)):
        return
    raise LossError(
        f"the weight of the term {name!r}",
        given=f"{seen} over the window, {float(expected)} counted ahead",
        expected="the same number",
        fix="let count and loss_fn count the same items (mind labels that a causal model shifts away)",
    )


def _uniform_error(terms: str) -> LossError:
    return LossError(
        "the loss",
        given=f'{terms} with normalize="uniform"',
        expected="a denominator that is known before the first backward: how many micro-batches have weight in a term",
        fix='leave normalize at "exact" and pass count, pass Constant(n), or add the terms up',
    )


def _term_error(parts: Mapping[str, Part], terms: Mapping[str, Term]) -> LossError:
    return LossError(
        "the terms of the loss",
        given=sorted(parts),
        expected=f"{sorted(terms)}, as in the window's first micro-batch",
        fix="return every term for every micro-batch; one that does not apply has total 0 and weight 0",
    )
