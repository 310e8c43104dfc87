"""A learning rate scheduler that moves when its optimizers do."""

from __future__ import annotations

from typing import Any

from macrobatch.accelerate.optimizer import AcceleratedOptimizer

__all__ = ["AcceleratedScheduler"]

_OWN = {
    "scheduler",
    "optimizers",
    "split_batches",
    "step_with_optimizer",
    "_num_processes",
    "_adjusts",
    "_is_accelerate_prepared",
}


class AcceleratedScheduler:
    """Passes `step` on when the optimizers made an update; otherwise the scheduler that it wraps.

    As in the original, it moves `num_processes` times per update unless batches are split, since schedules are
    written for one process, which sees that many more batches.

    Args:
        scheduler: to wrap.
        optimizers: whose updates it follows.
        step_with_optimizer: if False, it moves at every call.
        split_batches: whether loaders split their batches over the processes.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Any,
        step_with_optimizer: bool = True,
        split_batches: bool = False,
        *,
        num_processes: int = 1,
        adjusts: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers: list[Any] = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
        self.split_batches = split_batches
        self.step_with_optimizer = step_with_optimizer
        self._num_processes = num_processes
        self._adjusts = adjusts
        self._is_accelerate_prepared = True

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.scheduler)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.scheduler, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.__dict__.copy(),)

    def __repr__(self) -> str:
        return repr(self.scheduler)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move on, if the optimizers have made an update."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
        elif not self._is_held_up():
            for _ in range(1 if self.split_batches else self._num_processes):
                # A schedule of fixed length, like OneCycleLR, refuses to go beyond its end.
                if getattr(self.scheduler, "_step_count", 0) <= getattr(self.scheduler, "total_steps", float("inf")):
                    self.scheduler.step(*args, **kwargs)

    def _is_held_up(self) -> bool:
        """Whether there is no update to follow: a window is under way, or all optimizers were skipped."""
        prepared = [optimizer for optimizer in self.optimizers if isinstance(optimizer, AcceleratedOptimizer)]
        if not self._adjusts:
            for optimizer in prepared:
                if optimizer.is_accumulating:
                    return True
        return bool(prepared) and all(optimizer.step_was_skipped for optimizer in prepared)

    def get_last_lr(self) -> list[float]:
        """Learning rates in use, one per parameter group."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped scheduler's."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the wrapped scheduler."""
        self.scheduler.load_state_dict(state_dict)


def _restored(state: dict[str, Any]) -> AcceleratedScheduler:
    scheduler = AcceleratedScheduler.__new__(AcceleratedScheduler)
    scheduler.__dict__.update(state)
    return scheduler
