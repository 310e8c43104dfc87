"""Metrics: of the loss, of what was right, of speed. Each is in `trainer.states["metrics"]["train" | "test"]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.trainer.hooks.base_hook import BaseHook
from macrobatch.errors import ArgumentError

__all__ = ["AccuracyHook", "AccuracyMetric", "LossHook", "LossMetric", "Metric", "MetricHook", "ThroughputHook"]


class Metric:
    """Sums on the device, over the samples of an epoch; read when asked, over all ranks.

    Args:
        epoch_only: it has no value for a single iteration.
    """

    def __init__(self, epoch_only: bool = False) -> None:
        self.epoch_only = epoch_only
        self.reset()

    def reset(self) -> None:
        """An epoch begins."""
        self.total: Tensor | None = None
        self.count = 0
        self.latest: tuple[Tensor, int] | None = None

    def add(self, total: Tensor, count: int) -> None:
        """A batch's sum, and over how many samples it is."""
        added = total.detach().double()
        self.latest = added, count
        self.total = added if self.total is None else self.total + added
        self.count += count

    def get_last_step_value(self) -> float:
        """The mean over the last batch, over all ranks."""
        return 0.0 if self.latest is None else means([self.latest])[0]

    def get_accumulated_value(self) -> float:
        """The mean over the epoch so far, over all ranks."""
        return 0.0 if self.total is None else means([(self.total, self.count)])[0]


LossMetric = Metric
AccuracyMetric = Metric


class MetricHook(BaseHook):
    """Base of hooks that measure.

    A subclass puts metrics into `trainer.states["metrics"]["train" | "test"]` in `after_hook_is_attached`, after
    `self._check_metric_states_initialization(trainer)`. A metric has `epoch_only`, `get_last_step_value()` and
    `get_accumulated_value()`, each a number or text.
    """

    _is_stage_to_compute = True  # what subclasses written for the original ask: every rank has the whole model

    def __init__(self, priority: int = 0) -> None:
        super().__init__(priority)

    def _check_metric_states_initialization(self, trainer: Any) -> None:
        self.init_runner_states(trainer, "metrics", {"train": {}, "test": {}})

    def _make(self, trainer: Any, name: str) -> tuple[Metric, Metric]:
        self._check_metric_states_initialization(trainer)
        made = Metric(), Metric(epoch_only=True)
        trainer.states["metrics"]["train"][name], trainer.states["metrics"]["test"][name] = made
        return made


class LossHook(MetricHook):
    """The mean loss over samples."""

    def after_hook_is_attached(self, trainer: Any) -> None:
        self._train, self._test = self._make(trainer, "Loss")

    def before_train_epoch(self, trainer: Any) -> None:
        self._train.reset()

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        _add_mean(self._train, trainer, loss)

    def before_test_epoch(self, trainer: Any) -> None:
        self._test.reset()

    def after_test_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        _add_mean(self._test, trainer, loss)


class AccuracyHook(MetricHook):
    """The share of samples that are right.

    Args:
        accuracy_func: `(output, label) -> ` number of samples that are right, for instance
            `macrobatch.colossalai.nn.metric.Accuracy()`.
    """

    def __init__(self, accuracy_func: Callable[[Any, Any], Tensor], priority: int = 0) -> None:
        super().__init__(priority)
        self.accuracy_func = accuracy_func

    def after_hook_is_attached(self, trainer: Any) -> None:
        self._train, self._test = self._make(trainer, "Accuracy")

    def before_train_epoch(self, trainer: Any) -> None:
        self._train.reset()

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        self._add(self._train, trainer, output, label)

    def before_test_epoch(self, trainer: Any) -> None:
        self._test.reset()

    def after_test_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        self._add(self._test, trainer, output, label)

    def _add(self, metric: Metric, trainer: Any, output: Any, label: Any) -> None:
        if output is None:
            raise ArgumentError(
                "AccuracyHook",
                given="return_output_label=False",
                expected="outputs and labels to compare",
                fix="leave return_output_label at True",
            )
        outputs, labels = (value[0] if isinstance(value, list | tuple) else value for value in (output, label))
        metric.add(self.accuracy_func(outputs, labels), trainer.engine.schedule.batch_size)


class ThroughputHook(MetricHook):
    """Samples per second of all ranks, by the trainer's timer.

    Args:
        ignored_steps: micro-iterations at the beginning of an epoch that do not count.
        tflop_per_step: work of one micro-iteration of this rank in 10¹² operations, to report TFLOP/s as well.
        use_local: report this rank's own.
    """

    def __init__(
        self, ignored_steps: int = 0, priority: int = 10, tflop_per_step: float = 0, use_local: bool = False
    ) -> None:
        super().__init__(priority)
        self.ignored_steps = ignored_steps
        self.tflop_per_step = tflop_per_step
        self.use_local = use_local

    def after_hook_is_attached(self, trainer: Any) -> None:
        if trainer.timer is None or not trainer.timer.is_on():
            raise ArgumentError(
                "ThroughputHook",
                given="a trainer without a timer",
                expected="one with a timer that is on",
                fix="build Trainer(engine, timer=MultiTimer())",
            )
        self._check_metric_states_initialization(trainer)
        self._by_mode = {
            mode: Throughput(self, lambda name=name: trainer.timer.get_timer(name).get_history())
            for mode, name in (("train", "Train-step"), ("test", "Test-step"))
        }
        for mode, throughput in self._by_mode.items():
            trainer.states["metrics"][mode]["Throughput"] = throughput

    def before_train_epoch(self, trainer: Any) -> None:
        self._by_mode["train"].reset()

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        self._by_mode["train"].add(trainer.engine.schedule.batch_size)

    def before_test_epoch(self, trainer: Any) -> None:
        self._by_mode["test"].reset()

    def after_test_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        self._by_mode["test"].add(trainer.engine.schedule.batch_size)


class Throughput:
    """Samples and seconds of an epoch.

    Args:
        hook: how to count.
        history: called, when somebody looks, for the seconds of each batch, the latest last.
    """

    epoch_only = False

    def __init__(self, hook: ThroughputHook, history: Callable[[], list[float]]) -> None:
        self._hook = hook
        self._history = history
        self.reset()

    def reset(self) -> None:
        """An epoch begins."""
        self.num_samples: list[int] = []

    def add(self, num_samples: int) -> None:
        """A batch."""
        self.num_samples.append(num_samples)

    def get_last_step_value(self) -> str:
        """Of the last batch."""
        return self._text(max(len(self.num_samples) - 1, 0))

    def get_accumulated_value(self) -> str:
        """Of the epoch so far."""
        return self._text(self._hook.ignored_steps)

    def _text(self, begin: int) -> str:
        """From the batch with that number on."""
        num_steps = len(self.num_samples)
        samples = self.num_samples[begin:]
        seconds = sum(self._history()[-num_steps:][begin:]) if samples else 0.0
        num_ranks = 1 if self._hook.use_local else gpc.data_parallel_size
        rate = f"{sum(samples) * num_ranks / (seconds + 1e-12):.3f} sample/s"
        if self._hook.tflop_per_step:
            rate += f", {self._hook.tflop_per_step * len(samples) / (seconds + 1e-12):.3f} tflops"
        return rate


def _add_mean(metric: Metric, trainer: Any, loss: Any) -> None:
    if loss is not None:
        num = trainer.engine.schedule.batch_size
        metric.add(loss.detach() * num, num)


def means(sums: Sequence[tuple[Tensor, int]]) -> list[float]:
    """From sums and what they are over, the means over all ranks; they are waited for, once. All ranks call."""
    if not sums:
        return []
    totals = torch.stack([total for total, _ in sums])
    both = torch.stack([totals, totals.new_tensor([count for _, count in sums])])
    if gpc.data_parallel_size > 1:
        dist.all_reduce(both)
    return [total / count if count else 0.0 for total, count in zip(*both.tolist(), strict=True)]
