"""The trainer and its hooks, by the numbers that they report."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import macrobatch.colossalai as colossalai
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.colossalai.nn.metric import Accuracy
from macrobatch.colossalai.trainer import Trainer, hooks
from macrobatch.colossalai.utils import DataParallelSampler, MultiTimer, load_checkpoint
from macrobatch.errors import ArgumentError, BatchError
from tests.sync.windows import Collectives

pytestmark = pytest.mark.xdist_group("ranks")


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


# --- what the trainer makes of windows ---


@pytest.mark.parametrize(("batch_size", "window"), [(2, 8), (5, 20)])
def test_updates_are_those_of_a_plain_loop_over_macro_batches(batch_size, window):
    """With a loader that is not the one of `initialize`."""
    run, loader, _, model = trainer()
    model.double()
    x, y = loader.dataset.tensors
    reference = copy.deepcopy(model)
    run.fit(DataLoader(TensorDataset(x.double(), y), batch_size=batch_size), epochs=2)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for rows in 2 * torch.arange(22).split(window):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x[rows].double()), y[rows]).backward()
        optimizer.step()
    for parameter, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(parameter, wanted, rtol=0, atol=1e-14)  # float64: some tens of roundings of 1e-16


def test_steps_are_those_of_all_calls_together():
    run, loader, _, _ = trainer()
    run.fit(loader, epochs=1, max_steps=6)
    run.fit(loader, epochs=5, max_steps=15)
    assert (run.cur_step, run.cur_epoch) == (15, 2)
    run.fit(loader, epochs=5, max_steps=15)
    assert (run.cur_step, run.engine.num_iterations) == (15, 15)


def test_an_epoch_that_is_set_counts_its_steps():
    run, loader, _, _ = trainer()
    run.cur_epoch = 2
    run.fit(loader, epochs=5, max_steps=24)
    assert (run.cur_step, run.cur_epoch, run.engine.num_iterations) == (24, 3, 2)
    assert run.engine.optimizer.accumulate_step == 0


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(4), torch.tensor(0))] * 6)


def test_a_stream_without_a_length():
    run, _, _, _ = trainer()
    stream = DataLoader(Stream(), batch_size=1)
    run.fit(stream, epochs=2, test_dataloader=stream, hooks=[hooks.LossHook()])
    assert (run.cur_step, run.engine.num_updates, run.steps_per_epoch) == (12, 4, 0)


def test_times_and_moments_are_those_of_the_batches(tmp_path):
    timer, logger = MultiTimer(), get_dist_logger("test_times")
    logger.log_to_file(str(tmp_path))
    run, loader, _, _ = trainer(timer=timer)
    recording = Recording()

    class Noting(hooks.BaseHook):
        def after_train_epoch(self, trainer: Any) -> None:
            steps = timer.get_timer("Train-step")
            self.history, self.last = steps.get_history(), steps.get_elapsed_time()

    noting = Noting()
    timing = hooks.LogTimingByEpochHook(timer, logger, ignore_num_train_steps=9)
    run.fit(loader, epochs=1, test_dataloader=loader.dataloader, hooks=[noting, recording, timing])
    assert len(noting.history) == 11
    assert noting.last == noting.history[-1]
    assert [recording.calls.count(f"before_{name}_iter") for name in ("train", "test")] == [11, 11]
    (log,) = tmp_path.glob("*.log")
    mean = sum(noting.history[9:]) / 2
    assert f"Train-step: last = {noting.last:.4g} s, mean = {mean:.4g} s" in log.read_text()


@pytest.mark.parametrize("interval", [0, -1, 1.5, True])
def test_an_interval_that_is_none_is_refused(interval):
    for make in (hooks.LogMetricByEpochHook, hooks.LogMemoryByEpochHook):
        with pytest.raises(ValueError, match="interval"):
            make(get_dist_logger(), interval=interval)
    with pytest.raises(ValueError, match="interval"):
        hooks.SaveCheckpointHook(interval, "folder")


# --- hooks of one's own ---


class LargestLoss:
    """A metric that is not one of ours."""

    epoch_only = False

    def reset(self) -> None:
        self.losses: list[float] = []

    def get_last_step_value(self) -> float:
        return self.losses[-1]

    def get_accumulated_value(self) -> float:
        return max(self.losses)


class LargestLossHook(hooks.MetricHook):
    def after_hook_is_attached(self, trainer: Any) -> None:
        self._check_metric_states_initialization(trainer)
        if self._is_stage_to_compute:
            self.metric = trainer.states["metrics"]["train"]["Largest"] = LargestLoss()

    def before_train_epoch(self, trainer: Any) -> None:
        self.metric.reset()

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        self.metric.losses.append(loss.item())


def test_a_metric_of_ones_own_is_shown_and_logged(tmp_path):
    logger = get_dist_logger("test_metric_of_ones_own")
    logger.log_to_file(str(tmp_path))
    run, loader, _, _ = trainer()
    board = hooks.TensorboardHook(str(tmp_path / "board"))
    own = LargestLossHook(priority=3)
    run.fit(loader, epochs=1, hooks=[hooks.LogMetricByEpochHook(logger), hooks.LogMetricByStepHook(), own, board])
    assert own.priority == 3
    assert run.states["step_metrics"] == {"largest": f"{own.metric.losses[-1]:.4g}"}
    (log,) = tmp_path.glob("*.log")
    assert f"[Epoch 1 / Train]: Largest = {max(own.metric.losses):.4g}" in log.read_text()
    events = EventAccumulator(str(tmp_path / "board" / "rank_0")).Reload()
    assert [event.value for event in events.Scalars("Largest/train")] == pytest.approx(own.metric.losses)
    assert [event.value for event in events.Scalars("Largest/train_epoch")] == pytest.approx([max(own.metric.losses)])


def test_what_is_shown_is_asked_for_at_the_end_of_a_window():
    """Asking waits for the device, and for all ranks."""

    class Asked(LargestLoss):
        num_asked = 0

        def get_last_step_value(self) -> float:
            self.num_asked += 1
            return super().get_last_step_value()

    class AskedHook(LargestLossHook):
        def after_hook_is_attached(self, trainer: Any) -> None:
            self._check_metric_states_initialization(trainer)
            self.metric = trainer.states["metrics"]["train"]["Largest"] = Asked()

    run, loader, _, _ = trainer()  # 11 batches: windows of 4, 4 and 3
    own = AskedHook()
    run.fit(loader, epochs=2, hooks=[own, hooks.LogMetricByStepHook()])
    assert own.metric.num_asked == 6


class Meetings(hooks.BaseHook):
    """Counts the collectives of every micro-iteration, what hooks with a lower priority do among them."""

    def __init__(self) -> None:
        super().__init__(priority=100)
        self.nums: list[int] = []

    def before_train_iter(self, trainer: Any) -> None:
        self.mode = Collectives()
        self.mode.__enter__()

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.nums.append(self.mode.count.total())


def job_of_hooks(folder: str) -> tuple[list[int], list[float], list[float]]:
    """Collectives of each micro-iteration; losses in TensorBoard, and their means over ranks."""
    run, loader, schedule, _ = trainer(num=16, timer=MultiTimer())
    losses: list[float] = []

    class Noting(hooks.BaseHook):
        def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
            losses.append(loss.item())

    meetings = Meetings()
    shown = [hooks.LossHook(), hooks.AccuracyHook(Accuracy()), hooks.ThroughputHook(), hooks.LogMetricByStepHook()]
    board = [hooks.LRSchedulerHook(schedule, by_epoch=False), hooks.TensorboardHook(folder, ranks=[0, 1])]
    run.fit(loader, epochs=1, hooks=[*shown, *board, Noting(), meetings])
    events = EventAccumulator(f"{folder}/rank_{dist.get_rank()}").Reload()
    everywhere = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(everywhere)
    return meetings.nums, [event.value for event in events.Scalars("Loss/train")], (everywhere / 2).tolist()


def test_ranks_do_not_meet_within_a_window_and_every_iteration_is_written(ranks, tmp_path):
    for nums, written, losses in ranks(2).run(job_of_hooks, str(tmp_path)):
        assert len(nums) == 8
        assert [num > 0 for num in nums[4:]] == [False, False, False, True]  # the first window compares checksums
        assert written == pytest.approx(losses, rel=1e-6)  # TensorBoard keeps float32


def test_accuracy_is_that_of_the_first_output():
    run, _, _, model = trainer()

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return model(x), x

    run.engine._model = Two()
    run.engine._criterion = lambda logits, _, label: nn.functional.cross_entropy(logits, label)
    run.evaluate([(torch.ones(3, 4), torch.zeros(3, dtype=torch.long))], hooks=[hooks.AccuracyHook(Accuracy())])
    right = float(model(torch.ones(1, 4)).argmax() == 0)
    assert run.states["metrics"]["test"]["Accuracy"].get_accumulated_value() == right


def test_metrics_of_another_call_are_gone():
    run, loader, _, _ = trainer()
    run.fit(loader, epochs=1, hooks=[hooks.LossHook()])
    run.fit(loader, epochs=2, hooks=[hooks.LogMetricByStepHook()])
    assert run.states == {"step_metrics": {}}


# --- checkpoints ---


def test_the_hook_saves_the_schedule_that_another_hook_moves(tmp_path):
    run, loader, schedule, _ = trainer()
    saving = hooks.SaveCheckpointHook(checkpoint_dir=tmp_path)
    run.fit(loader, epochs=2, hooks=[saving, hooks.LRSchedulerHook(schedule, by_epoch=True)])
    _, _, fresh, model = trainer()
    assert load_checkpoint(tmp_path / "checkpoint.pt", model, lr_scheduler=fresh) == 2
    assert fresh.get_last_lr() == schedule.get_last_lr() == [0.025]


def test_a_checkpoint_within_an_epoch_begins_that_epoch_anew(tmp_path):
    run, loader, _, _ = trainer()
    saving = hooks.SaveCheckpointHook(6, tmp_path / "a.pt", save_by_iter=True)
    run.fit(loader, epochs=1, max_steps=7, hooks=[saving])
    run, loader, _, model = trainer()
    run.cur_epoch = load_checkpoint(tmp_path / "a.pt", model, run.engine.optimizer, engine=run.engine)
    assert run.cur_epoch == 0
    assert run.engine.optimizer.accumulate_step == 2
    run.fit(loader, epochs=1)
    # 1 window was applied before the checkpoint; 4, 4 and 3 micro-batches follow, none of them with the 2 saved ones.
    assert run.engine.num_updates == 4
    assert run.engine.optimizer.window.num_dropped == 2


def test_a_resumed_epoch_has_its_own_order():
    run, _, _, _ = trainer()
    numbers = torch.arange(12, dtype=torch.float32)[:, None].expand(12, 4)
    dataset = TensorDataset(numbers, torch.zeros(12, dtype=torch.long))
    seen: list[list[float]] = []

    class Noting(hooks.BaseHook):
        def before_train_epoch(self, trainer: Any) -> None:
            seen.append([])

        def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
            seen[-1] += inputs.pop().tolist()

    inputs: list[torch.Tensor] = []
    run.engine.model.register_forward_pre_hook(lambda _, args: inputs.append(args[0][:, 0]))

    def shuffled() -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=2, sampler=DataParallelSampler(dataset, shuffle=True))

    run.fit(shuffled(), epochs=3, hooks=[Noting()])
    run.cur_epoch = 2
    run.fit(shuffled(), epochs=3, hooks=[Noting()])
    assert seen[0] != seen[1] != seen[2]
    assert seen[3] == seen[2]


NOTHING = {
    "list": [],
    "iterator": iter([]),
    "loader": DataLoader(TensorDataset(torch.ones(3, 4)), batch_size=4, drop_last=True),
}


@pytest.mark.parametrize("batches", NOTHING.values(), ids=NOTHING)
def test_an_epoch_without_a_batch_is_refused(batches: Any):
    runner, _, _, model = trainer()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BatchError, match=r"train_dataloader: given no batch in epoch 1"):
        runner.fit(batches, epochs=1)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert runner.cur_epoch == 0


def test_an_iterator_is_refused_when_it_has_ended_and_not_counted_as_epochs():
    runner, _, _, _ = trainer(size=1)
    batches = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))] * 3
    with pytest.raises(BatchError, match=r"given no batch in epoch 2.*an iterator has to become a list"):
        runner.fit(iter(batches), epochs=3)
    assert (runner.cur_epoch, runner.engine.num_updates) == (1, 3)


def test_a_trainer_of_no_engine_is_refused():
    with pytest.raises(ArgumentError, match="engine: given int; expected an Engine"):
        Trainer(3)
