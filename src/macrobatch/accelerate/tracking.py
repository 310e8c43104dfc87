"""Which trackers a run has, and logging to all of them."""

from __future__ import annotations

from typing import Any

from macrobatch.accelerate.processes import Processes
from macrobatch.accelerate.trackers import (
    GeneralTracker,
    JSONLTracker,
    MLflowTracker,
    TensorBoardTracker,
    WandBTracker,
    on_main_process,
)
from macrobatch.accelerate.utils.absent import absent
from macrobatch.accelerate.utils.enums import LoggerType
from macrobatch.accelerate.utils.imports import is_package_available
from macrobatch.errors import ArgumentError, MissingDependencyError

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "GeneralTracker",
    "JSONLTracker",
    "MLflowTracker",
    "TensorBoardTracker",
    "Tracking",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
]

LOGGER_TYPE_TO_CLASS = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "mlflow": MLflowTracker,
    "jsonl": JSONLTracker,
}


def get_available_trackers() -> list[str]:
    """Names of the trackers whose packages are there."""
    return [name for name in LOGGER_TYPE_TO_CLASS if name == "jsonl" or is_package_available(name)]


def filter_trackers(log_with: Any, logging_dir: Any = None) -> list[Any]:
    """The trackers asked for: by name, by class or as objects; "all" are those whose packages are there.

    Raises:
        ArgumentError: a name is unknown, or there is no folder for one that needs it.
        MissingDependencyError: the package of one is not installed.
    """
    wanted: list[Any] = []
    for each in [] if log_with is None else log_with if isinstance(log_with, list | tuple) else [log_with]:
        is_own = isinstance(each, GeneralTracker) or (isinstance(each, type) and issubclass(each, GeneralTracker))
        name = str(getattr(each, "value", each))
        if is_own:
            wanted.append(each)
        elif name == "all":
            wanted += get_available_trackers()
        elif name not in LOGGER_TYPE_TO_CLASS:
            is_known = name in LoggerType.list()
            raise ArgumentError(
                "log_with",
                given=repr(name),
                expected=f"one of {list(LOGGER_TYPE_TO_CLASS)}, or a GeneralTracker",
                fix="subclass GeneralTracker for it" if is_known else "check the spelling",
            )
        elif name not in get_available_trackers():
            raise MissingDependencyError(
                "log_with", given=repr(name), expected="its package", fix=f"pip install {name}"
            )
        else:
            wanted.append(name)
    for each in wanted:
        kind = LOGGER_TYPE_TO_CLASS[each] if isinstance(each, str) else each
        if isinstance(kind, type) and kind.requires_logging_directory and logging_dir is None:
            raise ArgumentError(
                "log_with", given=repr(kind.name), expected="a folder to write into", fix="pass project_dir="
            )
    return list(dict.fromkeys(wanted))


class Tracking(Processes):
    """The part of `Accelerator` that logs."""

    logging_dir: Any

    def _setup_tracking(self, log_with: Any) -> None:
        self.trackers: list[Any] = []
        self.log_with = filter_trackers(log_with, self.logging_dir)

    def init_trackers(
        self, project_name: str, config: dict[str, Any] | None = None, init_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Begin a run of every tracker.

        Args:
            config: hyper-parameters to keep with it.
            init_kwargs: more arguments, by tracker: `{"wandb": {"tags": [...]}}`.
        """
        self.trackers = []
        for each in self.log_with:
            if isinstance(each, GeneralTracker):
                tracker: Any = each
            else:
                kind: Any = LOGGER_TYPE_TO_CLASS[each] if isinstance(each, str) else each
                options: dict[str, Any] = (init_kwargs or {}).get(kind.name, {})
                if kind.requires_logging_directory:
                    options = {"logging_dir": self.logging_dir, **options}
                tracker = kind(project_name, **options)
            tracker.start()
            self.trackers.append(tracker)
            if config is not None and (self.is_main_process or not tracker.main_process_only):
                tracker.store_init_configuration(config)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """A tracker by name, or what it wraps; on other ranks a blank one.

        Raises:
            ArgumentError: there is none of that name.
        """
        for tracker in self.trackers:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker
        if not self.is_main_process:
            return GeneralTracker(_blank=True)
        raise ArgumentError(
            "get_tracker",
            given=repr(name),
            expected=f"one of {[tracker.name for tracker in self.trackers]}",
            fix="ask for it with log_with=, then call init_trackers",
        )

    def log(
        self, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Metrics, to every tracker.

        Args:
            log_kwargs: more arguments, by tracker.
        """
        for tracker in self.trackers:
            if self.is_main_process or not tracker.main_process_only:
                tracker.log(values, step=step, **(log_kwargs or {}).get(tracker.name, {}))

    def end_training(self) -> None:
        """End every tracker's run."""
        for tracker in self.trackers:
            if self.is_main_process or not tracker.main_process_only:
                tracker.finish()
        self.wait_for_everyone()


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
