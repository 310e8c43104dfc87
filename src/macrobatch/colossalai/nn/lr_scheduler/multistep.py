"""Decay at milestones."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from macrobatch.colossalai.nn.lr_scheduler.delayed import WarmupScheduler, checked_steps, step_after
from macrobatch.errors import ArgumentError

__all__ = ["MultiStepLR", "MultiStepWarmupLR"]


class MultiStepLR(torch_schedulers.MultiStepLR):
    """The rate times `gamma` at each milestone.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        milestones: steps, integers >= 0.
        gamma: the factor.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[int] | None = None,
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        checked_steps("total_steps", total_steps, 1)
        super().__init__(optimizer, _checked_milestones(milestones), gamma=gamma, last_epoch=last_epoch)


class MultiStepWarmupLR(WarmupScheduler):
    """A linear warm-up, then the rate times `gamma` at each milestone that is not before its end.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        warmup_steps: those of the warm-up, 0 <= warmup_steps <= total_steps.
        milestones: steps, counted from the beginning of the warm-up.
        gamma: the factor.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        milestones: Sequence[int] | None = None,
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        checked_steps("warmup_steps", warmup_steps, 0, checked_steps("total_steps", total_steps, 1))
        later = [step - warmup_steps for step in _checked_milestones(milestones) if step >= warmup_steps]
        begin = step_after(optimizer, warmup_steps, last_epoch)
        after = torch_schedulers.MultiStepLR(optimizer, later, gamma=gamma, last_epoch=begin)
        super().__init__(optimizer, warmup_steps, after, last_epoch=last_epoch)


def _checked_milestones(milestones: Sequence[int] | None) -> list[int]:
    if not isinstance(milestones, Sequence) or not milestones:
        raise ArgumentError(
            "milestones",
            given=repr(milestones),
            expected="a list of steps",
            fix="pass milestones=[30, 60], for example",
        )
    return [checked_steps("milestones", step) for step in milestones]
