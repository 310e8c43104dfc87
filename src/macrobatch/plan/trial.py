"""Whether a replay does what running the code does: both, from the same state, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from macrobatch.core.gradients import Slot
from macrobatch.core.loss import Part, to_host
from macrobatch.core.microstep import MicroStep
from macrobatch.core.snapshot import Snapshot
from macrobatch.core.tally import Tally

__all__ = ["COARSE", "FLOAT32", "FLOAT64", "bound_for", "disagreement", "distance"]

FLOAT64, FLOAT32, COARSE = 1e-10, 1e-3, 3e-2
"""How far a replayed micro-batch's gradient may be from the eager one's, relative to it. Both run the same kernels, and
some of these add up in an order of their own: that is 1e-16 in float64, 1e-7 in float32, and where it makes an
operand round to another neighbour, up to 5e-4 in TF32 and 4e-3 in bfloat16. Another branch, another dropout mask or a
stale input is off by tenths and more."""


def bound_for(step: MicroStep, losses: Sequence[Tensor]) -> float:
    """The bound for the dtypes of a model, its losses and its autocast."""
    dtypes = {slot.param.dtype for slot in step.gradients.slots} | {loss.dtype for loss in losses}
    if dtypes <= {torch.float64, torch.complex128}:
        return FLOAT64
    with step.precision.forward():
        is_coarse = torch.is_autocast_enabled(step.device.type)
    return COARSE if is_coarse or dtypes & {torch.bfloat16, torch.float16} else FLOAT32


def disagreement(
    step: MicroStep,
    *,
    replay: Callable[[], None],
    parts: Mapping[str, Part],
    used: Sequence[Slot],
    eager: Callable[[], None],
    tally: Tally,
) -> str | None:
    """Run a micro-batch by its replay and then, from the same state, eagerly; the eager one counts.

    Args:
        step: whose gradients, module buffers and generators both runs change.
        replay: what is on trial.
        parts: where it leaves losses and weights.
        used: parameters that it says it uses.
        eager: admits losses and weights to the tally.

    Returns:
        How they differ, if they do: the rest of a sentence that begins with "since".
    """
    before = [flat.numbers.clone() for flat in step.gradients.flats]
    state = Snapshot(step.model, step.device)
    replay()
    found = [flat.numbers.clone() for flat in step.gradients.flats]
    claimed = [part.tensor.detach().clone() for part in parts.values()]
    weights = [torch.as_tensor(part.weight).double().clone() for part in parts.values()]
    state.restore()
    for flat, numbers in zip(step.gradients.flats, before, strict=True):
        flat.numbers.copy_(numbers)
    versions = [slot.local._version for slot in step.gradients.slots]
    eager()
    moved = [s for s, version in zip(step.gradients.slots, versions, strict=True) if s.local._version != version]
    terms = [tally.terms[name] for name in parts]
    bound = bound_for(step, claimed)
    if [id(slot) for slot in moved] != [id(slot) for slot in used]:
        return f"a replay uses {len(used)} parameters where the code uses {len(moved)}, or others"
    pairs = zip(to_host(claimed), to_host([term.tensors[-1] for term in terms]), strict=True)
    for claim, truth in pairs:
        if math.isfinite(truth) and not abs(claim - truth) <= bound * max(abs(truth), 1e-3):
            return f"a replayed micro-batch has the loss {claim:.6g} where the code has {truth:.6g}"
    true_weights = [torch.as_tensor(term.weights[-1]).double() for term in terms]
    for claim, truth in zip(to_host(weights), to_host(true_weights), strict=True):
        if not math.isclose(claim, truth, rel_tol=1e-6):
            return f"a replayed micro-batch has the weight {claim:g} where the code has {truth:g}"
    return _far_apart(step, before, found, bound)


def _far_apart(step: MicroStep, before: list[Tensor], found: list[Tensor], bound: float) -> str | None:
    now = [flat.numbers for flat in step.gradients.flats]
    rounding = max(torch.finfo(numbers.dtype).eps for numbers in now)
    off = _norm([a.sub_(b) for a, b in zip(found, now, strict=True)])
    size = _norm([a.sub_(b) for a, b in zip(before, now, strict=True)])
    whole = _norm(now)
    # What the window had before was rounded too, in both.
    if not math.isfinite(size) or off <= bound * size + 4 * rounding * whole:
        return None
    distance = off / size if size else math.inf
    return f"a replayed micro-batch's gradient is {distance:.1e} from the code's, beyond {bound:.0e}"


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """How far two gradients are apart, relative to the other's norm. Overwrites the one."""
    size = _norm(list(other))
    off = _norm([a.sub_(b) for a, b in zip(one, other, strict=True)])
    return off / size if size else math.inf if off else 0.0


def _norm(parts: list[Tensor]) -> float:
    return math.hypot(*to_host([torch.linalg.vector_norm(part, dtype=_wide(part)) for part in parts]))


def _wide(part: Tensor) -> torch.dtype:
    return torch.complex128 if part.is_complex() else torch.float64
