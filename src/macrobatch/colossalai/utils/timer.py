"""How long things take, the GPU's work included."""

from __future__ import annotations

import time
from collections.abc import Iterator

from macrobatch.colossalai.utils.cuda import synchronize
from macrobatch.errors import ArgumentError, WindowError

__all__ = ["MultiTimer", "Timer"]


class Timer:
    """A stopwatch.

    ```pycon
    >>> timer = Timer()
    >>> timer.start()
    >>> timer.stop(keep_in_history=True) == timer.get_history_sum()
    True

    ```
    """

    def __init__(self) -> None:
        self._start_s: float | None = None
        self._elapsed_s = 0.0
        self._history: list[float] = []

    @property
    def has_history(self) -> bool:
        """Whether something was kept."""
        return bool(self._history)

    @property
    def current_time(self) -> float:
        """Seconds of a clock that only goes forward, when the GPU has done its work."""
        synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """Begin, from 0 s."""
        self._start_s = self.current_time

    def lap(self) -> float:
        """Seconds since the start; it goes on."""
        if self._start_s is None:
            raise WindowError("Timer", given="no start", expected="start before it is read", fix="call start() first")
        return self.current_time - self._start_s

    def stop(self, keep_in_history: bool = False) -> float:
        """Seconds since the start; it stops.

        Raises:
            WindowError: it was not started.
        """
        self._elapsed_s = self.lap()
        self._start_s = None
        if keep_in_history:
            self._history.append(self._elapsed_s)
        return self._elapsed_s

    def get_history(self) -> list[float]:
        """Seconds of the kept ones, in order."""
        return list(self._history)

    def get_history_mean(self) -> float:
        """Seconds of the kept ones on average; 0 if there are none."""
        return sum(self._history) / len(self._history) if self._history else 0.0

    def get_history_sum(self) -> float:
        """Seconds of the kept ones together."""
        return sum(self._history)

    def get_elapsed_time(self) -> float:
        """Seconds from the last start to its stop."""
        return self._elapsed_s

    def reset(self) -> None:
        """Forget everything."""
        self._start_s = None
        self._elapsed_s = 0.0
        self._history = []


class MultiTimer:
    """Stopwatches by name, which can be switched off together.

    Args:
        on: whether they run.

    ```pycon
    >>> timer = MultiTimer()
    >>> timer.start("epoch")
    >>> timer.stop("epoch", keep_in_history=True)
    >>> [name for name, _ in timer], timer.get_timer("epoch").has_history
    (['epoch'], True)

    ```
    """

    def __init__(self, on: bool = True) -> None:
        self._on = on
        self._timers: dict[str, Timer] = {}

    def start(self, name: str) -> None:
        """Start a stopwatch, a new one if there is none of this name."""
        if self._on:
            self._timers.setdefault(name, Timer()).start()

    def stop(self, name: str, keep_in_history: bool = False) -> None:
        """Stop it.

        Raises:
            ArgumentError: there is none of this name.
            WindowError: it was not started.
        """
        if self._on:
            self.get_timer(name).stop(keep_in_history)

    def get_timer(self, name: str) -> Timer:
        """The stopwatch of a name.

        Raises:
            ArgumentError: there is none.
        """
        if name not in self._timers:
            raise ArgumentError(
                "MultiTimer",
                given=repr(name),
                expected=f"one of {sorted(self._timers)}",
                fix=f"call start({name!r}) first",
            )
        return self._timers[name]

    def reset(self, name: str | None = None) -> None:
        """Forget what one stopwatch has measured, or all have."""
        if self._on:
            for timer in self._timers.values() if name is None else (self.get_timer(name),):
                timer.reset()

    def is_on(self) -> bool:
        """Whether they run."""
        return self._on

    def set_status(self, mode: bool) -> None:
        """Switch them on or off."""
        self._on = mode

    def __iter__(self) -> Iterator[tuple[str, Timer]]:
        """Names and stopwatches."""
        return iter(self._timers.items())
