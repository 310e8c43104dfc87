"""Forward and backward of one micro-batch: the part of a window that may be captured and replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from macrobatch import tree
from macrobatch.core.autograd import backward
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.precision import Precision
from macrobatch.core.tally import Tally
from macrobatch.errors import ArgumentError

__all__ = ["LossFn", "MicroStep"]

LossFn = Callable[[Any, Any], Any]


class MicroStep:
    """Runs micro-batches eagerly. A subclass may record what the device does, and replay it.

    A step calls `bind` when it is built, and the object itself for every micro-batch. A call adds the micro-batch's
    gradient to every `.grad` in place, admits its loss and weight to the window's tally, and never waits for the
    device.
    """

    model: nn.Module
    gradients: GradientBuffer
    precision: Precision
    device: torch.device

    num_first = 1
    """How many of its first runs are slower than those that follow."""
    num_copies = 0
    """Of all gradients, that it holds at times beside a micro-batch that runs."""

    @property
    def keeps_memory(self) -> bool:
        """Whether what it keeps of a micro-batch takes as much memory as running it."""
        return False

    def fresh(self) -> MicroStep:
        """One of its kind that has seen nothing yet, to try micro-batches with."""
        return MicroStep()

    def release(self) -> None:
        """Give back what it keeps."""

    def bind(
        self, model: nn.Module, gradients: GradientBuffer, *, precision: Precision, device: torch.device
    ) -> MicroStep:
        """Learn what the calls are about. Returns itself.

        Raises:
            ArgumentError: another step uses it.
        """
        if hasattr(self, "model"):
            raise ArgumentError(
                "capture",
                given=f"a {type(self).__name__} that another step uses",
                expected="one for each step",
                fix="build one for each TrainStep",
            )
        self.model, self.gradients, self.precision, self.device = model, gradients, precision, device
        return self

    def window(self) -> AbstractContextManager[Any]:
        """Context of all forwards and backwards of a window."""
        return nullcontext()

    def __call__(self, loss_fn: LossFn, micro_batch: Any, num_rows: int, tally: Tally) -> None:
        """Forward, backward. A micro-batch of 0 rows runs like any other and counts nothing."""
        with self.precision.forward():
            output = loss_fn(self.model, tree.to_device(micro_batch, self.device))
        totals, seeds = (tally.admit if num_rows else tally.rehearse)(output, num_rows)
        if totals:
            backward(totals, self.precision.seeds(seeds))
