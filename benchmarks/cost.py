"""What the cost model says to what was measured on one and two GPUs: a table and a picture. Measures nothing itself.

    python benchmarks/cost.py [--results benchmarks/results] [--out docs/assets]

Replicas: the micro-step is fitted to one GPU's windows, those of two GPUs are predicted. Shards: the micro-step and the
cost of starting a collective are fitted to macrobatch's four policies, the rows by hand are predicted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from harness import grid

from macrobatch.plan.command import POLICIES
from macrobatch.plan.cost import LINKS, StepTime, Training

GPT_124M, GPT_1B = 163_109_376, 1_215_311_872
TOKENS = 65_536  # of a window of GPT-2


class Point(NamedTuple):
    """Seconds of a window."""

    name: str
    measured_s: float
    model_s: float
    is_fitted: bool


def rows(results: Path, name: str) -> dict[Any, Any]:
    """A file's results by contender and micro-batch."""
    found = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    every = found["rows"] if "rows" in found else found["results"]["gpt124"]
    return {
        (row["name"], row["micro_batch"]): row
        for row in every
        if ("problem" not in row and "window_s" in row) or "rate" in row
    }


def replicas(results: Path) -> list[Point]:
    """GPT-2, its micro-steps compiled and captured: from one GPU to two."""
    alone = {
        size: TOKENS / row["rate"][1]
        for (name, size), row in rows(results, "doors-cuda").items()
        if name.startswith("TrainStep, compile, fused")
    }
    step = StepTime.fit([*alone], [window_s * size / 64 for size, window_s in alone.items()])
    job = Training(
        step=step,
        global_batch=64,
        max_micro_batch=64,
        gradient_bytes=4 * GPT_124M,
        overlap=0.0,  # the reduction follows the last replay
        num_pieces=1,
    )
    points = [
        Point(f"1 GPU, micro-batch {size}", window_s, job.window(LINKS["nvlink"], 1, size).window_s, True)
        for size, window_s in alone.items()
    ]
    two = {
        size: row
        for (name, size), row in rows(results, "ranks-gpt124-cuda").items()
        if name == "macrobatch, captured, fused"
    }
    for size, row in sorted(two.items()):
        model_s = job.window(LINKS["nvlink"], 2, size).window_s
        points.append(Point(f"2 GPUs, micro-batch {size}", row["window_s"][1], model_s, False))
    return points


def shards(results: Path) -> list[Point]:
    """The GPT of 1.2 B under FSDP2 on two GPUs: 32 sequences in micro-batches of 2, 22 units."""
    seconds = {name: row["window_s"][1] for (name, _), row in rows(results, "ranks-fsdp1b-cuda").items()}
    policies = {name: name.replace("-", ", reduce ") for name in POLICIES if name != "replicas"}
    ours = {name: seconds[f"macrobatch, {text}"] for name, text in policies.items()}
    by_hand = {name: seconds[f"FSDP2 by hand, {policies[name]}"] for name in ("keep-last", "reshard-last")}
    by_hand["reshard-each"] = seconds["torchtitan's default"]

    def model_s(step_s: float, launch_s: float, policy: str) -> float:
        job = Training(
            step=StepTime(0.0, step_s / 2),
            global_batch=32,
            max_micro_batch=2,
            gradient_bytes=4 * GPT_1B,
            parameter_bytes=2 * GPT_1B,
            policy=POLICIES[policy],
            num_pieces=22,
            launch_s=launch_s,
        )
        return job.window(LINKS["nvlink"], 2, 2).window_s

    def misses(point: tuple[float, float]) -> float:
        return sum((model_s(*point, name) / value - 1) ** 2 for name, value in ours.items())

    fitted = min(((step * 1e-3, launch * 2e-5) for step in range(20, 90) for launch in range(100)), key=misses)
    points = [Point(f"FSDP2, {policies[name]}", value, model_s(*fitted, name), True) for name, value in ours.items()]
    for name, value in by_hand.items():
        points.append(Point(f"by hand, {policies[name]}", value, model_s(*fitted, name), False))
    return points


def draw(points: list[Point], path: Path) -> None:
    """Measured windows beside the model's, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes: Any = figure.subplots()
    reach = [0.8 * min(point.measured_s for point in points), 1.25 * max(point.measured_s for point in points)]
    axes.plot(reach, reach, color="#222222", linewidth=1)
    axes.fill_between(reach, [0.9 * x for x in reach], [1.1 * x for x in reach], color="#dddddd", label="± 10 %")
    for is_fitted, is_sharded, color, marker in (
        (True, False, "#9a9a9a", "o"),
        (False, False, "#0072b2", "o"),
        (True, True, "#9a9a9a", "s"),
        (False, True, "#d55e00", "s"),
    ):
        chosen = [
            p for p in points if p.is_fitted == is_fitted and p.name.startswith(("FSDP2", "by hand")) == is_sharded
        ]
        what = "1.2 B, FSDP2, 2 GPUs" if is_sharded else "GPT-2, replicas"
        label = f"{what}: {'fitted' if is_fitted else 'predicted'}"
        axes.scatter(
            [p.measured_s for p in chosen], [p.model_s for p in chosen], c=color, marker=marker, s=36, label=label
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=reach,
        ylim=reach,
        xlabel="measured, s per window",
        ylabel="model, s per window",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=here / "results", help="folder with what was measured")
    parser.add_argument("--out", type=Path, default=here.parent / "docs" / "assets", help="folder for the picture")
    options = parser.parse_args()
    points = [*replicas(options.results), *shards(options.results)]
    cells = [
        [point.name, f"{point.measured_s:.3f}", f"{point.model_s:.3f}", f"{point.model_s / point.measured_s - 1:+.0%}",
         "fitted" if point.is_fitted else "predicted"]
        for point in points
    ]  # fmt: skip
    print(grid("s per window", ["", "measured", "model", "error", ""], cells))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(points, options.out / "scaling-check.png")


if __name__ == "__main__":
    main()
