"""Loggers that speak on the main process only, unless asked otherwise."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from functools import cache
from typing import Any

from macrobatch.accelerate.state import PartialState
from macrobatch.accelerate.utils.environment import parse_choice_from_env
from macrobatch.errors import WindowError

__all__ = ["MultiProcessAdapter", "get_logger"]


class MultiProcessAdapter(logging.LoggerAdapter):  # pyright: ignore[reportMissingTypeArgument]
    """Each call takes `main_process_only` (True by default), and `in_order`: all ranks, one after the other."""

    @staticmethod
    def _should_log(main_process_only: bool) -> bool:
        return not main_process_only or PartialState().is_main_process

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Pass a record on, where it is wanted."""
        if not PartialState._shared_state:  # pyright: ignore[reportPrivateUsage]
            raise WindowError(
                "logging",
                given="a message before the ranks are known",
                expected="an Accelerator or a PartialState first",
                fix="construct Accelerator() before logging",
            )
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        kwargs.setdefault("stacklevel", 2)
        if not self.isEnabledFor(level):
            return
        if self._should_log(main_process_only) and not in_order:
            message, kwargs = self.process(msg, kwargs)
            self.logger.log(level, message, *args, **kwargs)
        elif in_order:
            state = PartialState()
            for rank in range(state.num_processes):
                if rank == state.process_index:
                    message, kwargs = self.process(msg, kwargs)
                    self.logger.log(level, message, *args, **kwargs)
                state.wait_for_everyone()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, Any]:
        """Put the rank before the message."""
        return f"[RANK {PartialState().process_index}] {msg}", kwargs

    @cache  # noqa: B019
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """A warning, at its first call with these arguments."""
        self.warning(*args, **kwargs)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """A logger by name.

    Args:
        log_level: for instance "INFO"; by default, ACCELERATE_LOG_LEVEL of the environment, if set.
    """
    logger = logging.getLogger(name)
    level = log_level or parse_choice_from_env("ACCELERATE_LOG_LEVEL", "")
    if level:
        logger.setLevel(level.upper())
        logger.root.setLevel(level.upper())
    return MultiProcessAdapter(logger, {})
