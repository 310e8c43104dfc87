"""Polynomial decay."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.colossalai.nn.lr_scheduler.delayed import WarmupScheduler, checked_steps, step_after
from macrobatch.errors import ArgumentError

__all__ = ["PolynomialLR", "PolynomialWarmupLR"]


class PolynomialLR(LRScheduler):
    """From the base rate to `end_lr` along a power.

    Step t of T has the learning rate `end + (base - end) · (1 - min(t, T) / T) ** power`.

    Args:
        optimizer: whose learning rates these are.
        total_steps: T, an integer >= 1.
        end_lr: the rate from T on, >= 0.
        power: 1.0 is a line.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        end_lr: float = 0.0001,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        if not end_lr >= 0:
            raise ArgumentError("end_lr", given=repr(end_lr), expected="a number >= 0", fix="leave it out")
        self.total_steps = checked_steps("total_steps", total_steps, 1)
        self.end_lr = end_lr
        self.power = power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        left = (1 - min(self.last_epoch, self.total_steps) / self.total_steps) ** self.power
        return [(lr - self.end_lr) * left + self.end_lr for lr in self.base_lrs]


class PolynomialWarmupLR(WarmupScheduler):
    """A linear warm-up, then polynomial decay.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, those of the warm-up among them; an integer >= 1.
        warmup_steps: those of the warm-up, 0 <= warmup_steps < total_steps.
        end_lr: the rate at the end, >= 0.
        power: 1.0 is a line.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        end_lr: float = 0.0001,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        checked_steps("warmup_steps", warmup_steps, 0, checked_steps("total_steps", total_steps, 1) - 1)
        begin = step_after(optimizer, warmup_steps, last_epoch)
        after = PolynomialLR(optimizer, total_steps - warmup_steps, end_lr=end_lr, power=power, last_epoch=begin)
        super().__init__(optimizer, warmup_steps, after, last_epoch=last_epoch)
