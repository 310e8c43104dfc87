"""A logger that knows the ranks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import ClassVar, Literal, TextIO, get_args

from macrobatch.colossalai.context.parallel_mode import ParallelMode
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.errors import ArgumentError

__all__ = ["DistributedLogger", "disable_existing_loggers", "get_dist_logger"]

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

_FORMAT = "colossalai - %(name)s - %(levelname)s: %(message)s"


class DistributedLogger:
    """Writes to stderr, and to files, on some or all ranks: one line for each call, which ends with its message.

    `get_dist_logger` makes one. Its lines are records of `logging.getLogger(name)`, which hands them to no other
    handler than those set here and on that logger.

    ```pycon
    >>> get_dist_logger().info("only on the first rank", ranks=[0])

    ```
    """

    _INSTANCES: ClassVar[dict[str, DistributedLogger]] = {}

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger = logging.getLogger(name)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        self._logger.addHandler(handler)

    @classmethod
    def get_instance(cls, name: str) -> DistributedLogger:
        """The one logger of a name."""
        if name not in cls._INSTANCES:
            cls._INSTANCES[name] = cls(name)
        return cls._INSTANCES[name]

    def set_level(self, level: Level) -> None:
        """Leave out what is below a level: "DEBUG", "INFO", "WARNING" or "ERROR"."""
        self._logger.setLevel(_checked(level))

    def log_to_file(
        self, path: str | Path, mode: Literal["a", "w"] = "a", level: Level = "INFO", suffix: str | None = None
    ) -> None:
        """Write to a file of each rank as well, `rank_{rank}.log` or `rank_{rank}_{suffix}.log`.

        Args:
            path: a folder, which is made if it is not there.
            mode: "a" to go on with a file that is there, "w" to begin anew.
            level: leaves out of the file what is below it.
            suffix: of the file's name.
        """
        level = _checked(level)
        if mode not in ("a", "w"):
            raise ArgumentError("log_to_file's mode", given=repr(mode), expected='"a" or "w"', fix="leave it out")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        ending = f"_{suffix}" if suffix else ""
        handler = logging.FileHandler(folder / f"rank_{gpc.get_global_rank()}{ending}.log", mode, encoding="utf-8")
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(_FORMAT))
        for old in self._logger.handlers:
            if isinstance(old, logging.FileHandler) and old.baseFilename == handler.baseFilename:
                self._logger.removeHandler(old)
                old.close()
        self._logger.addHandler(handler)

    def info(
        self,
        message: object,
        parallel_mode: ParallelMode = ParallelMode.GLOBAL,
        ranks: Collection[int] | None = None,
    ) -> None:
        """Say something.

        Args:
            message: what to say.
            parallel_mode: the group in which `ranks` are counted.
            ranks: those that say it, all if None.
        """
        self._log(logging.INFO, message, parallel_mode, ranks)

    def warning(
        self,
        message: object,
        parallel_mode: ParallelMode = ParallelMode.GLOBAL,
        ranks: Collection[int] | None = None,
    ) -> None:
        """As `info`, for what should be looked at."""
        self._log(logging.WARNING, message, parallel_mode, ranks)

    def debug(
        self,
        message: object,
        parallel_mode: ParallelMode = ParallelMode.GLOBAL,
        ranks: Collection[int] | None = None,
    ) -> None:
        """As `info`, for what is only said after `set_level("DEBUG")`."""
        self._log(logging.DEBUG, message, parallel_mode, ranks)

    def error(
        self,
        message: object,
        parallel_mode: ParallelMode = ParallelMode.GLOBAL,
        ranks: Collection[int] | None = None,
    ) -> None:
        """As `info`, for what went wrong."""
        self._log(logging.ERROR, message, parallel_mode, ranks)

    def _log(self, level: int, message: object, mode: ParallelMode, ranks: Collection[int] | None) -> None:
        if ranks is None or gpc.get_local_rank(mode) in ranks:
            self._logger.log(level, message, stacklevel=3)


def get_dist_logger(name: str = "colossalai") -> DistributedLogger:
    """The logger of this name, always the same one."""
    return DistributedLogger.get_instance(name)


def disable_existing_loggers(include: Iterable[str] | None = None, exclude: Iterable[str] = ("colossalai",)) -> None:
    """Let other packages' loggers say warnings and errors only.

    Args:
        include: names of the loggers; by default all that there are.
        exclude: names of those that are left alone, if `include` is not given.
    """
    names = set(logging.Logger.manager.loggerDict) - set(exclude) if include is None else set(include)
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """To what sys.stderr is when something is said."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


def _checked(level: object) -> Level:
    if level not in get_args(Level):
        raise ArgumentError("the level", given=repr(level), expected=" or ".join(get_args(Level)), fix='pass "INFO"')
    return level  # pyright: ignore[reportReturnType]
