"""torch's schedules that do not depend on the number of all steps, with that number as an argument nevertheless."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from macrobatch.colossalai.nn.lr_scheduler.delayed import checked_steps
from macrobatch.errors import ArgumentError

__all__ = ["ExponentialLR", "LambdaLR", "MultiplicativeLR", "StepLR"]

Factor = Callable[[int], float]


class LambdaLR(torch_schedulers.LambdaLR):
    """The base rate times a function of the step.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        lr_lambda: the function, or a list of one for each parameter group.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        lr_lambda: Factor | list[Factor] | None = None,
        last_epoch: int = -1,
    ) -> None:
        checked_steps("total_steps", total_steps, 1)
        super().__init__(optimizer, _checked_lambda(lr_lambda), last_epoch=last_epoch)


class MultiplicativeLR(torch_schedulers.MultiplicativeLR):
    """The last rate times a function of the step.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        lr_lambda: the function, or a list of one for each parameter group.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        lr_lambda: Factor | list[Factor] | None = None,
        last_epoch: int = -1,
    ) -> None:
        checked_steps("total_steps", total_steps, 1)
        super().__init__(optimizer, _checked_lambda(lr_lambda), last_epoch=last_epoch)


class StepLR(torch_schedulers.StepLR):
    """The rate times `gamma` every `step_size` steps.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        step_size: an integer >= 1.
        gamma: the factor.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, step_size: int = 1, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        checked_steps("total_steps", total_steps, 1)
        super().__init__(optimizer, checked_steps("step_size", step_size, 1), gamma=gamma, last_epoch=last_epoch)


class ExponentialLR(torch_schedulers.ExponentialLR):
    """The rate times `gamma` every step.

    Args:
        optimizer: whose learning rates these are.
        total_steps: number of steps, an integer >= 1.
        gamma: the factor.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, gamma: float = 1.0, last_epoch: int = -1) -> None:
        checked_steps("total_steps", total_steps, 1)
        super().__init__(optimizer, gamma=gamma, last_epoch=last_epoch)


def _checked_lambda(lr_lambda: Factor | list[Factor] | None) -> Factor | list[Factor]:
    if lr_lambda is None:
        raise ArgumentError(
            "lr_lambda", given=None, expected="a function of the step", fix="pass lr_lambda=lambda step: 0.9**step"
        )
    return lr_lambda
