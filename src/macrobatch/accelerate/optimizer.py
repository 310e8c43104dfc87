"""An optimizer that steps when its window is full, and is otherwise the one it wraps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from macrobatch.accelerate.windows import FedWindow, Windows
from macrobatch.errors import LossError

__all__ = ["AcceleratedOptimizer"]

_OWN = {"optimizer", "scaler", "device_placement", "_windows", "_is_overflow", "_is_accelerate_prepared"}


class AcceleratedOptimizer(Optimizer):
    """Passes `step` and `zero_grad` on at the right time. Every attribute, hook and method of the wrapped optimizer is
    there, and `isinstance` says what that is, too.

    Args:
        optimizer: to wrap.
        device_placement: move its state to where its parameters are.
        scaler: the loss scaler in use, if any; for scripts that look at it.
    """

    def __init__(
        self, optimizer: Optimizer, device_placement: bool = True, scaler: Any = None, *, windows: Windows | None = None
    ) -> None:
        # Optimizer.__init__ is left out: parameters and state are the wrapped optimizer's.
        self.optimizer = optimizer
        self.scaler = scaler
        self.device_placement = device_placement
        self._windows = windows
        self._is_overflow = False
        self._is_accelerate_prepared = windows is not None
        if device_placement:
            _place_state(optimizer)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.optimizer)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name in ("step", "zero_grad"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __repr__(self) -> str:
        return repr(self.optimizer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied, it is alone: its window stays with the accelerator."""
        kept = {name: self.__dict__[name] for name in _OWN - {"_windows"}}
        return _restored, ({**kept, "_windows": None},)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last full window made no update (fp16 overflow, nothing to average over)."""
        return self._is_overflow

    @property
    def _window(self) -> FedWindow | None:
        return None if self._windows is None else self._windows.of_optimizer(self.optimizer)

    @property
    def is_accumulating(self) -> bool:
        """Whether its window is under way, so that a step would do nothing."""
        window = self._window
        return window is not None and window.is_accumulating

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update, if the window is full.

        Args:
            closure: as for the wrapped optimizer; it calls `zero_grad` and `backward`, and returns the loss.

        Returns:
            What the wrapped optimizer returns; None if there was no update.
        """
        window = self._window
        if window is None:
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if window.is_accumulating:
            return None
        self._is_overflow = False
        if closure is not None:
            return self.optimizer.step(_finishing(closure, window))
        if not window.is_pending and not window.is_final:
            _check_alone(window)
            return self.optimizer.step()
        with window.lent_to([self.optimizer]) as has_update:
            if has_update:
                return self.optimizer.step()
        self._is_overflow = True
        return None

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the gradients away once they have been used, or give up what is pending after its loop was left.

        Within a window it does nothing, wherever in the block it stands: a window's gradients are cleared when the
        next one begins.
        """
        window = self._window
        if window is None:
            self._zero(set_to_none)
        elif window.is_inside:
            if window.is_final:
                window.gradients.clear()
        elif window.is_pending and (window.is_last or window.has_lost_its_loader):
            self._discard(window)
        elif not window.is_pending:
            self._zero(set_to_none)

    def _zero(self, set_to_none: bool | None) -> None:
        if set_to_none is None:  # optimizers of one's own may take no argument
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=set_to_none)

    def _discard(self, window: FedWindow) -> None:
        if len(window.optimizers) == 1 or window.has_lost_its_loader:
            window.discard()
        else:  # another optimizer of the window still wants its own
            own = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
            window.empty(own)

    def train(self) -> None:
        """For optimizers that have a training mode (schedule-free ones)."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]

    def eval(self) -> None:
        """For optimizers that have an evaluation mode (schedule-free ones)."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the wrapped optimizer; trained from the next window on."""
        self.optimizer.add_param_group(param_group)

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults


def _restored(state: dict[str, Any]) -> AcceleratedOptimizer:
    optimizer = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    optimizer.__dict__.update(state)
    return optimizer


def _finishing(closure: Callable[[], Any], window: FedWindow) -> Callable[[], Any]:
    def finishing() -> Any:
        with torch.enable_grad():
            loss = closure()
        window.finish()
        return loss

    return finishing


def _check_alone(window: FedWindow) -> None:
    """A step without a counted backward is a plain PyTorch step, which no other rank hears of."""
    if window.sync.has_peers and any(param.grad is not None for param in window.parameters()):
        raise LossError(
            "optimizer.step",
            given="gradients that did not go through accelerator.backward, on several ranks",
            expected="accelerator.backward(loss), which makes them agree",
            fix="replace loss.backward() by accelerator.backward(loss)",
        )


def _place_state(optimizer: Optimizer) -> None:
    """Move the state to its parameters' devices, which it may have been made before they were moved to."""
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.device != param.device:
                state[name] = value.to(param.device)
