"""What the demo found out: as JSON, as a table and in words."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from macrobatch.demo.data import Digits
from macrobatch.demo.options import DemoOptions
from macrobatch.demo.record import TrainingRecord

__all__ = ["HEADINGS", "DemoReport", "make_table", "rows", "verdict"]

HEADINGS = (
    "",
    "test\naccuracy",
    "seconds",
    "gradient error,\nfull windows",
    "gradient error,\nshort windows",
    "activations",
)

# Far above what fp32 leaves in a gradient, far below the error of a wrong one.
_ROUNDING = 1e-4


@dataclass(kw_only=True, slots=True)
class DemoReport:
    """The outcome of a demo.

    Attributes:
        options: what was asked for.
        digits: what was trained on; None if it stopped before.
        trainings: by name, in the order they ran, the last one possibly cut short.
        is_complete: every training and every check came to its end.
        num_presses: how often Ctrl-C was pressed.
        files: what was written.
    """

    options: DemoOptions
    digits: Digits | None = None
    trainings: dict[str, TrainingRecord] = field(default_factory=dict[str, TrainingRecord])
    is_complete: bool = False
    num_presses: int = 0
    files: list[Path] = field(default_factory=list[Path])

    @property
    def stopped_early(self) -> bool:
        """Whether something is missing from the result."""
        return not self.is_complete

    @property
    def exit_code(self) -> int:
        """0, or 130 (128 + SIGINT) if Ctrl-C was pressed."""
        return 130 if self.num_presses or self.stopped_early else 0

    def to_json(self) -> dict[str, Any]:
        """Everything as plain numbers and strings. Gradient errors are relative, seconds and bytes say so."""
        options = asdict(self.options)
        del options["out"]
        return {
            "format": 1,
            "stopped_early": self.stopped_early,
            "options": options,
            "num_train": None if self.digits is None else self.digits.num_train,
            "num_test": None if self.digits is None else self.digits.num_test,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "trainings": [
                asdict(training)
                | {
                    "is_complete": training.is_complete,
                    "worst_error_full_windows": training.worst_error(short=False),
                    "worst_error_short_windows": training.worst_error(short=True),
                }
                for training in self.trainings.values()
            ],
        }


def rows(report: DemoReport) -> list[tuple[str, ...]]:
    """One row of words per training, in the columns of `HEADINGS`."""
    return [
        (
            training.name if training.is_complete else f"{training.name} (part)",
            f"{100 * training.test_accuracies[-1]:.1f} %" if training.test_accuracies else "–",
            f"{training.train_s:.1f}",
            _error(training.worst_error(short=False)),
            _error(training.worst_error(short=True)),
            "–" if training.saved_bytes is None else f"{training.saved_bytes / 1e6:.1f} MB",
        )
        for training in report.trainings.values()
    ]


def make_table(report: DemoReport) -> Table:
    """The rows as a table for the terminal."""
    title = "Handwritten digits, three ways" + (" (stopped early)" if report.stopped_early else "")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", vertical="bottom")
    for row in rows(report):
        # Errors that deserve a percentage are the wrong ones.
        table.add_row(*(Text(cell, style="bold red" if "%)" in cell else "") for cell in row))
    return table


def verdict(report: DemoReport) -> str:
    """What the numbers say, in a few sentences; empty if too little was measured to say anything."""
    ours, full, textbook = (report.trainings.get(name) for name in ("macrobatch", "full batch", "textbook"))
    parts: list[str] = []
    if ours and full and ours.saved_bytes and full.saved_bytes:
        parts.append(
            f"macrobatch keeps {ours.saved_bytes / 1e6:.1f} MB of activations where the full batch keeps "
            f"{full.saved_bytes / 1e6:.1f} MB."
        )
    ours_error, full_error = (training and _worst(training) for training in (ours, full))
    if ours_error and full_error and ours_error < _ROUNDING and full_error < _ROUNDING:
        parts.append("Its gradient is as close to fp64 as the full batch's: what is left is the rounding of fp32.")
    short = textbook and textbook.worst_error(short=True)
    equal = textbook and textbook.worst_error(short=False)
    if short and equal and equal < _ROUNDING < short:
        parts.append(
            f"The textbook loop is right on full windows, and up to {100 * short:.0f} % wrong on the short last window "
            "of each epoch."
        )
    return " ".join(parts)


def _worst(training: TrainingRecord) -> float:
    return max((error.relative_error for error in training.gradient_errors), default=0.0)


def _error(relative_error: float | None) -> str:
    if relative_error is None:
        return "–"
    return f"{relative_error:.1e}" + (f" ({100 * relative_error:.0f} %)" if relative_error >= 0.01 else "")
