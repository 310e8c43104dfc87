"""The one-cycle policy."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from macrobatch.colossalai.nn.lr_scheduler.delayed import checked_steps

__all__ = ["OneCycleLR"]


class OneCycleLR(torch_schedulers.OneCycleLR):
    """Up to the optimizer's own rate and down far below where it began (https://arxiv.org/abs/1708.07120).

    Args:
        optimizer: whose learning rates these are; those it has now are the highest ones.
        total_steps: number of steps, an integer >= 1.
        pct_start: the share of the steps that go up.
        anneal_strategy: "cos" or "linear".
        cycle_momentum: whether the momentum goes down and up the other way round.
        base_momentum: the lowest momentum.
        max_momentum: the highest momentum.
        div_factor: the highest rate by the first one.
        final_div_factor: the first rate by the last one.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 10000.0,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=checked_steps("total_steps", total_steps, 1),
            pct_start=pct_start,
            anneal_strategy=anneal_strategy,
            cycle_momentum=cycle_momentum,
            base_momentum=base_momentum,
            max_momentum=max_momentum,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
            last_epoch=last_epoch,
        )
