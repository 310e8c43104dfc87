"""Moving the learning rate."""

from __future__ import annotations

from typing import Any

from macrobatch.colossalai.trainer.hooks.base_hook import BaseHook

__all__ = ["LRSchedulerHook"]


class LRSchedulerHook(BaseHook):
    """Steps a scheduler after every epoch, or after every micro-iteration (of which those with an update count).

    Args:
        lr_scheduler: the one that `initialize` returned, or one of your own that is not accumulated.
        by_epoch: when.
        store_lr_in_state: show the learning rate among the metrics.
    """

    def __init__(self, lr_scheduler: Any, by_epoch: bool, store_lr_in_state: bool = True, priority: int = 1) -> None:
        super().__init__(priority)
        self.lr_scheduler = lr_scheduler
        self.by_epoch = by_epoch
        self.store_lr_in_state = store_lr_in_state

    def after_hook_is_attached(self, trainer: Any) -> None:
        self._show(trainer)

    def after_train_epoch(self, trainer: Any) -> None:
        if self.by_epoch:
            self.lr_scheduler.step()
            self._show(trainer)

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        if not self.by_epoch:
            self.lr_scheduler.step()
            self._show(trainer)

    def _show(self, trainer: Any) -> None:
        if self.store_lr_in_state:
            self.init_runner_states(trainer, "metrics", {"train": {}, "test": {}})
            trainer.states["metrics"]["train"]["LR"] = Rate(self.lr_scheduler.get_last_lr()[0])


class Rate:
    """A learning rate, as a metric."""

    epoch_only = False

    def __init__(self, value: float) -> None:
        self.value = value

    def get_last_step_value(self) -> float:
        """The rate."""
        return self.value

    def get_accumulated_value(self) -> float:
        """The rate."""
        return self.value
