"""The engine: model, criterion and optimizer behind the calls of a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch.checks import check_number
from macrobatch.colossalai.engine.gradient_accumulation import GradAccumOptimizer, samples_of
from macrobatch.colossalai.engine.ophooks import BaseOpHook, OpHooks
from macrobatch.colossalai.engine.schedule import NonPipelineSchedule
from macrobatch.core.precision import Precision
from macrobatch.tree import map_tensors

__all__ = ["Engine"]


class Engine:
    """What a training loop calls in place of model, criterion, loss and optimizer.

    ```python
    for data, label in train_dataloader:
        engine.zero_grad()
        loss = engine.criterion(engine(data), label)
        engine.backward(loss)
        engine.step()  # an update, after the last micro-iteration of a window
    ```

    Args:
        model: trained in place.
        optimizer: a plain one has windows of one micro-iteration.
        criterion: of outputs and labels; a mean over the batch.
        gradient_handlers: called once per window, before clipping.
        clip_grad_norm: largest 2-norm of a window's gradient; 0 does not clip.
        ophook_list: called around the forward and backward of every module, see `BaseOpHook`.
        schedule: what `execute_schedule` does.

    Raises:
        ArgumentError: clip_grad_norm is negative or no number, or a hook is no BaseOpHook.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Any = None,
        gradient_handlers: Sequence[Any] | None = None,
        clip_grad_norm: float = 0.0,
        ophook_list: Sequence[BaseOpHook] | None = None,
        verbose: bool = True,
        schedule: Any = None,
    ) -> None:
        check_number("clip_grad_norm", clip_grad_norm, fix="pass 0.0 not to clip")
        self._model = model
        self._criterion = criterion
        self._optimizer = (
            optimizer if isinstance(optimizer, GradAccumOptimizer) else GradAccumOptimizer(optimizer, 1, model)
        )
        self._gradient_handlers = list(gradient_handlers or ())
        self._clip_grad_norm = float(clip_grad_norm)
        self._ophooks = OpHooks(model, ophook_list or ())
        self._schedule = NonPipelineSchedule() if schedule is None else schedule
        self.training = True
        self.grad_norm: Tensor | None = None
        """Norm of the last update's gradient before clipping, 0-d, if it was clipped."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self._model

    @property
    def optimizer(self) -> GradAccumOptimizer:
        """The optimizer, with its window."""
        return self._optimizer

    @property
    def criterion(self) -> Any:
        """The criterion itself."""
        return self._criterion

    @property
    def schedule(self) -> Any:
        """What `execute_schedule` does."""
        return self._schedule

    @property
    def ophooks(self) -> list[BaseOpHook]:
        """Called around the forward and backward of every module."""
        return self._ophooks.active

    @property
    def uses_pipeline(self) -> bool:
        """Always False: pipelines are not supported."""
        return False

    @property
    def num_updates(self) -> int:
        """Updates so far."""
        self._optimizer.accumulation.settle()
        return self._optimizer.window.num_updates

    @property
    def num_iterations(self) -> int:
        """Micro-iterations so far."""
        return self._optimizer.num_iterations

    @property
    def _precision(self) -> Precision:
        return self._optimizer.accumulation.precision

    def add_hook(self, ophook: BaseOpHook) -> None:
        """Call a hook around every module's forward and backward.

        Raises:
            ArgumentError: it is no BaseOpHook.
        """
        self._ophooks.add(ophook)

    def remove_hook(self, ophook: BaseOpHook) -> None:
        """Take it away again."""
        self._ophooks.remove(ophook)

    def zero_grad(self) -> None:
        """A micro-iteration begins. Gradients are cleared when a window does."""
        self._optimizer.zero_grad()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, in float32."""
        counts = self.training and torch.is_grad_enabled()
        if counts:
            self._optimizer.begin()
        with self._precision.forward():
            output = self._model(*args, **kwargs)
        if counts and self._optimizer.num_samples is None:
            self._optimizer.num_samples = samples_of(args)
        return map_tensors(_in_float32, output) if self._precision.rescales else output

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to the window."""
        self._optimizer.backward(loss)
        self._ophooks.post_iter()

    def backward_by_grad(self, tensor: Tensor, grad: Tensor) -> None:
        """Add the gradient of the loss whose gradient with respect to `tensor` is `grad`."""
        self._optimizer.backward_by_grad(tensor, grad)
        self._ophooks.post_iter()

    def step(self) -> Any:
        """The micro-iteration is over; after the last one of a window: handlers, clipping, optimizer.

        Returns:
            What the optimizer returns; None if there was no update.
        """
        if self._optimizer.accumulation.is_inside and self._optimizer.accumulation.is_last:
            try:
                self._optimizer.accumulation.finish()
                for handler in self._gradient_handlers:
                    handler.handle_gradient()
                self.grad_norm = self._optimizer.clip_grad_norm(self._model, self._clip_grad_norm)
            except BaseException:
                self._optimizer.fail()
                raise
        return self._optimizer.step()

    def execute_schedule(self, data_iter: Iterator[Any], **kwargs: Any) -> tuple[Any, Any, Tensor | None]:
        """Output, label and loss of the next batch, after its backward unless `forward_only`."""
        return self._schedule.forward_backward_step(self, data_iter, **kwargs)

    def train(self) -> None:
        """Training mode."""
        self.training = self._optimizer.is_training = True
        self._model.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self.training = self._optimizer.is_training = False
        self._model.eval()

    def state_dict(self) -> dict[str, Any]:
        """The window under way, its gradients included, of this rank."""
        return self._optimizer.accumulation.state_dict()

    def check_state_dict(self, state_dict: Any) -> None:
        """Raise StateError for a state that `load_state_dict` could not take over."""
        self._optimizer.accumulation.check_state_dict(state_dict)

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on with a saved window. The next pass over a loader continues it: skip the batches that it has seen.

        Raises:
            StateError: it does not fit.
        """
        self._optimizer.accumulation.load_state_dict(state_dict)
        self._optimizer.is_resumed = True


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
