"""Cosine annealing."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from macrobatch.checks import is_number
from macrobatch.colossalai.nn.lr_scheduler.delayed import (
    DelayerScheduler,
    WarmupDelayerScheduler,
    WarmupScheduler,
    checked_steps,
    step_after,
)
from macrobatch.errors import ArgumentError

__all__ = ["CosineAnnealingLR", "CosineAnnealingWarmupLR", "FlatAnnealingLR", "FlatAnnealingWarmupLR"]


class CosineAnnealingLR(torch_schedulers.CosineAnnealingLR):
    """From the base rate to `eta_min`, along half a cosine (https://arxiv.org/abs/1608.03983, without restarts).

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        eta_min: the rate after the last step.
        last_epoch: the step to go on after; -1 begins anew.

    ```pycon
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> scheduler = CosineAnnealingLR(optimizer, total_steps=2)
    >>> optimizer.step()
    >>> scheduler.step()
    >>> scheduler.get_last_lr()
    [0.05]

    ```
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, eta_min: float = 0, last_epoch: int = -1) -> None:
        super().__init__(
            optimizer, checked_steps("total_steps", total_steps, 1), eta_min=eta_min, last_epoch=last_epoch
        )


class CosineAnnealingWarmupLR(WarmupScheduler):
    """A linear warm-up, then cosine annealing.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, those of the warm-up among them; an integer >= 1.
        warmup_steps: those of the warm-up, 0 <= warmup_steps <= total_steps.
        eta_min: the rate after the last step.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        num_anneal = _rest(total_steps, warmup_steps)
        begin = step_after(optimizer, warmup_steps, last_epoch)
        after = torch_schedulers.CosineAnnealingLR(optimizer, max(1, num_anneal), eta_min=eta_min, last_epoch=begin)
        super().__init__(optimizer, warmup_steps, after, last_epoch=last_epoch)


class FlatAnnealingLR(DelayerScheduler):
    """The base rate for a share of the steps, then cosine annealing to 0.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        pct_start: the share of them with the base rate, 0 <= pct_start <= 1.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, pct_start: float = 0.72, last_epoch: int = -1) -> None:
        num_flat = int(_rest(total_steps, 0) * _checked_share(pct_start))
        begin = step_after(optimizer, num_flat, last_epoch)
        after = torch_schedulers.CosineAnnealingLR(optimizer, max(1, total_steps - num_flat), last_epoch=begin)
        super().__init__(optimizer, num_flat, after, last_epoch=last_epoch)


class FlatAnnealingWarmupLR(WarmupDelayerScheduler):
    """A linear warm-up, the base rate for a share of the other steps, then cosine annealing.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, those of the warm-up among them; an integer >= 1.
        warmup_steps: those of the warm-up, 0 <= warmup_steps <= total_steps.
        pct_start: the share of the other steps with the base rate, 0 <= pct_start <= 1.
        eta_min: the rate after the last step.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        pct_start: float = 0.72,
        eta_min: float = 0,
        last_epoch: int = -1,
    ) -> None:
        rest = _rest(total_steps, warmup_steps)
        num_flat = int(rest * _checked_share(pct_start))
        begin = step_after(optimizer, warmup_steps + num_flat, last_epoch)
        after = torch_schedulers.CosineAnnealingLR(
            optimizer, max(1, rest - num_flat), eta_min=eta_min, last_epoch=begin
        )
        super().__init__(optimizer, warmup_steps, num_flat, after, last_epoch=last_epoch)


def _rest(total_steps: object, warmup_steps: object) -> int:
    total = checked_steps("total_steps", total_steps, 1)
    return total - checked_steps("warmup_steps", warmup_steps, 0, total)


def _checked_share(pct_start: float) -> float:
    if not is_number(pct_start) or not 0 <= pct_start <= 1:
        raise ArgumentError("pct_start", given=repr(pct_start), expected="a number from 0 to 1", fix="leave it out")
    return pct_start
