"""Showing what was measured: on the progress bar, in the log, in TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from macrobatch.checks import check_integer
from macrobatch.colossalai.context import ParallelMode
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.trainer.hooks.base_hook import BaseHook
from macrobatch.colossalai.trainer.hooks.metric_hook import Metric, Throughput, means
from macrobatch.colossalai.utils.memory import report_memory_usage

__all__ = [
    "LogMemoryByEpochHook",
    "LogMetricByEpochHook",
    "LogMetricByStepHook",
    "LogTimingByEpochHook",
    "TensorboardHook",
]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _metrics(trainer: Any, mode: str) -> dict[str, Any]:
    return trainer.states.get("metrics", {}).get(mode, {})


class LogMetricByStepHook(BaseHook):
    """The metrics of the last iteration of each window, on the progress bar. In between, nobody waits for them."""

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        if not trainer.engine.optimizer.has_closed:
            return
        trainer.states["step_metrics"] = {
            name.lower(): _shown(metric.get_last_step_value())
            for name, metric in _metrics(trainer, "train").items()
            if not metric.epoch_only
        }

    def after_test_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        trainer.states["step_metrics"] = {
            name.lower(): _shown(metric.get_last_step_value()) for name, metric in _metrics(trainer, "test").items()
        }


class _EveryFewEpochs(BaseHook):
    def __init__(self, logger: Any, interval: int = 1, priority: int = 10) -> None:
        super().__init__(priority)
        check_integer("interval", interval, "the epochs from one log to the next", fix="pass 1")
        self.logger = logger
        self.interval = interval

    def _is_due(self, trainer: Any) -> bool:
        return trainer.cur_epoch % self.interval == 0


class LogMetricByEpochHook(_EveryFewEpochs):
    """`[Epoch 1 / Train]: Loss = 0.3 | LR = 0.1`, over all ranks, on the first.

    Args:
        interval: epochs from one line to the next.
    """

    def after_train_epoch(self, trainer: Any) -> None:
        self._log(trainer, "train")

    def after_test_epoch(self, trainer: Any) -> None:
        self._log(trainer, "test")

    def _log(self, trainer: Any, mode: str) -> None:
        if self._is_due(trainer):
            values = {name: _shown(m.get_accumulated_value()) for name, m in _metrics(trainer, mode).items()}
            text = " | ".join(f"{name} = {value}" for name, value in values.items())
            self.logger.info(f"[Epoch {trainer.cur_epoch} / {mode.capitalize()}]: {text}", ranks=[0])


class LogMemoryByEpochHook(_EveryFewEpochs):
    """Memory in use, in the log.

    Args:
        log_eval: after testing, too.
        report_cpu: the host's as well.
    """

    def __init__(
        self, logger: Any, interval: int = 1, priority: int = 10, log_eval: bool = True, report_cpu: bool = False
    ) -> None:
        super().__init__(logger, interval, priority)
        self._log_eval = log_eval
        self._report_cpu = report_cpu

    def before_train(self, trainer: Any) -> None:
        report_memory_usage("Before-train", self.logger, report_cpu=self._report_cpu)

    def after_train_epoch(self, trainer: Any) -> None:
        if self._is_due(trainer):
            report_memory_usage(f"[Epoch {trainer.cur_epoch} / Train]", self.logger, report_cpu=self._report_cpu)

    def after_test(self, trainer: Any) -> None:
        if self._log_eval and self._is_due(trainer):
            report_memory_usage(f"[Epoch {trainer.cur_epoch} / Test]", self.logger, report_cpu=self._report_cpu)


class LogTimingByEpochHook(_EveryFewEpochs):
    """What the trainer's timer has measured, in the log.

    Args:
        timer: a `MultiTimer`, the trainer's own.
        ignore_num_train_steps: micro-iterations at the beginning of training that are left out of the mean.
    """

    def __init__(
        self,
        timer: Any,
        logger: Any,
        interval: int = 1,
        priority: int = 10,
        log_eval: bool = True,
        ignore_num_train_steps: int = 0,
    ) -> None:
        super().__init__(logger, interval, priority)
        self._timer = timer
        self._log_eval = log_eval
        self._num_ignored = ignore_num_train_steps

    def after_train_epoch(self, trainer: Any) -> None:
        if self._is_due(trainer):
            self._log(trainer, "Train")

    def after_test_epoch(self, trainer: Any) -> None:
        if self._log_eval and self._is_due(trainer):
            self._log(trainer, "Test")

    def _log(self, trainer: Any, mode: str) -> None:
        texts: list[str] = []
        for name, timer in self._timer:
            if name.startswith(mode):
                text = f"{name}: last = {timer.get_elapsed_time():.4g} s"
                history = timer.get_history()[self._num_ignored if name == "Train-step" else 0 :]
                if history:
                    text += f", mean = {sum(history) / len(history):.4g} s"
                texts.append(text)
        self.logger.info(f"[Epoch {trainer.cur_epoch} / {mode}]: {' | '.join(texts)}", ranks=[0])


class TensorboardHook(BaseHook):
    """Metrics in TensorBoard, a folder for each rank that writes. Those of the iterations of a window are written when
    it ends.

    Args:
        log_dir: where.
        ranks: which write; by default the first.
    """

    def __init__(
        self,
        log_dir: str,
        ranks: Sequence[int] | None = None,
        parallel_mode: ParallelMode = ParallelMode.GLOBAL,
        priority: int = 10,
    ) -> None:
        super().__init__(priority)
        self._writer: Any = None
        self._held: list[tuple[str, int, tuple[Tensor, int]]] = []
        self._writes = gpc.get_local_rank(parallel_mode) in ([0] if ranks is None else ranks)
        if self._writes:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(os.path.join(log_dir, f"rank_{gpc.get_global_rank()}"))

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        for name, metric in _metrics(trainer, "train").items():
            if isinstance(metric, Metric):
                if metric.latest is not None:
                    self._held.append((name, trainer.cur_step, metric.latest))
            elif not (metric.epoch_only or isinstance(metric, Throughput)):  # that is text
                self._write(f"{name}/train", metric.get_last_step_value(), trainer.cur_step)
        if trainer.engine.optimizer.has_closed:
            self._release()

    def after_train_epoch(self, trainer: Any) -> None:
        self._release()
        self._write_epoch(trainer, "train")

    def after_test_epoch(self, trainer: Any) -> None:
        self._write_epoch(trainer, "test")

    def after_train(self, trainer: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def _release(self) -> None:
        for (name, step, _), value in zip(self._held, means([latest for *_, latest in self._held]), strict=True):
            self._write(f"{name}/train", value, step)
        self._held = []

    def _write_epoch(self, trainer: Any, mode: str) -> None:
        for name, metric in _metrics(trainer, mode).items():
            # Asked on every rank, since a metric is a sum over all of them.
            self._write(f"{name}/{mode}_epoch", metric.get_accumulated_value(), trainer.cur_epoch)

    def _write(self, name: str, value: float | str, step: int) -> None:
        if self._writer is not None and not isinstance(value, str):
            self._writer.add_scalar(name, value, step)
