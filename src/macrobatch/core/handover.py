"""A window that was saved under way by some ranks, to be gone on with by another number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.tally import Tally
from macrobatch.core.term import is_saved_term
from macrobatch.core.window import Window
from macrobatch.errors import StateError

__all__ = ["check_saved", "pending_of", "restore", "share_of"]


def pending_of(tally: Tally, buffer: GradientBuffer, *, is_weighted: bool | None) -> dict[str, Any]:
    """What a window has come to so far, as tensors and plain values: gradients of its own, one per parameter, with None
    for those that it has not used yet."""
    return {
        "tally": tally.state_dict(),
        "is_weighted": is_weighted,
        "is_sharded": bool(buffer.groups()),
        "gradients": [slot.local.clone() if slot.has_moved else None for slot in buffer.slots],
    }


def restore(buffer: GradientBuffer, gradients: Sequence[Tensor | None]) -> None:
    """Put the gradients of `pending_of` into a buffer that a window has begun with."""
    for slot, gradient in zip(buffer.slots, gradients, strict=True):
        if gradient is not None:
            slot.local.copy_(gradient)


def check_saved(state: Any, buffer: GradientBuffer) -> None:
    """Refuse what is not the `Accumulation.state_dict` of a window of these parameters.

    Raises:
        StateError: what is wrong with it.
    """
    problem = None
    pending = None
    if not isinstance(state, Mapping) or set(state) != {"window", "precision", "pending"}:  # pyright: ignore[reportUnknownArgumentType]
        problem = f"{state!r:.100}"
    else:
        Window(1).load_state_dict(state["window"])
        pending: Any = state["pending"]
    if pending is not None and not _is_pending(pending):
        problem = f"a window under way of {pending!r:.100}"
    elif pending is not None:
        gradients = pending["gradients"]
        shapes = [None if gradient is None else (tuple(gradient.shape), gradient.dtype) for gradient in gradients]
        places = [(tuple(slot.local.shape), slot.local.dtype) for slot in buffer.slots]
        if len(shapes) != len(places) or any(a not in (None, b) for a, b in zip(shapes, places, strict=True)):
            problem = f"{len(gradients)} gradients of other shapes or dtypes than the {len(places)} parameters"
    if problem is not None:
        raise StateError(
            "Accumulation.load_state_dict",
            given=problem,
            expected="what state_dict returned, for the same parameters",
            fix="load what was saved with the same model and optimizer",
        )


def _is_pending(pending: Any) -> bool:
    if not isinstance(pending, Mapping) or not {"tally", "is_weighted", "gradients"} <= set(pending):  # pyright: ignore[reportUnknownArgumentType]
        return False
    gradients, tally = pending["gradients"], pending["tally"]
    return (
        isinstance(gradients, list)
        and all(each is None or isinstance(each, Tensor) for each in gradients)
        and isinstance(tally, Mapping)
        and all(map(is_saved_term, tally.values()))
    )


def share_of(states: Sequence[Any], *, rank: int, world_size: int) -> Mapping[str, Any]:
    """What one rank gets of the `Accumulation.state_dict`s of all ranks that saved.

    With as many ranks as then, its own, or nothing if it had given that up. Otherwise the first rank gets the sum of
    all gradients and all weights, and the others begin with nothing, on the same scale: the window's gradient is the
    same.

    Args:
        states: in the order of the ranks that saved them; with as many ranks as then, those of others may be None.
        rank: of the one that asks.
        world_size: number of ranks now.

    Raises:
        StateError: of parameters that are spread over ranks, another number of them; or they are something else.
    """
    if not all(state is None or (isinstance(state, Mapping) and "pending" in state) for state in states):
        raise StateError(
            "a window under way",
            given=f"{states!r:.100}",
            expected="what state_dict returned, of each rank",
            fix="load what was saved with the same model and optimizer",
        )
    begun = [state["pending"] for state in states if state is not None and state["pending"] is not None]
    if len(states) == world_size:
        own = states[rank]
        return own if own["pending"] is not None or not begun else {**own, "pending": _emptied(begun[0])}
    if not begun:
        return states[0]
    if any(pending.get("is_sharded") for pending in begun):
        raise StateError(
            "a window under way",
            given=f"the gradients of {len(states)} ranks, for pieces of the parameters, on {world_size}",
            expected=f"{len(states)} ranks, as when it was saved",
            fix="go on with as many ranks, or save after an update",
        )
    pending = _merged(begun) if rank == 0 else _emptied(begun[0])
    return {**states[0], "pending": pending}


def _merged(begun: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = begun[0]
    tally = {
        name: {**term, **{key: _chained(begun, name, key) for key in ("losses", "factors", "weights")}}
        for name, term in first["tally"].items()
    }
    gradients = [_sum(column) for column in zip(*(pending["gradients"] for pending in begun), strict=True)]
    return {**first, "tally": tally, "gradients": gradients}


def _chained(begun: Sequence[Mapping[str, Any]], name: str, key: str) -> list[Any]:
    return [value for pending in begun if name in pending["tally"] for value in pending["tally"][name][key]]


def _sum(column: Sequence[Tensor | None]) -> Tensor | None:
    present = [gradient for gradient in column if gradient is not None]
    return torch.stack(present).sum(0) if present else None


def _emptied(first: Mapping[str, Any]) -> dict[str, Any]:
    tally = {
        name: {
            **term,
            "losses": [torch.zeros_like(loss) for loss in term["losses"][:1]],
            "factors": [1.0],
            "weights": [0.0],
        }
        for name, term in first["tally"].items()
    }
    return {**first, "tally": tally, "gradients": [None] * len(first["gradients"])}
