"""How long things take, the GPU's work included.

A GPU notes itself when it comes to a moment, so that nobody has to wait for it until somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from macrobatch.colossalai.utils.cuda import synchronize
from macrobatch.errors import ArgumentError, WindowError

__all__ = ["MultiTimer", "Timer"]


class _Moment:
    """Now, on this host, and where there is a GPU, in the order of its work."""

    def __init__(self) -> None:
        self._host_s = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    @property
    def is_over(self) -> bool:
        """Whether the GPU has come there. Waits for nothing."""
        return self._event is None or self._event.query()

    def since(self, earlier: _Moment) -> float:
        """Seconds between two moments; waits for this one."""
        if self._event is None or earlier._event is None:
            return self._host_s - earlier._host_s
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


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
        self.reset()

    @property
    def has_history(self) -> bool:
        """Whether something was kept."""
        return bool(self._history) or any(is_kept for *_, is_kept in self._unread)

    @property
    def current_time(self) -> float:
        """Seconds of a clock that only goes forward, when the GPU has done its work."""
        synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """Begin, from 0 s."""
        self._start = _Moment()

    def lap(self) -> float:
        """Seconds since the start; it goes on."""
        return _Moment().since(self._started())

    def stop(self, keep_in_history: bool = False) -> float:
        """Seconds since the start; it stops.

        Raises:
            WindowError: it was not started.
        """
        self.halt(keep_in_history)
        return self.get_elapsed_time()

    def halt(self, keep_in_history: bool = False) -> None:
        """As `stop`, but without waiting for the GPU's work; whoever asks later how long it took does."""
        self._unread.append((self._started(), _Moment(), keep_in_history))
        self._start = None
        self._read(waits=False)

    def _started(self) -> _Moment:
        if self._start is None:
            raise WindowError("Timer", given="no start", expected="start before it is read", fix="call start() first")
        return self._start

    def _read(self, *, waits: bool = True) -> list[float]:
        while self._unread and (waits or self._unread[0][1].is_over):
            begin, end, is_kept = self._unread.popleft()
            self._elapsed_s = end.since(begin)
            if is_kept:
                self._history.append(self._elapsed_s)
        return self._history

    def get_history(self) -> list[float]:
        """Seconds of the kept ones, in order."""
        return list(self._read())

    def get_history_mean(self) -> float:
        """Seconds of the kept ones on average; 0 if there are none."""
        history = self._read()
        return sum(history) / len(history) if history else 0.0

    def get_history_sum(self) -> float:
        """Seconds of the kept ones together."""
        return sum(self._read())

    def get_elapsed_time(self) -> float:
        """Seconds from the last start to its stop."""
        self._read()
        return self._elapsed_s

    def reset(self) -> None:
        """Forget everything."""
        self._start: _Moment | None = None
        self._elapsed_s = 0.0
        self._history: list[float] = []
        self._unread: deque[tuple[_Moment, _Moment, bool]] = deque()


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
        """Stop it, without waiting for the GPU's work.

        Raises:
            ArgumentError: there is none of this name.
            WindowError: it was not started.
        """
        if self._on:
            self.get_timer(name).halt(keep_in_history)

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
