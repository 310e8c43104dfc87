"""What was found out about the size of micro-batches, as a table and as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from macrobatch.errors import ArgumentError, MissingDependencyError
from macrobatch.plan.survey import Survey, memory_line

__all__ = ["TABLE", "check_picture", "draw_survey", "new_figure", "print_survey"]

TABLE: Mapping[str, Any] = MappingProxyType({"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)})
"""How a table looks that is to have room for its columns in 80 characters."""

_KINDS = (".png", ".svg", ".pdf")
_BLUE, _ORANGE, _INK, _FAINT = "#0072b2", "#d55e00", "#222222", "#dddddd"


def print_survey(survey: Survey, console: Console) -> None:
    """A table: for each size that was tried, its peak of memory and its speed, and what was chosen for which reason."""
    fixed, slope = memory_line(survey.trials)
    limit = "unknown" if survey.limit_bytes is None else _megabytes(survey.limit_bytes)
    table = Table(
        title=f"A macro-batch of {survey.total:,} {survey.unit}",
        caption=f"limit {limit} MB, with {_megabytes(survey.reserved_bytes)} MB kept for the optimizer's state\n"
        f"memory {_readable(fixed / 1e6)} MB + {_readable(slope / 1e3)} kB for each of the {survey.unit}",
        **TABLE,
    )
    for name in (
        f"micro-batch,\n{survey.unit}",
        "peak,\nMB",
        "micro-step,\nms",
        f"{survey.unit}/s",
        "window,\nms",
    ):
        table.add_column(name, justify="right", vertical="bottom")
    has_compiled = any(trial.compiled_s is not None for trial in survey.trials)
    if has_compiled:
        table.add_column("compiled,\nms", justify="right", vertical="bottom")
    table.add_column("")
    for trial in survey.trials:
        is_over = trial.peak_bytes is None or trial.peak_bytes > (survey.limit_bytes or trial.peak_bytes)
        remark = "over the limit" if is_over else "chosen" if trial.size == survey.size else ""
        times = ["", "", ""]
        if trial.seconds:
            num = -(-survey.total // trial.size)
            times = [
                _readable(trial.seconds * 1e3),
                _readable(trial.size / trial.seconds),
                _readable(num * trial.seconds * 1e3),
            ]
        if has_compiled:
            times.append(_readable(trial.compiled_s * 1e3) if trial.compiled_s is not None else "")
        peak = "-" if trial.peak_bytes is None else _megabytes(trial.peak_bytes)
        style = "bold green" if trial.size == survey.size else None
        table.add_row(f"{trial.size:,}", peak, *times, remark, style=style)
    console.print(table)
    console.print(f"chosen: {survey.reason}", highlight=False)
    console.print(f"micro_batch={survey.size}", style="bold", highlight=False)


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before hours are spent on what it shows.

    Raises:
        ArgumentError: a file of another kind, or in a folder that is not there.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix not in _KINDS:
        raise ArgumentError(
            "--plot", given=str(path), expected=f"a file that ends in {', '.join(_KINDS)}", fix="pass --plot plan.png"
        )
    if not path.parent.is_dir():
        raise ArgumentError(
            "--plot", given=str(path), expected="a file in a folder that is there", fix=f"make {path.parent} first"
        )
    _refuse_without_matplotlib()


def new_figure(height: float) -> Any:
    """A matplotlib figure of one width, and a height in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    _refuse_without_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(7.6, height), layout="constrained")


def draw_survey(survey: Survey, path: Path) -> None:
    """A picture of both curves over the size: peak of memory with its line and limit, and speed.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    measured = [(trial.size, trial.peak_bytes / 1e6) for trial in survey.trials if trial.peak_bytes is not None]
    fixed, slope = memory_line(survey.trials)
    first, last = min(measured)[0], max(measured)[0]
    along = [first * (last / first) ** (part / 200) for part in range(201)]  # straight, but on a logarithmic axis
    label = f"{fixed / 1e6:,.4g} MB + {slope / 1e3:,.4g} kB each"
    above.plot(along, [(fixed + slope * size) / 1e6 for size in along], color=_BLUE, linewidth=1.5, label=label)
    above.plot(*zip(*measured, strict=True), "o", color=_BLUE, label="measured")
    if survey.limit_bytes is not None and survey.limit_bytes < 4e6 * max(peak for _, peak in measured):
        above.axhline(survey.limit_bytes / 1e6, color=_ORANGE, linestyle="--", label="limit")
    above.set(ylabel="peak of memory, MB", ylim=(0, None))
    timed = [(trial.size, trial.size / trial.seconds) for trial in survey.trials if trial.seconds]
    below.plot(*zip(*timed, strict=True), "o-", color=_BLUE, label="measured")
    below.set(xlabel=f"{survey.unit} in a micro-batch", ylabel=f"{survey.unit} per second", ylim=(0, None))
    for axes in (above, below):
        axes.axvline(survey.size, color=_INK, linewidth=1, linestyle=":", label=f"chosen: {survey.size:,}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.spines[["right", "top"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(f"A macro-batch of {survey.total:,} {survey.unit}: {survey.reason}", fontsize=10, color=_INK)
    figure.savefig(path, dpi=150)


def _megabytes(number: int) -> str:
    return _readable(number / 1e6)


def _readable(number: float) -> str:
    """Three digits or more, without an exponent for large numbers."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _refuse_without_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "--plot",
            given="no matplotlib",
            expected="matplotlib, to draw",
            fix="run: pip install matplotlib, or leave --plot out",
        )
