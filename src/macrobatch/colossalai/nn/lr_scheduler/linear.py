"""Linear warm-up and decay."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.colossalai.nn.lr_scheduler.delayed import checked_steps

__all__ = ["LinearWarmupLR"]


class LinearWarmupLR(LRScheduler):
    """Up in a line, and down to 0 in another.

    With W warm-up steps of T, step t has the learning rate `base · (t + 1) / (W + 1)` while t < W, then
    `base · (T - t) / (T - W)`, and 0 from T on.

    Args:
        optimizer: whose learning rates these are.
        total_steps: T, an integer >= 1.
        warmup_steps: W, 0 <= W < T.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, last_epoch: int = -1) -> None:
        self.total_steps = checked_steps("total_steps", total_steps, 1)
        self.warmup_steps = checked_steps("warmup_steps", warmup_steps, 0, total_steps - 1)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < self.warmup_steps:
            factor = (self.last_epoch + 1) / (self.warmup_steps + 1)
        else:
            factor = max(0, self.total_steps - self.last_epoch) / (self.total_steps - self.warmup_steps)
        return [factor * lr for lr in self.base_lrs]
