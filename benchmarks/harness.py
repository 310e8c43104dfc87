"""What benchmarks share: paired timing (all contenders in one process, in turns), tables, results on disk."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "Panels",
    "Quartiles",
    "Row",
    "attempted",
    "calls_per_round",
    "error_text",
    "grid",
    "in_turns",
    "is_ours",
    "machine",
    "paired",
    "quartiles",
    "recorded",
    "save",
    "seconds_each",
    "table",
]

T = TypeVar("T")
Row = dict[str, Any]
Quartiles = tuple[float, float, float]
Panels = Mapping[str, Mapping[str, Quartiles]]
"""What a picture shows: for each axis label, the bars by name."""


def paired(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, calls: int, unit_per_call: int, warmup: int = 20
) -> list[Row]:
    """Time each contender `rounds` times in random order, `calls` calls at a time.

    A round's ratio compares times that were taken within the same moment, so that other work on the machine touches
    both sides alike; the medians and quartiles are over rounds.

    Returns:
        One row per contender: median and quartiles of microseconds per unit and of the ratio to the first contender;
        the same of processor time, of all threads: other work on the machine touches it less, but waiting is not in it.
    """
    names = list(contenders)
    times_s: dict[str, list[float]] = {name: [] for name in names}
    cpu_s: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    shuffle = random.Random(0)
    for _ in range(rounds):
        for name in shuffle.sample(names, len(names)):
            _wait()
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            for _ in range(calls):
                contenders[name]()
            _wait()
            times_s[name].append((time.perf_counter() - began_s) / (calls * unit_per_call))
            cpu_s[name].append((time.process_time() - began_cpu_s) / (calls * unit_per_call))
    rows: list[Row] = []
    for name in names:
        row: Row = {"name": name}
        for prefix, taken_s in (("", times_s), ("cpu_", cpu_s)):
            ratios = [mine / base for mine, base in zip(taken_s[name], taken_s[names[0]], strict=True)]
            row[f"{prefix}us"] = quartiles([t * 1e6 for t in taken_s[name]])
            row[f"{prefix}ratio"] = quartiles(ratios)
        rows.append(row)
    return rows


def in_turns(contenders: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5) -> list[Row]:
    """Time single calls, in turns of random order, for some time; warm-up is the caller's.

    Returns:
        One row per contender: quartiles of the seconds of a call, "s", and of the ratio to the first one's, "ratio".
    """
    names = list(contenders)
    times_s: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0)
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds or len(times_s[names[-1]]) < least:
        for name in shuffle.sample(names, len(names)):
            _wait()
            start_s = time.perf_counter()
            contenders[name]()
            _wait()
            times_s[name].append(time.perf_counter() - start_s)
    base_s = times_s[names[0]]
    return [
        {
            "name": name,
            "num_timed": len(times_s[name]),
            "s": quartiles(times_s[name], digits=7),
            "ratio": quartiles([mine / base for mine, base in zip(times_s[name], base_s, strict=True)]),
        }
        for name in names
    ]


def calls_per_round(each_s: float) -> int:
    """How many calls in a row, of which each takes so long, to time as one: about half a second of them.

    Only then does the host wait for the device, as in a training: what it does for the next window while the device is
    at this one costs nothing.
    """
    return max(1, round(0.5 / each_s))


def seconds_each(call: Callable[[], object], num_calls: int) -> float:
    """Seconds per call, of several in a row."""
    _wait()
    began_s = time.perf_counter()
    for _ in range(num_calls):
        call()
    _wait()
    return (time.perf_counter() - began_s) / num_calls


def attempted(make: Callable[[], T]) -> T | str:
    """What is made, or why it cannot be: a contender that fails is a result, too."""
    try:
        return make()
    except Exception as error:
        return error_text(error)


def error_text(error: BaseException) -> str:
    """An error in a few words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def quartiles(values: Sequence[float], *, digits: int = 4) -> Quartiles:
    """Lower quartile, median and upper quartile of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")  # the other one extrapolates
    return round(low, digits), round(middle, digits), round(high, digits)


def recorded(micro_step: Callable[[], object], *, capture_error_mode: str = "global") -> torch.cuda.CUDAGraph:
    """A micro-step as a CUDA graph, after three on a stream aside: what a hand-made loop does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            micro_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=capture_error_mode):
        micro_step()
    return graph


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows as text: median [quartiles], and the error of the gradient."""
    width = max(len(row["name"]) for row in rows)
    lines = [title, f"{'':{width}}  {'us per micro-step':>24}  {'ratio to ' + rows[0]['name']:>24}  {'error':>7}"]
    for row in rows:
        us, ratio = row["us"], row["ratio"]
        lines.append(
            f"{row['name']:{width}}  {us[1]:8.1f} [{us[0]:6.1f}, {us[2]:6.1f}]  "
            f"{ratio[1]:8.3f} [{ratio[0]:5.3f}, {ratio[2]:5.3f}]  {row['error']:7.1e}"
        )
    return "\n".join(lines)


def grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as a table: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([f"{cells[0]:{widths[0]}}", *rest])

    return "\n".join([title, line(header), *map(line, rows)])


def machine() -> dict[str, Any]:
    """Hardware and versions, to be stored with every result."""
    packages = {name: _version(name) for name in ("torch", "macrobatch", "accelerate", "lightning", "transformers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "num_processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "num_gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "packages": packages,
    }


def save(
    name: str, results: Mapping[str, Any], folder: Path | None = None, *, title: str = "", panels: Panels | None = None
) -> Path:
    """Write results with the machine they come from to `benchmarks/results/NAME.json`, or to another folder.

    Args:
        panels: draw them, side by side, in `NAME.png` beside it, if matplotlib is installed.
    """
    folder = folder or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    if panels and find_spec("matplotlib"):
        _draw(path.with_suffix(".png"), title, panels)
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _draw(path: Path, title: str, panels: Panels) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    figure = Figure(figsize=(4 + 4 * len(panels), 1.2 + 0.3 * len(names)), layout="constrained")
    figure.suptitle(title)
    every_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, bars) in zip(every_axes, panels.items(), strict=True):
        places = [names.index(name) for name in bars]
        medians = [middle for _, middle, _ in bars.values()]
        reach = [
            [middle - low for low, middle, _ in bars.values()],
            [high - middle for _, middle, high in bars.values()],
        ]
        colors = ["tab:blue" if is_ours(name) else "tab:gray" for name in bars]
        drawn = axes.barh(places, medians, xerr=reach, color=colors, ecolor="black")
        axes.bar_label(drawn, fmt="%.4g", padding=4)
        axes.margins(x=0.15)
        axes.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        axes.spines[["top", "right"]].set_visible(False)
    every_axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def is_ours(name: str) -> bool:
    """Whether a contender is macrobatch's."""
    return "macrobatch" in name or "TrainStep" in name


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
