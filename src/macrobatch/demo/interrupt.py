"""Ctrl-C that never tears anything."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Inside the `with` block the first Ctrl-C waits for the next `pause()`, a second one interrupts at once.

    A KeyboardInterrupt at a random place can land in a hook or a destructor, where Python prints and drops it, or
    between the making of a file and its renaming. Windows are short, so waiting for the end of one is not felt.
    Outside the main thread, and where Ctrl-C is ignored (`nohup`), signals are left as they are.
    """

    def __init__(self) -> None:
        self.num_presses = 0
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

    def _press(self, signum: int, frame: FrameType | None) -> None:
        self.num_presses += 1
        if self.num_presses > 1:
            raise KeyboardInterrupt
