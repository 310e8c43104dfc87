"""Counting as the original does, where numbers have to be its own: `GradientAccumulationPlugin(original=True)`.

One counter for everything, no windows: a backward adds a loss divided by N to `.grad`, and `step` and `zero_grad` act
whenever the counter, or the end of a loader, says so. Ranks are `DistributedDataParallel`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from macrobatch.accelerate.gradient_state import GradientState
from macrobatch.accelerate.joining import evened
from macrobatch.accelerate.optimizer import AcceleratedOptimizer
from macrobatch.accelerate.scheduler import AcceleratedScheduler
from macrobatch.accelerate.utils.dataclasses import GradientAccumulationPlugin
from macrobatch.core.loss import Weight
from macrobatch.errors import LossError, StateError

__all__ = ["OriginalCounting", "OriginalOptimizer", "OriginalScheduler", "SharedState"]


class SharedState(GradientState):
    """One for all accelerators: the newest one's plugin, and one answer to whether optimizers step."""

    @property
    def _plugin(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._shared().get("latest_plugin", self._own_plugin)

    @_plugin.setter
    def _plugin(self, plugin: Any) -> None:
        self._own_plugin = plugin

    @property
    def _sync_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _steps_now()

    @_sync_gradients.setter
    def _sync_gradients(self, sync_gradients: bool) -> None:
        self._shared()["sync_gradients"] = sync_gradients

    @property
    def adjust_scheduler(self) -> bool:
        """Always False: in the original, the setting has no effect."""
        return False

    @property
    def is_at_end(self) -> bool:
        """Whether the loader that was begun last, and not read to its end, has yielded its last batch. One that was
        left by `break` counts for as long as it exists; once it is gone, there is no end to be seen."""
        begun = self._shared()["begun"]
        return bool(begun) and bool(getattr(begun[-1](), "end_of_dataloader", False))


def _steps_now() -> bool:
    return GradientState._shared_state.get("sync_gradients", True)  # pyright: ignore[reportPrivateUsage]


class OriginalOptimizer(AcceleratedOptimizer):
    """Steps and clears whenever `sync_gradients` is True."""

    @property
    def is_accumulating(self) -> bool:
        """Whether a step would do nothing now."""
        return not _steps_now()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update, if the counter says so; fp16 skips it if a gradient has overflowed.

        Args:
            closure: as for the wrapped optimizer.
        """
        if self.is_accumulating:
            return None
        if self.scaler is None:
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)
        stepped: list[bool] = []
        hook = self.optimizer.register_step_post_hook(lambda *_: stepped.append(True))
        try:
            returned = self.scaler.step(self.optimizer)
        finally:
            hook.remove()
        self.scaler.update()
        self._is_overflow = not stepped
        return returned

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the gradients away, if the counter says so."""
        if not self.is_accumulating:
            self._zero(set_to_none)


class OriginalScheduler(AcceleratedScheduler):
    """Moves when optimizers step, unless one of them was skipped."""

    def _is_held_up(self) -> bool:
        was_skipped = (getattr(optimizer, "step_was_skipped", False) for optimizer in self.optimizers)
        return not _steps_now() or any(was_skipped)


class OriginalCounting:
    """One counter of blocks, whatever is in them. `WindowCounting` is what it stands in for.

    Equivalent plain loop: `WindowCounting`'s, but that a short last window is divided by N, too.

    Source: https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py

    Args:
        plugin: settings of accumulation.
        scaler: the loss scaler in use, if any.
        num_processes: number of ranks.
    """

    scheduler_type = OriginalScheduler

    def __init__(self, plugin: GradientAccumulationPlugin, scaler: Any, num_processes: int) -> None:
        self.state = SharedState(plugin, is_own=True)
        self._scaler = scaler
        self._num_processes = num_processes
        self._num_blocks = 0
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []

    def add(self, *, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Something more is trained."""
        if model is not None and model not in self._models:
            self._models.append(model)
        if optimizer is not None and optimizer not in self._optimizers:
            self._optimizers.append(optimizer)

    def wrapped(self, optimizer: Optimizer, device_placement: bool) -> AcceleratedOptimizer:
        """An optimizer that steps whenever the counter says so."""
        return OriginalOptimizer(optimizer, device_placement, self._scaler)

    @property
    def num_pending(self) -> int:
        """Blocks since the end of a loader."""
        return self._num_blocks

    @contextmanager
    def block(self, models: tuple[Any, ...]) -> Generator[None]:
        """Context of one micro-batch: the N-th of all, or one of a loader's last batch, is followed by a step."""
        state = self.state
        ends = state.sync_with_dataloader and state.is_at_end
        self._num_blocks = 0 if ends else self._num_blocks + 1
        state.show(self._num_blocks % state.num_steps == 0)
        with ExitStack() as stack:
            if not (state.sync_gradients or state.sync_each_batch):
                for model in models:
                    stack.enter_context(self.no_sync(model))
            yield

    def backward(self, loss: Tensor, weight: Weight | None, kwargs: dict[str, Any]) -> None:
        """Add the gradient of the loss divided by N."""
        if weight is not None:
            raise LossError(
                "backward",
                given=f"weight={weight} with original=True",
                expected="a mean, which is divided by N",
                fix="leave out one of them",
            )
        loss = loss / self.state.num_steps
        (loss if self._scaler is None else self._scaler.scale(loss)).backward(**kwargs)

    @contextmanager
    def no_sync(self, model: Any) -> Generator[None]:
        """Context whose forwards and backwards of this model stay on this rank."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                model.set_requires_gradient_sync(True)
            return
        own = getattr(model, "no_sync", nullcontext) if self._num_processes > 1 else nullcontext
        with own():
            yield

    @contextmanager
    def kept_apart(self) -> Generator[None]:
        """Context in which all models stay on their rank."""
        with ExitStack() as stack:
            for model in self._models:
                stack.enter_context(self.no_sync(model))
            yield

    @contextmanager
    def joined(
        self, joinables: Any, loaders: Sequence[Any], accelerator: Any, *, even_batches: bool | None
    ) -> Generator[None]:
        """Context in which `DistributedDataParallel` shadows the ranks that have run out of data."""
        with evened(loaders, even_batches), Join(joinables, enable=self._num_processes > 1):
            yield

    def clip_norm(self, params: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Clip what is in `.grad`, whether it is complete or not; returns the norm before."""
        self.unscale(self._optimizers)
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)

    def clip_value(self, params: list[Tensor], clip_value: float) -> None:
        """Clip the elements of what is in `.grad`."""
        self.unscale(self._optimizers)
        torch.nn.utils.clip_grad_value_(params, clip_value)

    def unscale(self, optimizers: Sequence[Any]) -> None:
        """Divide fp16's loss scale out."""
        if self._scaler is not None:
            for optimizer in optimizers:
                self._scaler.unscale_(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The counter. As in the original, gradients are not in it."""
        return {"windows": [], "num_blocks": self._num_blocks}

    def fitted(self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int) -> Callable[[], None]:
        """A function to go on counting.

        Raises:
            StateError: the checkpoint has a window under way, of which nothing is known here.
        """
        if any(window["pending"] is not None for state in states for window in state["windows"]):
            raise StateError(
                "load_state",
                given="a checkpoint of the middle of a window, for original=True",
                expected="one that was saved after an update, or with original=True",
                fix="leave original=True out until that window has ended",
            )

        def load() -> None:
            self._num_blocks = states[rank % len(states)].get("num_blocks", 0) if states else self._num_blocks

        return load

    def clear(self) -> None:
        """Forget all that is trained, and begin to count again."""
        self._num_blocks = 0
        self._models.clear()
        self._optimizers.clear()
