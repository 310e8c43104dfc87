"""Where metrics go: TensorBoard, Weights & Biases, MLflow, a file of JSON lines, or a tracker of one's own."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from macrobatch.accelerate.processes import Processes
from macrobatch.accelerate.state import PartialState
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


def on_main_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a tracker's method: it runs on rank 0 only, unless the tracker wants all ranks."""

    @wraps(function)
    def only(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "main_process_only", True) and not PartialState().is_main_process:
            return None
        return function(self, *args, **kwargs)

    return only


class GeneralTracker:
    """Base of trackers. A subclass has `name`, `requires_logging_directory`, a property `tracker` (what it wraps), and
    `store_init_configuration` and `log`.

    Args:
        _blank: True for what stands in for a tracker on other ranks.
    """

    main_process_only = True

    def __init__(self, _blank: bool = False) -> None:
        if _blank:
            return
        missing = [name for name in ("name", "requires_logging_directory", "tracker") if not hasattr(self, name)]
        if missing:
            raise NotImplementedError(
                f"{type(self).__name__}: given a tracker without {missing}; expected them as attributes (`tracker` a "
                "property). To fix it, add them to the class."
            )

    def start(self) -> None:
        """Begin a run; called when the trackers are set up."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep a run's hyper-parameters."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Take metrics in."""

    def finish(self) -> None:
        """The run is over."""


class TensorBoardTracker(GeneralTracker):
    """TensorBoard (https://www.tensorflow.org/tensorboard)."""

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: Any, **kwargs: Any) -> None:
        self.run_name = run_name
        self.logging_dir = Path(logging_dir) / run_name
        self._options = kwargs
        self.writer: Any = None
        super().__init__()

    @on_main_process
    def start(self) -> None:
        """Open the writer."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.logging_dir), **self._options)

    @property
    def tracker(self) -> Any:
        """The `SummaryWriter`."""
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As text, since TensorBoard's own table of hyper-parameters takes few types."""
        lines = "\n".join(f"- {key}: {value}" for key, value in _flat(values).items())
        self.writer.add_text("config", lines, 0)
        self.writer.flush()

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers as scalars, text as text, mappings as groups of scalars."""
        for key, value in _plain(values).items():
            if isinstance(value, bool | int | float):
                self.writer.add_scalar(key, value, global_step=step, **kwargs)
            elif isinstance(value, str):
                self.writer.add_text(key, value, global_step=step, **kwargs)
            elif isinstance(value, dict):
                self.writer.add_scalars(key, value, global_step=step, **kwargs)
        self.writer.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Images by name: arrays of shape (number, height, width, channels)."""
        for key, value in values.items():
            self.writer.add_images(key, value, global_step=step, **{"dataformats": "NHWC", **kwargs})

    @on_main_process
    def finish(self) -> None:
        """Close the writer."""
        self.writer.close()


class WandBTracker(GeneralTracker):
    """Weights & Biases (https://docs.wandb.ai)."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        self.run_name = run_name
        self._options = kwargs
        self.run: Any = None
        super().__init__()

    @on_main_process
    def start(self) -> None:
        """Begin the run."""
        import wandb

        self.run = wandb.init(project=self.run_name, **self._options)

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As the run's configuration."""
        self.run.config.update(values, allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """As the run logs them."""
        self.run.log(values, step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Lists of images by name."""
        import wandb

        self.log({key: [wandb.Image(image) for image in images] for key, images in values.items()}, step, **kwargs)

    @on_main_process
    def log_table(
        self, table_name: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: int | None = None
    ) -> None:
        """A table, of rows or of a data frame."""
        import wandb

        self.log({table_name: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        self.run.finish()


class MLflowTracker(GeneralTracker):
    """MLflow (https://mlflow.org/docs)."""

    name = "mlflow"
    requires_logging_directory = False

    def __init__(
        self, experiment_name: str, logging_dir: Any = None, run_name: str | None = None, **kwargs: Any
    ) -> None:
        self.experiment_name = experiment_name
        self.logging_dir = logging_dir
        self.run_name = run_name
        self._options = kwargs
        self.active_run: Any = None
        super().__init__()

    @on_main_process
    def start(self) -> None:
        """Begin the run, in the experiment of that name."""
        import mlflow

        mlflow.set_experiment(self.experiment_name)
        self.active_run = mlflow.start_run(run_name=self.run_name, **self._options)

    @property
    def tracker(self) -> Any:
        """The active run."""
        return self.active_run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As parameters, a hundred at a time, which is how many MLflow takes."""
        import mlflow

        items = [(key, str(value)[:500]) for key, value in _flat(values).items()]
        for start in range(0, len(items), 100):
            mlflow.log_params(dict(items[start : start + 100]))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers only."""
        import mlflow

        numbers = {str(key): float(value) for key, value in _plain(values).items() if isinstance(value, int | float)}
        mlflow.log_metrics(numbers, step=step)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """A file."""
        import mlflow

        mlflow.log_artifact(local_path, artifact_path=artifact_path)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        import mlflow

        mlflow.end_run()


class JSONLTracker(GeneralTracker):
    """One JSON object per line, in `metrics.jsonl`: {"step", "time_s", and the values}. NaN and infinity are text."""

    name = "jsonl"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: Any, **kwargs: Any) -> None:
        self.path = Path(logging_dir) / run_name / "metrics.jsonl"
        super().__init__()

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As a line with "config"."""
        self._append({"config": values})

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """As a line."""
        self._append({"step": step, "time_s": round(time.time(), 3), **values, **kwargs})

    def _append(self, values: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(_plain(values), allow_nan=False) + "\n"
        with self.path.open("ab", buffering=0) as file:  # one write, so that a kill leaves whole lines
            file.write(line.encode())


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
                given=name,
                expected=f"one of {list(LOGGER_TYPE_TO_CLASS)}, or a GeneralTracker",
                fix="subclass GeneralTracker for it" if is_known else "check the spelling",
            )
        elif name not in get_available_trackers():
            raise MissingDependencyError("log_with", given=name, expected="its package", fix=f"pip install {name}")
        else:
            wanted.append(name)
    for each in wanted:
        needs = LOGGER_TYPE_TO_CLASS[each].requires_logging_directory if isinstance(each, str) else False
        if needs and logging_dir is None:
            raise ArgumentError("log_with", given=each, expected="a folder to write into", fix="pass project_dir=")
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
            given=name,
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


def _plain(value: Any) -> Any:
    """A value as JSON knows it: tensors as numbers, NaN and infinity as text, what is unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
