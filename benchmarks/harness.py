"""Paired timing: all contenders in one process, in turns, as ratios to the first of them."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine", "paired", "save", "table"]

Row = dict[str, Any]


def paired(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, calls: int, unit_per_call: int, warmup: int = 20
) -> list[Row]:
    """Time each contender `rounds` times in random order, `calls` calls at a time.

    A round's ratio compares times that were taken within the same moment, so that other work on the machine touches
    both sides alike; the medians and quartiles are over rounds.

    Returns:
        One row per contender: median and quartiles of microseconds per unit and of the ratio to the first contender.
    """
    names = list(contenders)
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    shuffle = random.Random(0)
    for _ in range(rounds):
        for name in shuffle.sample(names, len(names)):
            _wait()
            began_s = time.perf_counter()
            for _ in range(calls):
                contenders[name]()
            _wait()
            times_s[name].append((time.perf_counter() - began_s) / (calls * unit_per_call))
    first = times_s[names[0]]
    rows: list[Row] = []
    for name in names:
        ratios = [mine / base for mine, base in zip(times_s[name], first, strict=True)]
        rows.append({"name": name, "us": _quartiles([t * 1e6 for t in times_s[name]]), "ratio": _quartiles(ratios)})
    return rows


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows as text: median [quartiles]."""
    width = max(len(row["name"]) for row in rows)
    lines = [title, f"{'':{width}}  {'us per micro-step':>24}  {'ratio to ' + rows[0]['name']:>24}"]
    for row in rows:
        us, ratio = row["us"], row["ratio"]
        lines.append(
            f"{row['name']:{width}}  {us[1]:8.1f} [{us[0]:6.1f}, {us[2]:6.1f}]  "
            f"{ratio[1]:8.3f} [{ratio[0]:5.3f}, {ratio[2]:5.3f}]"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Hardware and versions, to be stored with every result."""
    packages = {name: _version(name) for name in ("torch", "macrobatch", "accelerate", "lightning", "transformers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "packages": packages,
    }


def save(name: str, results: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write results with the machine they come from to `benchmarks/results/NAME.json`, or to another folder."""
    folder = folder or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return round(low, 4), round(middle, 4), round(high, 4)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
