"""Proof on the user's own model that accumulation gives the whole batch's gradient, or the name of what breaks it."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.arguments import check_callables
from macrobatch.core.loss import Loss, taken_apart
from macrobatch.core.snapshot import rng_states, set_rng_states
from macrobatch.core.step import LossFn
from macrobatch.core.twopass import TwoPass
from macrobatch.diagnose import Finding, coupling_modules, loss_findings
from macrobatch.errors import ArgumentError, LossError, NonFiniteError
from macrobatch.plan.split import Split, make_split
from macrobatch.train import accumulate

__all__ = ["Report", "verify"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `verify` found.

    Attributes:
        ok: the error is within the tolerance.
        error: relative error of the gradient, ‖g − g_ref‖ / ‖g_ref‖ over all parameters.
        tolerance: largest error that passes.
        findings: what explains an error beyond it.
        worst: the parameters with the largest relative errors, by name.
    """

    ok: bool
    error: float
    tolerance: float
    findings: tuple[Finding, ...]
    worst: Mapping[str, float]

    def __str__(self) -> str:
        if self.ok:
            return f"exact: relative gradient error {self.error:.1e} (tolerance {self.tolerance:.0e})"
        lines = [f"NOT exact: relative gradient error {self.error:.1e} (tolerance {self.tolerance:.0e})"]
        lines += [f"  - {finding}" for finding in self.findings]
        lines += [f"  worst parameters: {', '.join(f'{name} {error:.1e}' for name, error in self.worst.items())}"]
        return "\n".join(lines)


_UNEXPLAINED = Finding(
    culprit="the model or the loss",
    reason="gives a sample another gradient in a micro-batch than in the whole batch, in a way not known here",
    advice="Look at the parameters named below and at what their modules do with the batch dimension, or verify with "
    "few samples and without `against`",
)


def verify(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    micro_batch: int | Split,
    against: int | Split | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-6,
) -> Report:
    """Compare the accumulated gradient with the whole batch's, in float64, on copies of the model.

    Args:
        model: in the mode (train or eval) to be proven. Neither it nor any random number generator is changed.
        loss_fn: as for `TrainStep`.
        batch: a macro-batch that fits as a whole, as float64; a few samples are enough.
        micro_batch: the split to prove.
        against: another split to compare with, if the whole batch does not fit.
        dtype: floating point tensors of model and batch are converted to it.
        tolerance: largest relative error that passes. The default is macrobatch's promise for float32; the error
            itself is around 1e-15 in float64, unless something computes in float32 on the way.

    ```pycon
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    >>> report = verify(model, lambda model, x: model(x).square().mean(), torch.randn(6, 3), micro_batch=2)
    >>> report.ok, [finding.culprit for finding in report.findings]
    (False, ['BatchNorm1d at model.1'])

    ```
    """
    check_callables(model, loss_fn, None)
    if not any(param.requires_grad for param in model.parameters()):
        raise ArgumentError("model", given="no parameter that requires grad", expected="one", fix="unfreeze a part")
    batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)
    split = make_split(micro_batch)
    sizes = [num_rows for _, num_rows in split.split(batch)]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), _put_back(model):
        trial = copy.deepcopy(model).to(dtype)
        reference = _reference(copy.deepcopy(trial), loss_fn, batch, None if against is None else make_split(against))
        findings: list[Finding] = []
        try:
            errors = _errors(_accumulated(copy.deepcopy(trial), loss_fn, batch, split), reference)
        except (RuntimeError, ValueError, IndexError) as raised:  # the reference went through, a part does not
            errors = dict.fromkeys(reference, math.inf)
            findings = [_raising(raised)]
        error = _total(errors, reference)
        ok = error <= tolerance
        if not ok:
            if against is not None:  # the batch does not fit as a whole, but each of these parts does
                batch, _ = make_split(against).split(batch)[0]
                sizes = [num_rows for _, num_rows in split.split(batch)]
            found = coupling_modules(trial, loss_fn, batch, sizes)
            findings += found or loss_findings(trial, loss_fn, batch, sizes)
            findings = findings or [_UNEXPLAINED]
    relative = {name: e / (float(reference[name].norm()) or 1.0) for name, e in errors.items()}
    worst = dict(sorted(relative.items(), key=lambda item: -item[1])[:3])
    return Report(ok=ok, error=error, tolerance=tolerance, findings=tuple(findings), worst=worst)


@contextmanager
def _put_back(model: nn.Module) -> Generator[None]:
    """For a loss that draws on the host, or closes over a part of the very model that is being proven."""
    host = torch.device("cpu")
    states, held = rng_states(host), [(param, param.grad) for param in model.parameters()]
    for param, _ in held:
        param.grad = None
    try:
        yield
    finally:
        set_rng_states(host, states)
        for param, gradient in held:
            param.grad = gradient


def _reference(model: nn.Module, loss_fn: LossFn, batch: Any, split: Split | None) -> dict[str, Tensor]:
    model.zero_grad()
    if split is None:
        loss = _whole(loss_fn(model, batch), tree.num_rows(batch))
        if not loss.isfinite():
            raise NonFiniteError(
                "the reference",
                given="a NaN or infinite loss of the batch itself",
                expected="finite numbers to compare with",
                fix="look at the loss of this batch, or verify with another one",
            )
        if loss.requires_grad:
            loss.backward()
        gradients = _gradients(model)
    else:
        gradients = _accumulated(model, loss_fn, batch, split)
    if all(param.grad is None for param in model.parameters()):
        raise LossError(
            "the loss",
            given="one that none of the model's parameters takes part in",
            expected="a loss that depends on the model that loss_fn gets",
            fix="compute it from that model, not from one that loss_fn closes over",
        )
    if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
        raise NonFiniteError(
            "the reference",
            given="a NaN or infinite gradient of the batch itself",
            expected="finite numbers to compare with",
            fix="look at the loss of this batch, or verify with another one",
        )
    return gradients


def _raising(raised: Exception) -> Finding:
    return Finding(
        culprit="a micro-batch",
        reason=f"raises {type(raised).__name__} where the whole batch does not: {str(raised).rstrip('.')}",
        advice="Make model and loss work for micro-batches of any size, the short last one too",
    )


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(param) if param.grad is None else param.grad.to_dense()
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def _accumulated(model: nn.Module, loss_fn: LossFn, batch: Any, split: Split) -> dict[str, Tensor]:
    weights = _weights(copy.deepcopy(model), loss_fn, [part for part, _ in split.split(batch)])
    accumulate(model, loss_fn, batch, micro_batch=split, count=None if weights is None else lambda _: weights)
    return _gradients(model)


def _weights(model: nn.Module, loss_fn: LossFn, parts: list[Any]) -> dict[str, float] | None:
    """Weights of a loss with several terms, which have to be known before the first backward."""
    weights: dict[str, float] = {}
    with torch.no_grad():
        for part in parts:
            output = None if isinstance(loss_fn, TwoPass) else loss_fn(model, part)
            if not isinstance(output, Mapping):
                return None
            for name, term in taken_apart(output, tree.num_rows(part)).items():
                weights[name] = weights.get(name, 0.0) + float(term.weight)
    return weights


def _whole(output: Any, num_samples: int) -> Tensor:
    """The mean loss of the whole batch, by plain PyTorch."""
    taken_apart(output, num_samples)  # refuses what is no loss
    terms = output.values() if isinstance(output, Mapping) else [output]
    return torch.stack([term.mean if isinstance(term, Loss) else term for term in terms]).sum()


def _errors(gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((gradients[name] - reference[name]).norm()) for name in reference}


def _total(errors: Mapping[str, float], reference: Mapping[str, Tensor]) -> float:
    scale = math.hypot(*(float(gradient.norm()) for gradient in reference.values()))
    return math.hypot(*errors.values()) / (scale or 1.0)
