"""Saving while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from macrobatch.checks import check_integer
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.colossalai.trainer.hooks.base_hook import BaseHook
from macrobatch.colossalai.trainer.hooks.lr_scheduler_hook import LRSchedulerHook
from macrobatch.colossalai.utils.checkpointing import save_checkpoint
from macrobatch.errors import ArgumentError

__all__ = ["SaveCheckpointHook"]


class SaveCheckpointHook(BaseHook):
    """Model, optimizer, the scheduler of an `LRSchedulerHook` and the window under way, every few epochs or iterations.

    Args:
        interval: how many.
        checkpoint_dir: a file, which is replaced each time, or a folder for `checkpoint.pt`.
        model: whose weights; by default the engine's.
        save_by_iter: count micro-iterations, instead of epochs.
    """

    def __init__(
        self,
        interval: int = 1,
        checkpoint_dir: str | Path | None = None,
        model: Any = None,
        save_by_iter: bool = False,
        priority: int = 10,
    ) -> None:
        super().__init__(priority)
        check_integer("interval", interval, fix="pass 1")
        if checkpoint_dir is None:
            raise ArgumentError("checkpoint_dir", given=None, expected="a file or a folder", fix="pass one")
        self.interval = interval
        self.checkpoint_dir = Path(checkpoint_dir)
        self.save_by_iter = save_by_iter
        self._model = model
        self._lr_scheduler: Any = None

    def after_hook_is_attached(self, trainer: Any) -> None:
        module = trainer.engine.model if self._model is None else self._model
        self._model = getattr(module, "module", module)
        schedulers = [hook.lr_scheduler for hook in trainer.hooks if isinstance(hook, LRSchedulerHook)]
        self._lr_scheduler = next(iter(schedulers), None)

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        if self.save_by_iter and (trainer.cur_step + 1) % self.interval == 0:
            self._save(trainer)

    def after_train_epoch(self, trainer: Any) -> None:
        if not self.save_by_iter and trainer.cur_epoch % self.interval == 0:
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        path = self.checkpoint_dir / "checkpoint.pt" if not self.checkpoint_dir.suffix else self.checkpoint_dir
        engine = trainer.engine
        save_checkpoint(path, trainer.cur_epoch, self._model, engine.optimizer, self._lr_scheduler, engine)
        get_dist_logger().info(f"checkpoint of epoch {trainer.cur_epoch}: {path}", ranks=[0])
