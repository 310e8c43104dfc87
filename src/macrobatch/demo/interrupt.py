"""Ctrl-C that never tears anything."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]


# Who presses twice at once means it once.
_SAME_PRESS_S = 1.0


class Interrupts:
    """Inside the `with` block the first Ctrl-C waits for the next `pause()`; one that follows later interrupts at once.

    A KeyboardInterrupt at a random place can land in a hook or a destructor, where Python prints and drops it. Windows
    are short, so waiting for the end of one is not felt. Outside the main thread, and where Ctrl-C is ignored
    (`nohup`), signals are left as they are.

    Attributes:
        num_presses: of Ctrl-C so far.
    """

    def __init__(self) -> None:
        self.num_presses = 0
        self._pressed_s = float("-inf")
        self._is_sealed = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def pause(self) -> None:
        """A place where stopping is safe.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed since the block was entered.
        """
        if self.num_presses:
            raise KeyboardInterrupt

    def seal(self) -> None:
        """From here on nothing is interrupted: what follows takes no time, and must not be done by half."""
        self._is_sealed = True

    def _press(self, signum: int, frame: FrameType | None) -> None:
        previous_s, self._pressed_s = self._pressed_s, time.monotonic()
        if self._pressed_s - previous_s < _SAME_PRESS_S:
            return
        self.num_presses += 1
        if self.num_presses > 1 and not self._is_sealed:
            raise KeyboardInterrupt
