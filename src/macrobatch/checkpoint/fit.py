"""Whether what a checkpoint holds fits: found out before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from macrobatch.errors import StateError

__all__ = ["check_optimizer", "check_scheduler"]


def check_optimizer(what: str, optimizer: Any, state: Any) -> None:
    """Refuse what is not the state of such an optimizer, for such parameters.

    Args:
        what: is loading, for the error.
        optimizer: itself, not what wraps it.
        state: for its `load_state_dict`.

    Raises:
        StateError: it is something else.
    """
    own = optimizer.param_groups
    sizes = [len(group["params"]) for group in own]
    groups: Any = state.get("param_groups") if isinstance(state, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    given = f"{type(state).__name__}, not an optimizer's state"
    if isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups):  # pyright: ignore[reportUnknownVariableType]
        saved = [len(group["params"]) for group in groups]
        is_by_name = any(isinstance(param, str) for group in groups for param in group["params"])
        given = f"a state for groups of {saved} parameters"
        if is_by_name or saved == sizes:
            given = None
            if any(_are_foreign(group, mine) for group, mine in zip(groups, own, strict=False)):
                given = f"a state with the settings {sorted(set(groups[0]) - set(own[0]))}"
            elif not is_by_name:
                given = _wrong_moments(optimizer, state.get("state"))
    if given is not None:
        raise StateError(
            what,
            given=given,
            expected=f"one of {type(optimizer).__name__}, for groups of {sizes} parameters",
            fix="build the optimizer as it was when it was saved",
        )


def _wrong_moments(optimizer: Any, state: Any) -> str | None:
    """What is wrong with moments that are elementwise; what other state there is, only its optimizer can tell."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    if not isinstance(state, Mapping) or not all(isinstance(moments, Mapping) for moments in state.values()):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return "a state without what the optimizer knows of each parameter"
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            moment = state.get(index, {}).get(name)
            if isinstance(moment, Tensor) and moment.shape != param.shape:
                return f"a state with {name!r} of shape {tuple(moment.shape)} for a parameter of {tuple(param.shape)}"
    return None


def check_scheduler(what: str, scheduler: Any, state: Any) -> None:
    """Refuse what is not the state of such a scheduler.

    Args:
        what: is loading, for the error.
        state: for its `load_state_dict`.

    Raises:
        StateError: it is something else.
    """
    own = scheduler.state_dict()
    if not isinstance(state, Mapping) or _are_foreign(state, own):
        raise StateError(
            what,
            given=f"a scheduler's state with {state!r:.100}",
            expected=f"one of {type(scheduler).__name__}, with {sorted(own)}",
            fix="build the scheduler as it was when it was saved",
        )


def _are_foreign(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether both have settings that the other lacks, or nothing in common. Versions of torch add some."""
    missing = set(own) - set(saved)
    return bool(missing) and (bool(set(saved) - set(own)) or missing == set(own))
