"""Schedules that begin later: after a warm-up, after a constant phase, or after both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from macrobatch.checks import is_integer
from macrobatch.errors import ArgumentError, StateError

__all__ = ["DelayerScheduler", "WarmupDelayerScheduler", "WarmupScheduler", "checked_steps", "step_after"]


class WarmupDelayerScheduler(LRScheduler):
    """A linear warm-up, a constant phase, and then another schedule from its start.

    With W warm-up and D constant steps, step t has the learning rate

    ```text
    base · (t + 1) / W              t < W
    base                            W <= t < W + D
    after_scheduler at t - W - D    W + D <= t
    ```

    Args:
        optimizer: whose learning rates these are.
        warmup_epochs: W, an integer >= 0.
        delay_epochs: D, an integer >= 0.
        after_scheduler: a new schedule of the same optimizer.
        last_epoch: the step to go on after; -1 begins anew.

    ```pycon
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> after = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    >>> scheduler = WarmupDelayerScheduler(optimizer, 2, 1, after)
    >>> rates = []
    >>> for _ in range(6):
    ...     rates += scheduler.get_last_lr()
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]

    ```
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: int,
        delay_epochs: int,
        after_scheduler: LRScheduler,
        last_epoch: int = -1,
    ) -> None:
        self.warmup_epochs = checked_steps("warmup_epochs", warmup_epochs)
        self.delay_epochs = checked_steps("delay_epochs", delay_epochs)
        if not isinstance(after_scheduler, LRScheduler) or after_scheduler.optimizer is not optimizer:
            raise ArgumentError(
                "after_scheduler",
                given=repr(after_scheduler),
                expected="a scheduler of the same optimizer",
                fix="build it with the optimizer that you pass here",
            )
        self.after_scheduler = after_scheduler
        self._first_lrs = after_scheduler.get_last_lr()
        super().__init__(optimizer, last_epoch)

    @property
    def finished(self) -> bool:
        """Whether the schedule that comes after has begun."""
        return self.last_epoch >= self.warmup_epochs + self.delay_epochs

    def get_lr(self) -> list[Any]:
        if self.finished:
            return self._first_lrs
        if self.last_epoch >= self.warmup_epochs:
            return list(self.base_lrs)
        return [(self.last_epoch + 1) / self.warmup_epochs * lr for lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go on by one step. (torch has given up steps to a given epoch; they are refused.)"""
        if epoch is not None:
            raise ArgumentError("step", given=f"epoch={epoch}", expected="no argument", fix="call step() each time")
        if self.last_epoch < self.warmup_epochs + self.delay_epochs or self._is_initial:
            super().step()
        else:
            self.last_epoch += 1
            self._step_count += 1
            self.after_scheduler.step()
            self._last_lr = self.after_scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and where the schedule is that comes after; plain values."""
        state = {name: value for name, value in super().state_dict().items() if name != "after_scheduler"}
        return {**state, "after_scheduler": self.after_scheduler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Go on where a saved schedule was.

        Raises:
            StateError: it is of another kind.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != self.state_dict().keys():
            raise StateError(
                type(self).__name__,
                given=f"{state_dict!r:.200}",
                expected=f"a dict of {sorted(self.state_dict())}",
                fix="load what this kind of schedule has saved",
            )
        state = dict(state_dict)
        self.after_scheduler.load_state_dict(state.pop("after_scheduler"))
        super().load_state_dict(state)


class WarmupScheduler(WarmupDelayerScheduler):
    """A linear warm-up, and then another schedule from its start.

    Args:
        optimizer: whose learning rates these are.
        warmup_epochs: steps of the warm-up, an integer >= 0; in the last one the rate is the full one.
        after_scheduler: a new schedule of the same optimizer.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_epochs: int, after_scheduler: LRScheduler, last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, warmup_epochs, 0, after_scheduler, last_epoch)


class DelayerScheduler(WarmupDelayerScheduler):
    """A constant phase, and then another schedule from its start.

    Args:
        optimizer: whose learning rates these are.
        delay_epochs: steps of the constant phase, an integer >= 0.
        after_scheduler: a new schedule of the same optimizer.
        last_epoch: the step to go on after; -1 begins anew.
    """

    def __init__(
        self, optimizer: Optimizer, delay_epochs: int, after_scheduler: LRScheduler, last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, 0, delay_epochs, after_scheduler, last_epoch)


def step_after(optimizer: Optimizer, delay: int, last_epoch: int) -> int:
    """The `last_epoch` of a schedule that begins `delay` steps later, and the rate to build it with."""
    if last_epoch >= delay:
        return last_epoch - delay
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    return -1


def checked_steps(what: str, value: Any, lowest: int = 0, highest: float = math.inf) -> int:
    """The number of steps, if it is an integer within the bounds.

    Raises:
        ArgumentError: it is not.
    """
    if not is_integer(value, lowest) or value > highest:
        bounds = f">= {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
        raise ArgumentError(
            what, given=repr(value), expected=f"an integer {bounds}", fix="count optimizer steps, or epochs"
        )
    return value
