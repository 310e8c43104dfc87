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

from macrobatch.accelerate.state import PartialState

__all__ = ["GeneralTracker", "JSONLTracker", "MLflowTracker", "TensorBoardTracker", "WandBTracker", "on_main_process"]


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
        # dir() instead of hasattr(): the property may need what the subclass sets after this.
        missing = [name for name in ("name", "requires_logging_directory", "tracker") if name not in dir(self)]
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
        self,
        table_name: str,
        columns: Any = None,
        data: Any = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A table, of rows or of a data frame."""
        import wandb

        self.log({table_name: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        self.run.finish()


class MLflowTracker(GeneralTracker):
    """MLflow (https://mlflow.org/docs)."""

    name = "mlflow"
    requires_logging_directory = False

    def __init__(
        self,
        experiment_name: str | None = None,
        logging_dir: Any = None,
        run_id: str | None = None,
        tags: dict[str, Any] | None = None,
        nested_run: bool = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        self.experiment_name = experiment_name
        self.logging_dir = logging_dir
        self.run_name = run_name
        self._options: dict[str, Any] = {"run_id": run_id, "tags": tags, "nested": nested_run}
        self._options["description"] = description
        self.active_run: Any = None
        super().__init__()

    @on_main_process
    def start(self) -> None:
        """Begin the run, in the experiment of that name."""
        import mlflow

        if self.experiment_name is not None:
            if self.logging_dir is not None and mlflow.get_experiment_by_name(self.experiment_name) is None:
                mlflow.create_experiment(self.experiment_name, artifact_location=str(self.logging_dir))
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
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """All files of a folder."""
        import mlflow

        mlflow.log_artifacts(local_dir, artifact_path=artifact_path)

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """A figure of matplotlib or plotly."""
        import mlflow

        mlflow.log_figure(figure, artifact_file, **save_kwargs)

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
