"""The trainer and its hooks, by the numbers that they report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import macrobatch.colossalai as colossalai
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.colossalai.nn.metric import Accuracy
from macrobatch.colossalai.trainer import Trainer, hooks
from macrobatch.colossalai.utils import MultiTimer, load_checkpoint


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    gpc.destroy()


def trainer(num: int = 22, size: int = 4, **options: Any) -> tuple[Trainer, Any, Any, nn.Module]:
    gpc.load_config({"gradient_accumulation": size})
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loader = DataLoader(TensorDataset(torch.randn(num, 4), torch.randint(0, 3, (num,))), batch_size=2)
    engine, loader, _, schedule = colossalai.initialize(
        model, optimizer, nn.CrossEntropyLoss(), loader, None, schedule, verbose=False
    )
    return Trainer(engine, **options), loader, schedule, model


class Recording(hooks.BaseHook):
    """Writes down what it is called for. It does not say its priority, like the page's own example."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("before_", "after_train", "after_test")):
            self.calls.append(name)
        return super().__getattribute__(name)


def test_counts_epochs_iterations_and_updates():
    run, loader, _, _ = trainer()  # 11 batches: windows of 4, 4 and 3
    run.fit(loader, epochs=3)
    assert (run.cur_epoch, run.cur_step, run.steps_per_epoch) == (3, 33, 11)
    assert (run.engine.num_iterations, run.engine.num_updates) == (33, 9)


@pytest.mark.parametrize(("max_steps", "num_updates"), [(4, 1), (6, 2), (12, 4)])
def test_max_steps_loses_no_micro_batch(max_steps, num_updates):
    run, loader, _, _ = trainer(logger=None)
    run.fit(loader, epochs=5, max_steps=max_steps)
    assert run.cur_step == max_steps
    assert run.engine.num_updates == num_updates
    assert run.engine.optimizer.accumulate_step == 0


def test_moments_come_in_order():
    run, loader, _, _ = trainer(num=4, size=2)
    recording = Recording()
    test = DataLoader(TensorDataset(torch.randn(2, 4), torch.zeros(2, dtype=torch.long)), batch_size=2)
    run.fit(loader, epochs=1, test_dataloader=test, hooks=[recording])
    assert [call for call in recording.calls if "iter" not in call] == [
        "before_train",
        "before_train_epoch",
        "after_train_epoch",
        "before_test",
        "before_test_epoch",
        "after_test_epoch",
        "after_test",
        "after_train",
    ]
    assert recording.calls.count("after_train_iter") == 2
    assert recording.calls.count("after_test_iter") == 1


def test_hooks_are_called_by_priority():
    order: list[int] = []

    class Marking(hooks.BaseHook):
        def before_train(self, trainer: Any) -> None:
            order.append(self.priority)

    run, loader, _, _ = trainer()
    run.fit(loader, epochs=0, hooks=[Marking(5), Marking(1), Marking(9)])
    assert order == [1, 5, 9]


def test_metrics_are_means_over_samples(caplog):
    run, loader, schedule, model = trainer(num=7, size=2)
    x, y = loader.dataset.tensors
    with torch.no_grad():  # learning rate 0 would do as well; the first epoch's metrics are of moving weights
        for group in run.engine.optimizer.param_groups:
            group["lr"] = 0.0
    run.fit(
        loader,
        epochs=1,
        hooks=[
            hooks.LossHook(),
            hooks.AccuracyHook(Accuracy()),
            hooks.LRSchedulerHook(schedule, by_epoch=True),
            hooks.LogMetricByStepHook(),
        ],
    )
    metrics = run.states["metrics"]["train"]
    assert metrics["Loss"].get_accumulated_value() == pytest.approx(nn.functional.cross_entropy(model(x), y).item())
    right = float((model(x).argmax(1) == y).double().mean())
    assert metrics["Accuracy"].get_accumulated_value() == pytest.approx(right)
    assert set(run.states["step_metrics"]) == {"loss", "accuracy", "lr"}


@pytest.mark.parametrize(("by_epoch", "moves"), [(True, 3), (False, 9)])
def test_scheduler_hook_reaches_the_right_rate(by_epoch, moves):
    run, loader, schedule, _ = trainer()
    run.fit(loader, epochs=3, hooks=[hooks.LRSchedulerHook(schedule, by_epoch=by_epoch)])
    assert schedule.get_last_lr() == [pytest.approx(0.1 * 0.5**moves)]


def test_step_metrics_alone_do_no_harm():
    run, loader, _, _ = trainer()
    run.fit(loader, epochs=1, hooks=[hooks.LogMetricByStepHook()])
    assert run.states["step_metrics"] == {}


def test_log_hooks_say_what_was_measured(tmp_path):
    timer, logger = MultiTimer(), get_dist_logger("test_trainer")
    logger.log_to_file(str(tmp_path))
    run, loader, schedule, _ = trainer(timer=timer)
    run.fit(
        loader,
        epochs=2,
        test_dataloader=loader.dataloader,
        hooks=[
            hooks.LossHook(),
            hooks.ThroughputHook(ignored_steps=1, tflop_per_step=0.001),
            hooks.LRSchedulerHook(schedule, by_epoch=True),
            hooks.LogMetricByEpochHook(logger),
            hooks.LogTimingByEpochHook(timer, logger),
            hooks.LogMemoryByEpochHook(logger, report_cpu=True),
            hooks.TensorboardHook(str(tmp_path / "board")),
        ],
    )
    (log,) = tmp_path.glob("*.log")
    text = log.read_text()
    for part in (
        "[Epoch 1 / Train]: Loss = ",
        "[Epoch 2 / Test]: Loss = ",
        "sample/s",
        "tflops",
        "Train-step: last = ",
    ):
        assert part in text
    assert list((tmp_path / "board" / "rank_0").iterdir())
    for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
        handler.close()


def test_throughput_without_a_timer_says_so():
    run, loader, _, _ = trainer()
    with pytest.raises(ValueError, match="timer"):
        run.fit(loader, epochs=1, hooks=[hooks.ThroughputHook()])


def test_checkpoint_hook_resumes_by_cur_epoch(tmp_path):
    straight, loader, _, model = trainer()
    straight.fit(loader, epochs=4)
    first, loader, _, other = trainer()
    first.fit(loader, epochs=2, hooks=[hooks.SaveCheckpointHook(checkpoint_dir=tmp_path / "run.pt")])
    second, loader, _, again = trainer()
    engine = second.engine
    second.cur_epoch = load_checkpoint(tmp_path / "run.pt", again, engine.optimizer, engine=engine)
    assert second.cur_epoch == 2
    second.fit(loader, epochs=4)
    assert torch.equal(model.weight, again.weight)
    assert not torch.equal(other.weight, again.weight)


def test_predict_and_evaluate_leave_training_alone():
    run, loader, _, model = trainer()
    run.fit(loader, epochs=1)
    before = model.weight.clone()
    assert run.predict(torch.ones(2, 4)).shape == (2, 3)
    run.evaluate(loader.dataloader, hooks=[hooks.LossHook()])
    assert run.states["metrics"]["test"]["Loss"].get_accumulated_value() > 0
    assert torch.equal(before, model.weight)
    assert run.engine.training
    assert run.engine.num_iterations == 11


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1},
        {"epochs": 1.5},
        {"epochs": 1, "max_steps": 0},
        {"epochs": 1, "hooks": [1]},
        {"epochs": 1, "hooks": ()},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(wrong):
    run, loader, _, _ = trainer()
    with pytest.raises(ValueError, match="given"):
        run.fit(loader, **wrong)
    assert run.cur_step == 0
