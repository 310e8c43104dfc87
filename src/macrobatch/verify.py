"""Proof on the user's own model that accumulation gives the whole batch's gradient, or the name of what breaks it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.core.loss import Loss
from macrobatch.core.step import LossFn
from macrobatch.diagnose import Finding, coupling_modules, loss_findings
from macrobatch.errors import LossError
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
    batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)
    sizes = [num_rows for _, num_rows in make_split(micro_batch).split(batch)]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        trial = copy.deepcopy(model).to(dtype)
        reference = _whole(copy.deepcopy(trial), loss_fn, batch) if against is None else None
        if reference is None:
            reference = _split(copy.deepcopy(trial), loss_fn, batch, make_split(against))
        findings: list[Finding] = []
        try:
            errors = _errors(_split(copy.deepcopy(trial), loss_fn, batch, make_split(micro_batch)), reference)
        except (RuntimeError, ValueError, IndexError) as raised:  # the whole batch went through, a part does not
            errors = dict.fromkeys(reference, math.inf)
            findings = [
                Finding(
                    culprit="a micro-batch",
                    reason=f"raises {type(raised).__name__} where the whole batch does not: {str(raised).rstrip('.')}",
                    advice="Make model and loss work for micro-batches of any size, the short last one too",
                )
            ]
        error = _total(errors, reference)
        ok = error <= tolerance
        if not ok:
            guilty = coupling_modules(trial, loss_fn, batch, sizes)
            findings += guilty or loss_findings(trial, loss_fn, batch, sizes)
    relative = {name: e / (float(reference[name].norm()) or 1.0) for name, e in errors.items()}
    worst = dict(sorted(relative.items(), key=lambda item: -item[1])[:3])
    return Report(ok=ok, error=error, tolerance=tolerance, findings=tuple(findings), worst=worst)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(param) if param.grad is None else param.grad.to_dense()
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def _whole(model: nn.Module, loss_fn: LossFn, batch: Any) -> dict[str, Tensor]:
    """The whole batch's gradient by plain PyTorch, without any code of the core."""
    model.zero_grad()
    sum(_means(loss_fn(model, batch)), torch.zeros(())).backward()
    return _gradients(model)


def _split(model: nn.Module, loss_fn: LossFn, batch: Any, split: Split) -> dict[str, Tensor]:
    output = loss_fn(copy.deepcopy(model), batch)
    names = list(output) if isinstance(output, Mapping) else [None]
    total: dict[str, Tensor] = {}
    for name in names:  # term by term, each with its own denominator
        pick: LossFn = loss_fn if name is None else (lambda m, b, name=name: loss_fn(m, b)[name])
        accumulate(model, pick, batch, micro_batch=split)
        for key, grad in _gradients(model).items():
            total[key] = total[key] + grad if key in total else grad
    return total


def _means(output: Any) -> list[Tensor]:
    if isinstance(output, Loss):
        return [output.mean]
    if isinstance(output, Mapping):
        return [term.mean for term in output.values()]
    if isinstance(output, Tensor) and not output.ndim:
        return [output]
    raise LossError(
        "what loss_fn returned",
        given=f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__,
        expected="a 0-d tensor, a Loss or a dict of Loss terms",
        fix="return the loss tensor itself",
    )


def _errors(gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((gradients[name] - reference[name]).norm()) for name in reference}


def _total(errors: Mapping[str, float], reference: Mapping[str, Tensor]) -> float:
    scale = math.hypot(*(float(gradient.norm()) for gradient in reference.values()))
    return math.hypot(*errors.values()) / (scale or 1.0)
