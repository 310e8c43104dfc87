"""Pictures of results: horizontal bars with quartiles, one panel for each work, the aim as a line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Bar", "Panel", "draw"]

_OURS, _OTHERS, _AIM, _INK = "#0072b2", "#9a9a9a", "#d55e00", "#222222"


class Bar(NamedTuple):
    """A contender: lower quartile, median, upper quartile."""

    name: str
    value: tuple[float, ...]
    is_ours: bool


class Panel(NamedTuple):
    """A work. Less is better if it `is_ratio`."""

    title: str
    unit: str
    bars: list[Bar]
    aim: float | None = None
    is_ratio: bool = False


def draw(path: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Write the picture, if matplotlib is installed and there is something to show."""
    if not panels or not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    heights = [len(panel.bars) + 1.6 for panel in panels]
    figure = Figure(figsize=(9.5, 0.26 * sum(heights) + 0.8), layout="constrained")
    figure.suptitle(title, color=_INK, fontsize=11)
    every_axes: Any = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, panel in zip(every_axes, panels, strict=True):
        _draw_panel(axes, panel)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Any, panel: Panel) -> None:
    bars = sorted(panel.bars, key=lambda bar: bar.value[1], reverse=panel.is_ratio)
    medians = [bar.value[1] for bar in bars]
    reach = [[bar.value[1] - bar.value[0] for bar in bars], [bar.value[2] - bar.value[1] for bar in bars]]
    colors = [_OURS if bar.is_ours else _OTHERS for bar in bars]
    axes.barh(range(len(bars)), medians, xerr=reach, color=colors, error_kw={"ecolor": _INK, "elinewidth": 1})
    most = max([*(bar.value[2] for bar in bars), panel.aim or 0.0])
    label: dict[str, Any] = {"va": "center", "fontsize": 7, "color": _INK, "zorder": 5}
    label["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    for place, bar in enumerate(bars):
        axes.text(bar.value[2] + 0.01 * most, place, f"{bar.value[1]:.4g}", **label)
    if panel.aim is not None:
        axes.axvline(panel.aim, color=_AIM, linestyle="--", linewidth=1.2)
        sign = "≤" if panel.is_ratio else "≥"
        axes.text(panel.aim, 1.0, f" aim {sign} {panel.aim:.4g}", color=_AIM, fontsize=7, va="bottom", ha="center",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xlim(0, 1.12 * most)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{panel.title}: {panel.unit}", loc="left", fontsize=8, color=_INK, pad=12)
    axes.spines[["top", "right"]].set_visible(False)
