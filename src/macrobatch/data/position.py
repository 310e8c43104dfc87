"""Where a run stands in its data: the epoch, and how many of its windows have been handed out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from macrobatch.checks import check_integer, is_integer
from macrobatch.errors import StateError

__all__ = ["Pass", "Position"]


class Pass:
    """One iteration over an epoch, from window `first` on."""

    def __init__(self, position: Position, epoch: int, first: int) -> None:
        self._position = position
        self.epoch = epoch
        self.first = first

    def advance(self) -> None:
        """A window has been handed out. An iterator that is no longer the latest moves nothing."""
        if self._position.current is self:
            self._position.num_windows += 1

    def end(self) -> None:
        """The epoch is over."""
        if self._position.current is self:
            self._position.epoch += 1
            self._position.num_windows = 0
            self._position.current = None


class Position:
    """Epoch and windows handed out. Every pass is over the next epoch, except that the first one after
    `load_state_dict` goes on where the saved run stood.

    Attributes:
        epoch: the epoch that was begun last or, before it is begun, the next one.
        num_windows: windows of it that were handed out.
        current: the latest pass; None if the next pass is over `epoch`.

    ```pycon
    >>> position = Position()
    >>> position.begin().advance()  # and the loop is left by break
    >>> position.epoch, position.num_windows, position.begin().epoch
    (0, 1, 1)

    ```
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.num_windows = 0
        self.current: Pass | None = None

    def begin(self) -> Pass:
        """Begin the next pass."""
        if self.current is not None:
            self.epoch, self.num_windows = self.epoch + 1, 0
        self.current = Pass(self, self.epoch, self.num_windows)
        return self.current

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass one over this epoch, from its start; a position that was just loaded within it is kept.

        Raises:
            ArgumentError: not an integer >= 0.
        """
        check_integer(
            "epoch", epoch, "the number of an epoch", fix="pass the epoch's number, counted from 0", at_least=0
        )
        if epoch != self.epoch or self.current is not None:
            self.epoch, self.num_windows, self.current = epoch, 0, None

    def state_dict(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """The position as plain values, with what it is a position in."""
        return {"version": 1, "epoch": self.epoch, "num_windows": self.num_windows, **identity}

    def load_state_dict(
        self, state: Mapping[str, Any], identity: Mapping[str, Any], num_windows: Callable[[int], int | None]
    ) -> None:
        """Take over a saved position. Refused as a whole if a part does not fit.

        Args:
            state: from `state_dict`, on any rank of any world size.
            identity: what the data are now.
            num_windows: of an epoch; None if that is not known.

        Raises:
            StateError: it is a position in other data, or out of range.
        """
        problem = _problem(state, identity, num_windows)
        if problem:
            given, expected, fix = problem
            raise StateError("the position in the data", given=given, expected=expected, fix=fix)
        self.epoch, self.num_windows, self.current = state["epoch"], state["num_windows"], None


def _problem(
    state: Any, identity: Mapping[str, Any], num_windows: Callable[[int], int | None]
) -> tuple[str, str, str] | None:
    fix = "pass what state_dict returned"
    keys = {"version", "epoch", "num_windows", *identity}
    if not isinstance(state, Mapping) or set(state) != keys:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        return f"{found}", f"the keys {sorted(keys)}", fix
    if state["version"] != 1:
        return f"version {state['version']!r}", "version 1", "load it with the macrobatch that saved it"
    for name, value in identity.items():
        if state[name] != value or type(state[name]) is not type(value):
            return (
                f"{name}={state[name]!r}",
                f"{name}={value!r}, as the data are now",
                "resume with the data set and the settings that the position was saved with, "
                "or begin an epoch with set_epoch",
            )
    numbers = state["epoch"], state["num_windows"]
    if not all(is_integer(number, 0) for number in numbers):
        return f"epoch {numbers[0]!r}, num_windows {numbers[1]!r}", "integers >= 0", fix
    most = num_windows(state["epoch"])
    if most is not None and state["num_windows"] > most:
        return f"num_windows {state['num_windows']}", f"at most the epoch's {most}", fix
    return None
