"""What one iteration does with a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from macrobatch import tree
from macrobatch.colossalai.engine.gradient_accumulation import samples_of
from macrobatch.colossalai.utils.cuda import get_current_device
from macrobatch.errors import ArgumentError, BatchError

__all__ = ["BaseSchedule", "NonPipelineSchedule"]


class BaseSchedule:
    """A batch, moved to the device and taken apart into data and label.

    Args:
        data_process_func: `batch -> (data, label)`, for batches that are not such a pair.
    """

    def __init__(self, data_process_func: Callable[[Any], tuple[Any, Any]] | None = None) -> None:
        self.data_process_func = data_process_func
        self.batch_size = 0

    def load_batch(self, data_iter: Iterator[Any], to_gpu: bool = True) -> tuple[Any, Any]:
        """The next batch's data and label."""
        batch = next(data_iter)
        if to_gpu:
            batch = tree.to_device(batch, get_current_device())
        self.batch_size = samples_of(batch)
        if self.data_process_func is not None:
            return self.data_process_func(batch)
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise BatchError(
                "the batch",
                given=f"a {type(batch).__name__}",
                expected="a pair of data and label",
                fix="give the schedule a data_process_func that makes one of it",
            )
        return batch[0], batch[1]

    def pre_processing(self, engine: Any) -> None:
        """Called once, before the first batch."""


class NonPipelineSchedule(BaseSchedule):
    """Forward, criterion and backward of a batch."""

    def forward_backward_step(
        self,
        engine: Any,
        data_iter: Iterator[Any],
        forward_only: bool = False,
        return_loss: bool = True,
        return_output_label: bool = True,
    ) -> tuple[Any, Any, Tensor | None]:
        """Output, label and loss of the next batch; None for what is not asked for.

        Args:
            forward_only: no backward, and no part of a micro-iteration.

        Raises:
            ArgumentError: a loss is asked for, but the engine has no criterion; or a backward without a loss.
            BatchError: the batch is not a pair of data and label.
        """
        if return_loss and engine.criterion is None:
            raise ArgumentError(
                "the schedule",
                given="an engine without a criterion",
                expected="one, for the loss",
                fix="pass initialize(..., criterion=...); a model that returns its loss takes lambda loss, label: loss",
            )
        if not (forward_only or return_loss):
            raise ArgumentError(
                "the schedule", given="return_loss=False", expected="a loss to train on", fix="leave return_loss out"
            )
        data, label = self.load_batch(data_iter)
        if not forward_only:
            engine.optimizer.num_samples = self.batch_size
        with torch.set_grad_enabled(not forward_only and torch.is_grad_enabled()):
            output = _called(engine, data)
            loss = _criterion(engine, output, label) if return_loss else None
        if loss is not None and not forward_only:
            engine.backward(loss)
        return (output, label, loss) if return_output_label else (None, None, loss)


def _called(function: Any, data: Any) -> Any:
    if isinstance(data, Mapping):
        return function(**data)
    return function(*data) if isinstance(data, list | tuple) else function(data)


def _criterion(engine: Any, output: Any, label: Any) -> Tensor:
    if isinstance(output, Mapping) and isinstance(label, Mapping):
        return engine.criterion(**output, **label)
    outputs = output if isinstance(output, list | tuple) else (output,)
    if isinstance(label, Mapping):
        return engine.criterion(*outputs, **label)
    labels = label if isinstance(label, list | tuple) else (label,)
    return engine.criterion(*outputs, *labels)
