"""The window: which micro-batches make up one update, and which of them is the last.

```text
          admit() × k              admit() -> True, or finish() -> True
  open ────────────────▶ open ────────────────────────────────────────▶ closed
   ▲                                                                      │
   └────────────────────────── applied() | skipped() ─────────────────────┘
```

Plain Python, no tensors: this is the only counter of micro-batches and updates in the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from macrobatch.checks import check_integer, is_integer
from macrobatch.errors import ArgumentError, StateError, WindowError

__all__ = ["Tail", "Window"]

Tail = Literal["apply", "drop", "carry"]
"""What becomes of a window that is not full when the data ends: *apply* it short, *drop* it, or *carry* it into
the next pass over the data."""

_COUNTERS = ("num_pending", "num_updates", "num_skipped", "num_dropped")


class Window:
    """State machine of one accumulation window.

    Equivalent plain loop, with `tail="apply"`:

    ```python
    for i, micro_batch in enumerate(data):
        backward(micro_batch)
        if (i + 1) % size == 0 or i + 1 == len(data):  # <- admit() answers this
            update()
    ```

    Args:
        size: number of micro-batches in a full window, an integer >= 1.
        tail: the fate of a window that is not full when the data ends.

    Raises:
        ArgumentError: for a size that is not a positive integer, or an unknown tail policy.

    ```pycon
    >>> window = Window(2)
    >>> window.admit(), window.admit()
    (False, True)
    >>> window.applied()
    >>> window.admit(end_of_data=True), window.num_pending
    (True, 1)

    ```
    """

    __slots__ = ("_closed", "_size", "num_dropped", "num_pending", "num_skipped", "num_updates", "tail")

    def __init__(self, size: int, *, tail: Tail = "apply") -> None:
        if tail not in get_args(Tail):
            raise ArgumentError("tail", given=repr(tail), expected=f"one of {get_args(Tail)}", fix='pass tail="apply"')
        self.tail: Tail = tail
        self._size = _checked_size(size)
        self._closed = False
        self.num_pending = 0
        """Micro-batches in the current window so far."""
        self.num_updates = 0
        """Windows that ended in an update."""
        self.num_skipped = 0
        """Windows that were closed and ended without an update."""
        self.num_dropped = 0
        """Micro-batches thrown away by `discard` or by the tail policy."""

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"Window({state}, {self.num_pending}/{self._size} micro-batches, {self.num_updates} updates)"

    @property
    def size(self) -> int:
        """Micro-batches in a full window. Setting it takes effect with the next micro-batch; a window that already
        holds as many or more then closes with that one."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = _checked_size(size)

    @property
    def is_closed(self) -> bool:
        """The last micro-batch is in; the window waits for `applied` or `skipped`."""
        return self._closed

    def admit(self, *, end_of_data: bool = False) -> bool:
        """Count one micro-batch in. True if it is the last of its window, which is then closed.

        Args:
            end_of_data: no micro-batch follows this one. Under the tail policies *drop* and *carry* that alone does
                not close a window.

        Raises:
            WindowError: the window is closed and waits for `applied` or `skipped`.
        """
        if self._closed:
            raise WindowError(
                "Window.admit",
                given=f"a micro-batch for a closed window of {self.num_pending}",
                expected="the closed window to end first",
                fix="call applied() or skipped() after the last micro-batch of a window",
            )
        self.num_pending += 1
        self._closed = self.num_pending >= self._size or (end_of_data and self.tail == "apply")
        return self._closed

    def finish(self) -> bool:
        """The data has ended, without a last micro-batch to say so. True if a short window must be applied now."""
        if not self._closed and self.num_pending:
            if self.tail == "drop":
                self.discard()
            else:
                self._closed = self.tail == "apply"
        return self._closed

    def applied(self) -> None:
        """The closed window has become an update."""
        self._end("applied")
        self.num_updates += 1

    def skipped(self) -> None:
        """The closed window ended without an update (overflow, nothing to average over)."""
        self._end("skipped")
        self.num_skipped += 1

    def discard(self) -> int:
        """Throw away what is pending; returns the number of micro-batches lost."""
        num_lost, self.num_pending, self._closed = self.num_pending, 0, False
        self.num_dropped += num_lost
        return num_lost

    def restart(self) -> None:
        """What is pending begins anew with its first micro-batch; nothing is lost."""
        self.num_pending, self._closed = 0, False

    def state_dict(self) -> dict[str, Any]:
        """All of the window's state as plain values."""
        return {
            "version": 1,
            "size": self._size,
            "tail": self.tail,
            "is_closed": self._closed,
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; refused as a whole if any part of it does not fit.

        Raises:
            StateError: keys are missing or unknown, or a value is out of its domain.
        """
        problem = _problem(state)
        if problem:
            raise StateError(
                "Window.load_state_dict",
                given=problem,
                expected="what Window.state_dict returned",
                fix="load the file that was saved with this version of macrobatch",
            )
        self._size, self.tail, self._closed = state["size"], state["tail"], state["is_closed"]
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def _end(self, verb: str) -> None:
        if not self._closed:
            raise WindowError(
                f"Window.{verb}",
                given=f"an open window with {self.num_pending} of {self._size} micro-batches",
                expected="a closed window",
                fix="wait until admit() or finish() has returned True",
            )
        self.num_pending, self._closed = 0, False


def _checked_size(size: Any) -> int:
    fix = "pass how many micro-batches one update accumulates"
    check_integer("window size (micro-batches per update)", size, fix=fix)
    return size


def _problem(state: Mapping[str, Any]) -> str | None:
    """What is wrong with a saved state, or None."""
    expected = {"version", "size", "tail", "is_closed", *_COUNTERS}
    if not isinstance(state, Mapping) or set(state) != expected:  # pyright: ignore[reportUnnecessaryIsInstance]
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        return f"{found} where the keys {sorted(expected)} belong"
    if (
        not is_integer(state["version"])
        or state["version"] != 1
        or state["tail"] not in get_args(Tail)
        or not isinstance(state["is_closed"], bool)
    ):
        return f"version {state['version']!r}, tail {state['tail']!r}, is_closed {state['is_closed']!r}"
    numbers = {name: state[name] for name in ("size", *_COUNTERS)}
    if not all(is_integer(n, 0) for n in numbers.values()) or not numbers["size"]:
        return f"counters {numbers}"
    if state["is_closed"] and not numbers["num_pending"]:
        return "a closed window without a micro-batch"
    return None
