"""Where a loader is in its epoch: what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from macrobatch.checks import is_integer
from macrobatch.errors import StateError

__all__ = ["Position", "check_state"]


class Position:
    """Where a loader is: in which epoch, after how many batches, and from which random state the epoch's order came."""

    def __init__(self) -> None:
        self.epoch = 0
        self.num_batches = 0
        """Batches of this rank that the epoch has yielded."""
        self.num_together = 0
        """Batches of the sampler that the epoch has yielded, to all ranks together."""
        self.start: dict[str, Any] | None = None
        self.is_restored = False
        self.is_at_end = False
        """Whether the last batch of the epoch was yielded."""


def check_state(state: Any) -> None:
    """Refuse what is not a loader's state.

    Raises:
        StateError: it is something else.
    """
    counts = ("epoch", "num_batches", "num_batches_together")
    expected = {*counts, "start", "generator", "initial_seed", "is_at_end"}
    is_whole = isinstance(state, Mapping) and set(state) == expected
    if not is_whole or not all(is_integer(state[name], 0) for name in counts):
        raise StateError(
            "a loader's load_state_dict",
            given=f"{state!r:.100}",
            expected=f"the keys {sorted(expected)}, with counts >= 0",
            fix="pass what state_dict returned",
        )
