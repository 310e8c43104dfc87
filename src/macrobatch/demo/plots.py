"""Four pictures of a demo, each for a light and a dark page.

Colours are from Okabe and Ito's palette, which stays apart for colour-blind readers; lines differ in style and markers
in shape as well. https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from macrobatch.demo.record import TrainingRecord
from macrobatch.demo.report import DemoReport

__all__ = ["PLOTS", "THEMES", "Theme", "draw"]

_SIZE_INCHES = (6.4, 3.7)
_DOTS_PER_INCH = 140
_GOAL_PERCENT = 97


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of a picture: paper, ink, faint lines, and one per training."""

    paper: str
    ink: str
    faint: str
    colors: dict[str, str]


THEMES = {
    "light": Theme(
        paper="#ffffff",
        ink="#222222",
        faint="#dddddd",
        colors={"macrobatch": "#0072b2", "full batch": "#777777", "textbook": "#d55e00"},
    ),
    "dark": Theme(
        paper="#16181d",
        ink="#e6e6e6",
        faint="#3a3d45",
        colors={"macrobatch": "#56b4e9", "full batch": "#b0b0b0", "textbook": "#e69f00"},
    ),
}

# The full batch is drawn first and broad: where macrobatch lies on it, both can be seen.
_LINES: dict[str, dict[str, Any]] = {
    "full batch": {"linewidth": 5.0, "alpha": 0.45, "zorder": 2},
    "textbook": {"linewidth": 1.6, "linestyle": (0, (4, 1.5)), "zorder": 3},
    "macrobatch": {"linewidth": 1.6, "zorder": 4},
}
_MARKERS = {"full batch": "s", "textbook": "^", "macrobatch": "o"}


def draw(report: DemoReport, plot: Callable[[Any, DemoReport, Theme], None], theme: Theme) -> bytes:
    """A picture as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(ink, theme.ink) | {
        "axes.edgecolor": theme.faint,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 12,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "legend.frameon": False,
        "font.size": 9.5,
    }
    with rc_context(settings):
        figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
        plot(figure.add_subplot(), report, theme)
        if report.stopped_early:
            figure.text(0.995, 0.99, "stopped early", ha="right", va="top", style="italic", color=theme.ink)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def plot_loss(axes: Any, report: DemoReport, theme: Theme) -> None:
    """Loss of each window as each loop reports it."""
    for training in _drawn(report):
        updates = range(1, len(training.losses) + 1)
        axes.plot(
            updates, training.losses, label=training.name, color=theme.colors[training.name], **_LINES[training.name]
        )
    axes.set(
        title="Training loss, as each loop reports it", xlabel="update", ylabel="cross-entropy (nats)", ylim=(0, None)
    )
    _finish(axes, _num_updates(report))


def plot_accuracy(axes: Any, report: DemoReport, theme: Theme) -> None:
    """Test accuracy after each epoch."""
    for training in _drawn(report):
        percent = [100 * accuracy for accuracy in training.test_accuracies]
        style = _LINES[training.name] | {"marker": _MARKERS[training.name], "markersize": 4}
        axes.plot(range(1, len(percent) + 1), percent, label=training.name, color=theme.colors[training.name], **style)
    axes.axhline(_GOAL_PERCENT, color=theme.ink, linewidth=0.8, linestyle=":", zorder=1)
    axes.annotate(
        f"{_GOAL_PERCENT} %",
        (0, _GOAL_PERCENT),
        (2, -3),
        ("axes fraction", "data"),
        "offset points",
        va="top",
        fontsize=8,
    )
    axes.set(title="Accuracy on images it never saw", xlabel="epoch", ylabel="test accuracy (%)")
    _finish(axes, report.options.epochs)


def plot_gradient_error(axes: Any, report: DemoReport, theme: Theme) -> None:
    """Relative error of the gradient of each window that was checked against fp64."""
    for training in _drawn(report):
        for short in (False, True):
            errors = [e for e in training.gradient_errors if (e.num_samples < training.macro_batch) == short]
            axes.scatter(
                [e.update for e in errors],
                [e.relative_error for e in errors],
                s=30 if short else 13,
                marker=_MARKERS[training.name],
                facecolors=theme.colors[training.name] if short else "none",
                edgecolors=theme.colors[training.name],
                linewidths=0.9,
                label=training.name if short and training.gradient_errors else None,
                zorder=_LINES[training.name]["zorder"] + 3 * short,
            )
    axes.set(
        title="Gradient error against fp64, window by window",
        xlabel="update",
        ylabel="relative error of the gradient",
        yscale="log",
        ylim=(1e-8, 10),
    )
    legend = {"ncols": 3, "loc": "center", "bbox_to_anchor": (0.5, 0.5), "frameon": True, "framealpha": 1}
    legend |= {"edgecolor": theme.faint, "facecolor": theme.paper, "title_fontsize": 8.5}
    _finish(
        axes, _num_updates(report), legend | {"title": "filled: short last window of an epoch · hollow: full windows"}
    )


def plot_memory(axes: Any, report: DemoReport, theme: Theme) -> None:
    """Most bytes saved for the backward at one time."""
    trainings = [training for training in report.trainings.values() if training.saved_bytes is not None]
    names = [training.name for training in trainings]
    megabytes = [(training.saved_bytes or 0) / 1e6 for training in trainings]
    bars = axes.barh(names, megabytes, color=[theme.colors[name] for name in names], height=0.55)
    axes.bar_label(bars, [f"{value:.1f} MB" for value in megabytes], padding=5, color=theme.ink)
    axes.set(title="Activations kept for the backward, peak", xlim=(0, 1.15 * max(megabytes, default=1)))
    axes.set_ylim(2.6, -0.6)  # room for three, the first on top
    axes.spines.bottom.set_visible(False)
    axes.tick_params(length=0, labelbottom=False)


PLOTS: dict[str, Callable[[Any, DemoReport, Theme], None]] = {
    "gradient_error.png": plot_gradient_error,
    "memory.png": plot_memory,
    "loss.png": plot_loss,
    "accuracy.png": plot_accuracy,
}


def _drawn(report: DemoReport) -> list[TrainingRecord]:
    return [training for training in report.trainings.values() if training.losses]


def _num_updates(report: DemoReport) -> int:
    return max((training.num_updates for training in report.trainings.values()), default=1)


def _finish(axes: Any, planned: int, legend: dict[str, Any] | None = None) -> None:
    # As far as was planned: what a demo that was stopped early lacks is then seen.
    axes.set_xlim(0, planned + max(1, 0.02 * planned))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**(legend or {}))
