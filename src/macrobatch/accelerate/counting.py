"""What an accelerator does with a script's blocks, losses and clipping: it counts them into exact windows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from macrobatch.accelerate.gradient_state import GradientState
from macrobatch.accelerate.joining import joined
from macrobatch.accelerate.optimizer import AcceleratedOptimizer
from macrobatch.accelerate.scheduler import AcceleratedScheduler
from macrobatch.accelerate.utils.dataclasses import GradientAccumulationPlugin
from macrobatch.accelerate.windows import FedWindow, Windows, restricted
from macrobatch.core.handover import share_of
from macrobatch.core.loss import Weight
from macrobatch.core.precision import Precision
from macrobatch.errors import LossError, StateError
from macrobatch.sync import LocalSync

__all__ = ["WindowCounting"]


class WindowCounting:
    """Every block is a micro-batch of the window of its models. `OriginalCounting` stands beside it.

    Args:
        plugin: settings of accumulation.
        precision: called for the loss scale of a new window, with whether it is the first.
        scaler: the loss scaler in use, if any.
        num_processes: number of ranks.
        replays: whether micro-batches are replayed from CUDA graphs, which add into fixed addresses.
    """

    scheduler_type = AcceleratedScheduler

    def __init__(
        self,
        plugin: GradientAccumulationPlugin,
        precision: Callable[[bool], Precision],
        scaler: Any,
        num_processes: int,
        *,
        replays: bool,
    ) -> None:
        self.state = GradientState(plugin, is_own=True)
        self.windows = Windows(self.state, precision, num_processes, overlaps=not replays)
        self._scaler = scaler
        self._replays = replays
        self._inside: list[FedWindow] = []

    def add(self, *, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Something more is trained."""
        self.windows.add(model=model, optimizer=optimizer)

    def wrapped(self, optimizer: Optimizer, device_placement: bool) -> AcceleratedOptimizer:
        """An optimizer that steps when its window is full."""
        return AcceleratedOptimizer(optimizer, device_placement, self._scaler, windows=self.windows)

    @property
    def num_pending(self) -> int:
        """Micro-batches in the window that was used last."""
        windows = self.windows.all
        return windows[-1].window.num_pending if windows else 0

    @contextmanager
    def block(self, models: tuple[Any, ...]) -> Generator[None]:
        """Context of one micro-batch of these models' window."""
        window = self.windows.of(models)
        if self._replays:  # what earlier micro-batches returned has been copied out
            torch.compiler.cudagraph_mark_step_begin()
        self._inside.append(window)
        try:
            with window:
                yield
        finally:
            self._inside.pop()

    def backward(self, loss: Tensor, weight: Weight | None, kwargs: dict[str, Any]) -> None:
        """As `Accelerator.backward`."""
        if not isinstance(loss, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise LossError("backward", given=repr(loss), expected="a tensor", fix="pass the loss itself, not .item()")
        state, windows = self.state, self.windows
        inside = self._inside[-1] if self._inside else None
        if not windows.trains(loss, inside):
            num_items = 1 if weight is None else weight + (weight == 0)
            (loss / (num_items * state.num_steps)).backward(**kwargs)
            return
        window = inside or windows.of(())
        begins = not self._inside and not window.is_pending
        if begins:
            window.begin_outside(is_weighted=weight is not None)
            state._sync_gradients = not state.is_held  # pyright: ignore[reportPrivateUsage]
        if loss.ndim and loss.numel() == 1:
            loss = loss.reshape(())
        options = kwargs
        if self._scaler is not None or len(windows.made) > 1 or kwargs:
            options = {**restricted(window, windows), **kwargs}
        try:
            window.backward(loss, weight=weight, num_samples=window.num_rows, **options)
        except BaseException:
            if begins:  # no block will end this window
                window.fail()
            raise
        if not self._inside and not window.optimizers and not window.is_held:
            window.finish()  # a script that steps an optimizer of its own has to find the gradient there

    @contextmanager
    def no_sync(self, model: Any) -> Generator[None]:
        """Context whose backwards stay on this rank, to be reduced with a later one."""
        windows = self.windows.all or [self.windows.of(())]
        for window in windows:
            window.num_holds += 1
        own = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
        try:
            with own():
                yield
        finally:
            for window in windows:
                window.num_holds -= 1

    @contextmanager
    def kept_apart(self) -> Generator[None]:
        """Context whose windows stay on their rank."""
        window = self.windows.of(())
        window.settle()
        sync, window.sync = window.sync, LocalSync()
        try:
            yield
        finally:
            window.settle()
            window.sync = sync

    def joined(
        self, joinables: Any, loaders: Sequence[Any], accelerator: Any, *, even_batches: bool | None
    ) -> AbstractContextManager[None]:
        """Context in which ranks may run out of data at different times."""
        return joined(self.windows, loaders, accelerator, even_batches=even_batches)

    def clip_norm(self, params: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Clip the norm of a window's gradient, if it is complete; returns the norm before."""
        params = self._meant(params)
        windows = self._concerned(params)
        if windows is None:
            return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], norm_type)
        for window in windows:
            window.finish()
            if len(windows) == 1 and {id(p) for p in params} >= {id(slot.param) for slot in window.gradients.slots}:
                return window.clip_norm(max_norm, norm_type)
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)

    def clip_value(self, params: list[Tensor], clip_value: float) -> None:
        """Clip the elements of a window's gradient, if it is complete."""
        params = self._meant(params)
        windows = self._concerned(params)
        if windows is not None:
            for window in windows:
                window.finish()
            torch.nn.utils.clip_grad_value_(params, clip_value)

    def unscale(self, optimizers: Sequence[Any]) -> None:
        """Make the gradients of these optimizers final, without fp16's loss scale."""
        for optimizer in optimizers:
            window = self.windows.of_optimizer(optimizer)
            if not window.is_pending or window.is_last:
                window.finish()

    def _meant(self, params: list[Tensor]) -> list[Tensor]:
        """The parameters that optimizers have, in place of what models show in the middle of a window."""
        stand_ins = {key: param for window in self.windows.all for key, param in window.sync.stand_ins().items()}
        return [stand_ins.get(id(param), param) for param in params]

    def _concerned(self, params: Sequence[Tensor]) -> list[FedWindow] | None:
        """Windows that these parameters belong to; None if one of them is not complete yet."""
        ids = {id(param) for param in params}
        found = [w for w in self.windows.all if any(id(slot.param) in ids for slot in w.gradients.slots)]
        return None if any(window.is_pending and not window.is_last for window in found) else found

    def state_dict(self) -> dict[str, Any]:
        """The windows under way, as tensors and plain values of this rank, and the numbers of their models."""
        windows, known = self.windows.all, self.windows.models
        numbers = [[n for n, model in enumerate(known) if any(model is own for own in w.models)] for w in windows]
        return {"windows": [window.state_dict() for window in windows], "models": numbers}

    def fitted(self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int) -> Callable[[], None]:
        """A function to go on where windows of any number of ranks were; it gives up what is under way elsewhere.

        Args:
            states: the `state_dict` of each of those ranks.
            rank: this one's index.

        Raises:
            StateError: they are not of what is trained here.
        """
        saved = [state["windows"] for state in states]
        pairs = [
            (window, share_of([each[index] for each in saved], rank=rank, world_size=world_size))
            for index, window in enumerate(self._windows_like(states))
        ]
        for window, state in pairs:
            window.check_state_dict(state)

        def load() -> None:
            for window in self.windows.all:
                if all(window is not own for own, _ in pairs):
                    window.discard()
            for window, state in pairs:
                window.load_state_dict(state)

        return load

    def _windows_like(self, states: Sequence[dict[str, Any]]) -> list[FedWindow]:
        """The windows of the models that those of a saved state had."""
        windows = self.windows
        if not states or (not windows.models and not windows.optimizers):
            return []
        named = states[0].get("models") or [[]] * len(states[0]["windows"])
        if any(number >= len(windows.models) for numbers in named for number in numbers):
            raise StateError(
                "load_state",
                given=f"windows under way of the models {named}, by number",
                expected=f"models of the {len(windows.models)} that are prepared",
                fix="prepare the same models in the same order as when it was saved",
            )
        return [windows.of(tuple(windows.models[number] for number in numbers)) for numbers in named]

    def clear(self) -> None:
        """Forget all that is trained, and what is pending."""
        self.windows.clear()
