"""What is known about the three trainings: gathered while they run, read by the table, the plots and the page.

Shape letters: P all parameters of a model in one vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch.demo.data import Digits
from macrobatch.demo.measure import SavedBytes, evaluate, flat_gradient, flat_weights
from macrobatch.demo.options import DemoOptions

__all__ = ["GradientError", "Recorder", "TrainingRecord", "WindowSeen"]

_MOST_EPOCHS_CHECKED = 10  # a backward in fp64 takes several times as long as the update


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientError:
    """Relative error of the gradient of one window: update number from 1, samples in the window, error."""

    update: int
    num_samples: int
    relative_error: float


@dataclass(kw_only=True, slots=True)
class TrainingRecord:
    """One training, as far as it came.

    Attributes:
        name: "macrobatch", "full batch" or "textbook".
        num_updates: updates planned; `losses` has one entry for each that was made.
        macro_batch: samples of a full window.
        losses: loss of each window as the loop itself reports it.
        test_accuracies, test_losses: after each epoch, accuracy in [0, 1].
        train_s: seconds in windows alone, without loading, testing and measuring.
        saved_bytes: peak of the bytes saved for the backward in the first window, a full one.
        gradient_errors: of the windows that were checked against fp64.
    """

    name: str
    num_updates: int
    macro_batch: int
    losses: list[float] = field(default_factory=list[float])
    test_accuracies: list[float] = field(default_factory=list[float])
    test_losses: list[float] = field(default_factory=list[float])
    train_s: float = 0.0
    saved_bytes: int | None = None
    gradient_errors: list[GradientError] = field(default_factory=list[GradientError])

    @property
    def is_complete(self) -> bool:
        """Whether every planned update was made."""
        return len(self.losses) == self.num_updates

    def worst_error(self, *, short: bool) -> float | None:
        """Largest gradient error over the short windows or over the full ones; None if none was checked."""
        errors = self.gradient_errors
        return max((e.relative_error for e in errors if (e.num_samples < self.macro_batch) == short), default=None)


@dataclass(kw_only=True, slots=True)
class WindowSeen:
    """One window kept for the check against fp64: weights before the update, gradient that the optimizer saw."""

    update: int
    batch: tuple[Tensor, Tensor]
    weights_P: Tensor
    gradient_P: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: float = float("nan")


class Recorder:
    """Looks on while one of the trainings runs; the training does not depend on it.

    Args:
        record: is filled.
        digits: for the test after each epoch.
        options: how many epochs there are.
        pause: called after each window; may raise KeyboardInterrupt to stop there.
    """

    def __init__(
        self,
        record: TrainingRecord,
        digits: Digits,
        *,
        options: DemoOptions,
        pause: Callable[[], None],
    ) -> None:
        self.record = record
        self.windows_seen: list[WindowSeen] = []
        self._digits = digits
        self._windows_per_epoch = record.num_updates // options.epochs
        self._epoch_stride = -(-options.epochs // _MOST_EPOCHS_CHECKED)
        self._pause = pause

    @contextmanager
    def window(self, model: nn.Module, batch: Any) -> Generator[WindowSeen]:
        """Around everything that makes one update; the loop leaves the loss in `.loss` and the gradient in `.grad`."""
        update = len(self.record.losses) + 1
        epoch, position = divmod(update - 1, self._windows_per_epoch)
        is_checked = epoch % self._epoch_stride == 0
        saved = SavedBytes([*model.parameters(), *batch]) if update == 1 else None
        seen = WindowSeen(update=update, batch=batch, weights_P=flat_weights(model))
        start_s = time.perf_counter()
        with saved or nullcontext():
            yield seen
        self.record.train_s += time.perf_counter() - start_s
        self.record.losses.append(seen.loss)
        if saved is not None:
            self.record.saved_bytes = saved.peak
        if is_checked:
            seen.gradient_P = flat_gradient(model)
            self.windows_seen.append(seen)
        if position == self._windows_per_epoch - 1:
            accuracy, loss = evaluate(model, self._digits.test_images_NCHW, self._digits.test_labels_N)
            self.record.test_accuracies.append(accuracy)
            self.record.test_losses.append(loss)
        self._pause()
