"""Why an accumulated gradient is not the whole batch's: which module couples samples, or what is wrong with the loss.

A module is put to the test alone. It gets the input that it had in a forward of the whole batch, once whole and once
cut into micro-batches; if it is fit for accumulation, both give the same rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.core.loss import Loss
from macrobatch.core.step import LossFn
from macrobatch.core.twopass import TwoPass
from macrobatch.errors import ArgumentError, BatchError

__all__ = ["Finding", "coupling_modules", "loss_findings"]

_CLOSE = 1e-4  # float32 on the way may cost 1e-7; what couples samples costs 1e-2 and more


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that keeps the accumulated gradient from being the whole batch's.

    Attributes:
        culprit: a module's path in the model and its class, or the loss.
        reason: what it does.
        advice: what to do about it.
    """

    culprit: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.culprit}: {self.reason}. {self.advice}."


Call = tuple[tuple[Any, ...], dict[str, Any]]


def coupling_modules(model: nn.Module, loss_fn: LossFn, batch: Any, sizes: Sequence[int]) -> list[Finding]:
    """The innermost modules whose output for a sample depends on the rest of its batch.

    Args:
        model: a copy to experiment on.
        loss_fn: as for `TrainStep`.
        batch: the macro-batch.
        sizes: rows of each micro-batch.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, Call] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.setdefault(module, (args, kwargs)) and None, with_kwargs=True
        )
        for module in names
    ]
    with torch.no_grad():
        loss_fn(model, batch)
    for handle in handles:
        handle.remove()
    found: list[Finding] = []
    guilty: list[str] = []
    for module in sorted(calls, key=lambda module: -names[module].count(".") - bool(names[module])):
        name = names[module]
        if any(inner.startswith(f"{name}." if name else "") for inner in guilty):
            continue
        finding = _tested(module, f"{type(module).__name__} at model{'.' if name else ''}{name}", calls[module], sizes)
        if finding is not None:
            guilty.append(name or "model")
            found.append(finding)
    return found


def loss_findings(model: nn.Module, loss_fn: LossFn, batch: Any, sizes: Sequence[int]) -> list[Finding]:
    """What is wrong with a loss whose model is fit for accumulation."""
    if isinstance(loss_fn, TwoPass):
        return []
    with torch.no_grad():
        whole = _terms(loss_fn(copy.deepcopy(model), batch))
        try:
            parts = [_terms(loss_fn(copy.deepcopy(model), part)) for part in tree.split(batch, sizes)]
        except (RuntimeError, ValueError, IndexError):  # reported already: a micro-batch does not go through
            return []
    return [
        finding
        for name, (total, weight) in whole.items()
        for finding in [_loss_finding(name, total, weight, [part.get(name, (0.0, 0.0)) for part in parts], sizes)]
        if finding is not None
    ]


def _tested(module: nn.Module, culprit: str, call: Call, sizes: Sequence[int]) -> Finding | None:
    args, kwargs = call
    try:
        cut = tree.split((args, kwargs), sizes)
    except (BatchError, ArgumentError):  # an input without the batch's rows: nothing to cut
        return None

    def rows(calls: list[Call]) -> Tensor | None:
        with torch.no_grad():
            outputs = [copy.deepcopy(module)(*a, **k) for a, k in calls]
        leaves = [[leaf for leaf in tree.leaves(o) if isinstance(leaf, Tensor) and leaf.ndim] for o in outputs]
        if not leaves[0] or sum(part[0].shape[0] for part in leaves) != sum(sizes):
            return None
        return torch.cat([part[0] for part in leaves]).double()

    whole, again = rows([call]), rows([call])
    try:
        parts = rows(cut)
    except (RuntimeError, ValueError, IndexError):  # it takes the whole batch and refuses a part
        parts = torch.full((), torch.nan) if _is_batch_norm(module) else None
    if whole is None or again is None or parts is None or _agree(whole, parts):
        return None
    if not _agree(whole, again):
        return Finding(
            culprit=culprit,
            reason="draws random numbers, and a micro-batch draws others than the whole batch does",
            advice="That is no error of accumulation; prove the rest in eval() or with its probability at 0",
        )
    if _is_batch_norm(module):
        return Finding(
            culprit=culprit,
            reason="normalises with the statistics of each micro-batch instead of the macro-batch's",
            advice="Use GroupNorm or LayerNorm, or freeze its statistics with eval()",
        )
    return Finding(
        culprit=culprit,
        reason="gives a sample another output when it stands in another batch",
        advice="Let it treat each sample by itself, or compute it over the whole macro-batch with TwoPass",
    )


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm)


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    alike = (one == other) | (one.isnan() & other.isnan())  # masked logits are -inf on both sides
    return bool((one - other)[~alike].norm() <= _CLOSE * one[one.isfinite()].norm())


def _terms(output: Any) -> dict[str, tuple[float, float | None]]:
    if isinstance(output, Tensor):
        return {"loss": (float(output), None)}
    terms: Mapping[str, Loss] = {"loss": output} if isinstance(output, Loss) else output
    return {name: (float(term.total), float(term.weight)) for name, term in terms.items()}


def _loss_finding(
    name: str, total: float, weight: float | None, parts: list[tuple[float, float | None]], sizes: Sequence[int]
) -> Finding | None:
    culprit = f"the loss term {name!r}" if name != "loss" else "the loss"

    def close(a: float, b: float) -> bool:
        return abs(a - b) <= _CLOSE * max(abs(a), abs(b))

    summed = sum(part for part, _ in parts)
    if weight is None:
        if close(total, sum(part * size for (part, _), size in zip(parts, sizes, strict=True)) / sum(sizes)):
            return None
        if close(total, summed):
            return Finding(
                culprit=culprit,
                reason="is a sum over samples, but a bare tensor is taken as their mean",
                advice="Return Loss(loss, num_samples), or reduce it with mean()",
            )
        return Finding(
            culprit=culprit,
            reason="is not a mean over samples: it averages over something else, or couples them",
            advice="Return Loss(sum, weight) with the number of tokens or pixels it averages over (cross_entropy of "
            "this package does); if it couples samples (contrastive, Dice), use TwoPass",
        )
    weights = [part or 0.0 for _, part in parts]
    if not close(weight, sum(weights)):
        return Finding(
            culprit=culprit,
            reason=f"has the weight {weight:g} as a whole and {sum(weights):g} in parts",
            advice="Count the items that its total is a sum over; weights of parts must add up",
        )
    if close(total, summed):
        return None
    means = sum(part * w for (part, _), w in zip(parts, weights, strict=True))
    if close(total * weight, means):
        return Finding(
            culprit=culprit,
            reason="has a mean for its total, where a sum belongs",
            advice="Return Loss(mean * weight, weight), or reduce it with sum()",
        )
    return Finding(
        culprit=culprit,
        reason="does not add up: the total of the batch is not the sum over its parts",
        advice="If it couples samples (contrastive, Dice), use TwoPass",
    )
