"""Trackers, against their real packages, and what they read back from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from macrobatch.accelerate import tracking
from macrobatch.accelerate.tracking import GeneralTracker, filter_trackers, get_available_trackers, on_main_process
from macrobatch.accelerate.utils import LoggerType, ProjectConfiguration
from macrobatch.errors import ArgumentError, MissingDependencyError
from macrobatch.testing.scripts import run_script
from tests.accelerate.doors import build

pytestmark = pytest.mark.xdist_group("ranks")

CONFIG = {"lr": 0.1, "layers": [1, 2], "model": {"name": "tiny", "dropout": None}}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Own(GeneralTracker):
    name = "own"
    requires_logging_directory = False

    def __init__(self, project_name: str = "none", tag: str = "") -> None:
        super().__init__()
        self.calls: list[Any] = [("init", project_name, tag)]

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append(("log", values, step, kwargs))

    @on_main_process
    def finish(self) -> None:
        self.calls.append(("finish",))


class OfEveryRank(Own):
    name = "of_every_rank"
    main_process_only = False


# --- JSON lines ---


def test_json_lines(tmp_path: Path):
    accelerator = build(log_with="jsonl", project_dir=tmp_path)
    accelerator.init_trackers("run", config={**CONFIG, "path": tmp_path, "dtype": torch.float32})
    values = {"loss": torch.tensor(0.5), "nan": float("nan"), "array": np.arange(2), "n": np.int64(3), "deep": {"x": 1}}
    accelerator.log(values, step=7)
    accelerator.log({"loss": float("inf")})
    path = accelerator.get_tracker("jsonl", unwrap=True)
    assert path == tmp_path / "run" / "metrics.jsonl"
    config, first, second = lines(path)
    assert config == {"config": {**CONFIG, "path": str(tmp_path), "dtype": "torch.float32"}}
    assert first.pop("time_s") > 1e9
    assert first == {"step": 7, "loss": 0.5, "nan": "nan", "array": [0, 1], "n": 3, "deep": {"x": 1}}
    assert (second["step"], second["loss"]) == (None, "inf")
    accelerator.end_training()


def test_json_lines_go_on_in_the_same_file(tmp_path: Path):
    for step in range(2):
        accelerator = build(log_with=LoggerType.JSONL, project_dir=tmp_path)
        accelerator.init_trackers("run")
        accelerator.log({"loss": step}, step=step)
    assert [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


# --- packages ---


def test_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = build(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run", config=CONFIG, init_kwargs={"tensorboard": {"flush_secs": 5}})
    for step in range(2):
        accelerator.log({"loss": torch.tensor(0.5 - step), "text": "so far", "pair": {"a": 1.0, "b": 2}}, step=step)
    accelerator.get_tracker("tensorboard").log_images({"image": np.zeros((1, 4, 4, 3), np.uint8)}, step=1)
    assert type(accelerator.get_tracker("tensorboard", unwrap=True)).__name__ == "SummaryWriter"
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.5), (1, -0.5)]
    assert events.Tags()["images"] == ["image"]
    (config,) = events.Tensors("config/text_summary")
    assert b"- model.name: tiny" in config.tensor_proto.string_val[0]
    assert len(list((tmp_path / "run").glob("pair_*"))) == 2


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    accelerator = build(log_with="wandb")
    accelerator.init_trackers("project", config=CONFIG, init_kwargs={"wandb": {"name": "first", "dir": str(tmp_path)}})
    run = accelerator.get_tracker("wandb", unwrap=True)
    try:
        assert (run.project, run.name, run.config["lr"]) == ("project", "first", 0.1)
        accelerator.log({"loss": 0.5}, step=1)
        accelerator.log({"loss": 0.25}, step=2, log_kwargs={"wandb": {"commit": True}})
        accelerator.get_tracker("wandb").log_table("table", columns=["a"], data=[[1]], step=3)
        accelerator.get_tracker("wandb").log_images({"image": [np.zeros((4, 4, 3), np.uint8)]}, step=3)
        assert run.summary["loss"] == 0.25
    finally:
        accelerator.end_training()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


MLFLOW = """
import sys
from pathlib import Path
import mlflow
from macrobatch.accelerate import Accelerator

folder = Path(sys.argv[1])
mlflow.set_tracking_uri(f"sqlite:///{folder}/runs.db")
accelerator = Accelerator(cpu=True, log_with="mlflow", project_dir=folder)
many = {f"p{index}": index for index in range(150)}
accelerator.init_trackers("experiment", config={"lr": 0.1, "deep": {"x": "y" * 900}, **many},
                          init_kwargs={"mlflow": {"run_name": "first"}})
for step in range(2):
    accelerator.log({"loss": 0.5 - step, "name": "not a number"}, step=step)
(folder / "note.txt").write_text("note")
run_id = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
accelerator.end_training()
run = mlflow.get_run(run_id)
assert run.info.status == "FINISHED" and run.info.run_name == "first", run
assert run.data.params["lr"] == "0.1" and run.data.params["deep.x"] == "y" * 500 and len(run.data.params) == 152
history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
assert [(each.step, each.value) for each in history] == [(0, 0.5), (1, -0.5)], history
assert set(run.data.metrics) == {"loss"}
assert mlflow.get_experiment(run.info.experiment_id).name == "experiment"
"""


def test_mlflow(tmp_path: Path):
    # In a process of its own, since it sets up a database, loggers and threads for as long as a process lives.
    (tmp_path / "script.py").write_text(MLFLOW, encoding="utf-8")
    done = run_script(tmp_path / "script.py", str(tmp_path), folder=tmp_path)
    assert done.codes == [0], done.stderr[0][-3000:]


# --- trackers of one's own ---


def test_a_tracker_of_ones_own_as_class_and_as_object(tmp_path: Path):
    ready = Own("ready")
    accelerator = build(log_with=[OfEveryRank, ready, "jsonl"], project_dir=tmp_path)
    accelerator.init_trackers("run", config={"a": 1}, init_kwargs={"of_every_rank": {"tag": "x"}})
    accelerator.log({"loss": 1}, step=2, log_kwargs={"own": {"more": 3}})
    assert [tracker.name for tracker in accelerator.trackers] == ["of_every_rank", "own", "jsonl"]
    made = accelerator.get_tracker("of_every_rank")
    assert accelerator.get_tracker("own") is ready
    accelerator.end_training()
    assert made.calls == [("init", "run", "x"), ("config", {"a": 1}), ("log", {"loss": 1}, 2, {}), ("finish",)]
    assert ready.calls[2] == ("log", {"loss": 1}, 2, {"more": 3})


def test_a_tracker_that_lacks_something_is_refused():
    class Nameless(GeneralTracker):
        requires_logging_directory = False

    with pytest.raises(NotImplementedError, match=r"Nameless: .*'name', 'tracker'.*To fix it"):
        Nameless()


def test_no_trackers_are_no_work():
    accelerator = build()
    accelerator.init_trackers("run", config=CONFIG)
    accelerator.log({"loss": 1})
    accelerator.end_training()
    assert accelerator.trackers == []


def test_trackers_that_are_not_set_up_take_nothing(tmp_path: Path):
    accelerator = build(log_with="jsonl", project_dir=tmp_path)
    accelerator.log({"loss": 1})
    assert list(tmp_path.iterdir()) == []


# --- choosing ---


def test_all_are_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert get_available_trackers() == ["tensorboard", "wandb", "mlflow", "jsonl"]
    monkeypatch.setattr(tracking, "is_package_available", lambda name: name == "tensorboard")
    assert filter_trackers("all", tmp_path) == ["tensorboard", "jsonl"]
    assert filter_trackers(["all", "jsonl", Own], tmp_path) == ["tensorboard", "jsonl", Own]
    with pytest.raises(MissingDependencyError, match=r"given 'wandb'.*pip install wandb"):
        filter_trackers("wandb", tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"), [("no_such", "check the spelling"), ("comet_ml", "subclass GeneralTracker"), (3, "spelling")]
)
def test_what_is_no_tracker_is_refused_by_name(name: Any, advice: str):
    with pytest.raises(ArgumentError, match=rf"log_with: given '{name}'.*{advice}"):
        build(log_with=name)


@pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
def test_a_folder_is_asked_for(name: str, tmp_path: Path):
    with pytest.raises(ArgumentError, match=rf"given '{name}'.*pass project_dir="):
        build(log_with=name)
    config = ProjectConfiguration(logging_dir=tmp_path / "logs")
    accelerator = build(log_with=name, project_config=config)
    accelerator.init_trackers("run")
    accelerator.end_training()


def test_a_class_is_asked_for_a_folder_too():
    class Needy(Own):
        name = "needy"
        requires_logging_directory = True

    with pytest.raises(ArgumentError, match=r"given 'needy'.*project_dir="):
        build(log_with=Needy)


def test_an_unknown_tracker_is_refused_by_name(tmp_path: Path):
    accelerator = build(log_with="jsonl", project_dir=tmp_path)
    accelerator.init_trackers("run")
    with pytest.raises(ArgumentError, match=r"get_tracker: given 'wandb'; expected one of \['jsonl'\]"):
        accelerator.get_tracker("wandb")


# --- many ranks ---


def logs(folder: Path) -> list[Any]:
    accelerator = build(log_with=["jsonl", Own, OfEveryRank], project_dir=folder)
    accelerator.init_trackers("run", config={"a": 1})
    accelerator.log({"rank": accelerator.process_index}, step=0)
    own, every = accelerator.get_tracker("own"), accelerator.get_tracker("of_every_rank")
    unknown = None if accelerator.is_main_process else accelerator.get_tracker("wandb").log({"x": 1})
    accelerator.end_training()
    return [len(getattr(own, "calls", [])), every.calls, unknown]


def test_the_main_process_logs_and_others_if_the_tracker_wants_it(ranks: Any, tmp_path: Path):
    first, second = ranks(2).run(logs, tmp_path)
    assert [line.get("rank") for line in lines(tmp_path / "run" / "metrics.jsonl")] == [None, 0]
    assert (first[0], second[0]) == (4, 1)
    for rank, (_, calls, _) in enumerate((first, second)):
        assert [call[0] for call in calls] == ["init", "config", "log", "finish"]
        assert calls[2][1] == {"rank": rank}
