"""All benchmarks by one command, and what they say to the aims: a table, a JSON, a picture.

    python benchmarks/run.py                          # what this machine can show: one GPU, or two and more
    python benchmarks/run.py --only doors wgrad       # some of the scripts
    python benchmarks/run.py --tiny --device cpu      # tiny, in a minute or two, only to see that everything runs
    python benchmarks/run.py --report --out FOLDER    # no measuring: table and picture of the results in a folder

Each script runs in a process of its own, within a time of its own, and stores what it has after each contender; one
that fails costs its own rows. Peers run beside macrobatch in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Row, is_ours, machine
from pictures import Bar, Panel, draw

HERE = Path(__file__).parent


class Script(NamedTuple):
    """A benchmark and its arguments; seconds after which it is stopped."""

    name: str
    arguments: list[str]
    seconds: float


def scripts(options: argparse.Namespace) -> list[Script]:
    """Those that the machine can run, the quick ones first."""
    slow = options.slower
    if options.tiny:
        tiny, common = 240.0, ["--tiny", "--device", options.device]
        every = [
            Script("wgrad", [*common, "--seconds", "0.2"], tiny),
            Script("lengths", [*common, "--rounds", "2"], tiny),
            Script("doors", [*common, "--seconds", "0.1", "--budget", "15"], tiny),
            Script("waits", common, tiny),
        ]
        if options.device == "cpu":
            every += [Script("ranks", ["gpt124", *common, "--seconds", "60"], tiny)]
            every += [Script("overhead", ["--rounds", "3"], tiny)]
        return every
    if options.device == "cpu":
        return [Script("overhead", [], 600), Script("ranks", ["mlp", "--device", "cpu"], 600)]
    every = [
        Script("wgrad", ["--seconds", f"{2 * slow}"], 90 * slow),
        Script("lengths", ["--rounds", f"{round(6 * slow)}"], 90 * slow),
        Script("waits", [], 60 * slow),
        *(
            Script("doors", ["--work", work, "--seconds", f"{1.5 * slow}", "--budget", f"{budget * slow}"], most * slow)
            for work, budget, most in (("mlp", 40, 80), ("vit", 50, 90), ("resnet18", 60, 110), ("gpt124", 130, 220))
        ),
    ]
    if torch.cuda.device_count() > 1:
        every += [
            Script("ranks", ["gpt124", "--micro", "4", "--seconds", f"{100 * slow}"], 150 * slow),
            Script("ranks", ["fsdp1b", "--seconds", f"{100 * slow}"], 150 * slow),
        ]
    return every


def run(script: Script, folder: Path) -> Row:
    """One script, its output passed on."""
    command = [sys.executable, str(HERE / f"{script.name}.py"), *script.arguments, "--out", str(folder)]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    began_s = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=script.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with the ranks that it may have started
        process.wait()
        code = None
    return {
        "script": script.name,
        "arguments": script.arguments,
        "outcome": "out of time" if code is None else "done" if code == 0 else f"exit status {code}",
        "seconds": round(time.monotonic() - began_s, 1),
    }


# --- aims ---


class Aim(NamedTuple):
    """One row of the report.

    Attributes:
        file: whose rows it looks at, by the start of its name.
        rows: from what is in the file, the rows to show.
        ours: by its name, whether a row of macrobatch is one that the aim is for; the best one counts.
        value: of a row, its quartiles.
        least: at least this much, or, if `is_ratio`, at most.
        most_gib: peak memory, if it is part of the aim.
    """

    work: str
    file: str
    rows: Callable[[Any], list[Row]]
    ours: Callable[[str], bool]
    least: float
    unit: str = ""
    value: Callable[[Row], Any] = lambda row: row["rate"]
    is_ratio: bool = False
    most_gib: float | None = None


def _given(work: str) -> Callable[[Any], list[Row]]:
    """Rows whose micro-batch was given."""
    return lambda found: [row for row in found["results"].get(work, []) if "free" not in row["name"]]


def _free(work: str) -> Callable[[Any], list[Row]]:
    """Rows of macrobatch that were free to choose; of others, all."""
    rows = lambda found: found["results"].get(work, [])  # noqa: E731
    return lambda found: [row for row in rows(found) if "free" in row["name"] or not is_ours(row["name"])]


def _at_door(name: str) -> bool:
    return "accelerate door" in name


AIMS = (
    Aim(
        "GPT-2 124M, T 1024, window 64, micro-batch 2, the accelerate door",
        "doors",
        _given("gpt124"),
        _at_door,
        300e3,
        "tokens/s",
    ),
    Aim("the same, TrainStep, free to plan", "doors", _free("gpt124"), is_ours, 540e3, "tokens/s"),
    Aim("ResNet-18, window 256, micro-batch 8", "doors", _given("resnet18"), is_ours, 3.9e3, "images/s"),
    Aim("the same, free to plan", "doors", _free("resnet18"), is_ours, 19e3, "images/s"),
    Aim("6-layer ViT-tiny, micro-batch 8", "doors", _given("vit"), is_ours, 6.5e3, "images/s"),
    Aim("MLP 3072-512-512-10, micro-batch 8", "doors", _given("mlp"), is_ours, 90e3, "images/s"),
    Aim(
        "log-normal lengths, window 512",
        "lengths",
        lambda found: found["rows"],
        is_ours,
        300e3,
        "real tokens/s",
        lambda row: row["tokens_per_s"],
    ),
    Aim(
        "bf16 weights, micro-batch 1, fp32 buffer (bf16 buffer = 1)",
        "wgrad",
        lambda found: [row for row in found["rows"] if row["name"].startswith("graph")] or found["rows"],
        lambda name: "fused_linear" in name,
        1.05,
        "x time",
        lambda row: row["ratio"],
        is_ratio=True,
    ),
    Aim(
        "GPT-2 on 2 GPUs, micro-batch 4",
        "ranks-gpt124",
        lambda found: [row for row in found["rows"] if row["micro_batch"] == 4] or found["rows"],
        is_ours,
        800e3,
        "tokens/s",
        lambda row: row["per_s"],
        most_gib=5.8,
    ),
)


def report(folder: Path, *, kind: str) -> list[Row]:
    """What the results in a folder say to the aims."""
    rows: list[Row] = []
    for aim in AIMS:
        path = folder / f"{aim.file}-{kind}.json"
        if not path.exists():
            rows.append({"work": aim.work, "problem": f"no {path.name}"})
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        usable = [
            row for row in aim.rows(found) if not row.get("problem") and not row.get("error_text", row.get("why"))
        ]
        usable = [row for row in usable if not isinstance(row.get("error"), str)]
        ours = [row for row in usable if is_ours(row["name"]) and aim.ours(row["name"])]
        if not ours:
            problems = [row for row in aim.rows(found) if aim.ours(row["name"])]
            text = next((str(row.get("problem") or row.get("error")) for row in problems), "not measured")
            rows.append({"work": aim.work, "problem": text})
            continue
        best = (min if aim.is_ratio else max)(ours, key=lambda row: aim.value(row)[1])
        others = [row for row in usable if not is_ours(row["name"])]
        value = aim.value(best)
        rows.append(
            {
                "work": aim.work,
                "unit": aim.unit,
                "aim": aim.least,
                "is_ratio": aim.is_ratio,
                "ours": best["name"],
                "value": value,
                "gib": best.get("peak_gib", best.get("gib")),
                "error": _error(best),
                "is_met": (value[1] <= aim.least if aim.is_ratio else value[1] >= aim.least)
                and (aim.most_gib is None or best["peak_gib"] <= aim.most_gib),
                "most_gib": aim.most_gib,
                "others": {row["name"]: aim.value(row) for row in others},
                "errors": {row["name"]: _error(row) for row in others},
                "also": {row["name"]: aim.value(row) for row in ours if row is not best},
                "gpu": found["machine"]["gpu"],
            }
        )
    return rows


def _error(row: Row) -> float | None:
    return next((row[key] for key in ("fp64_error", "gradient_error", "error") if key in row), None)


def table(rows: list[Row]) -> str:
    """As Markdown: what macrobatch reached beside the best of the others, and the aim."""
    lines = ["| work | peers | macrobatch | aim | error vs fp64 |", "|---|---|---|---|---|"]
    for row in rows:
        if "problem" in row:
            lines.append(f"| {row['work']} | | {row['problem'][:80]} | | |")
            continue
        others = "; ".join(f"{_short(name)} {_number(value[1], row)}" for name, value in row["others"].items())
        low, middle, high = (_number(number, row) for number in row["value"])
        mark = "" if row["is_met"] else ", missed"
        memory = "" if row["most_gib"] is None else f", ≤ {row['most_gib']} GiB (here {row['gib']:.2f})"
        aim = f"{'≤' if row['is_ratio'] else '≥'} {_number(row['aim'], row)}{memory}{mark}"
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        ours = f"**{middle}** [{low}, {high}] {row['unit']} ({_short(row['ours'])})"
        lines.append(f"| {row['work']} | {others} | {ours} | {aim} | {error} |")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.removeprefix("macrobatch, ").removeprefix("graph: ").removeprefix("by hand, ")


def _number(value: float, row: Row) -> str:
    if row["is_ratio"]:
        return f"{value:.3f}"
    return f"{value / 1e3:.3g} k" if value >= 1e3 else f"{value:.3g}"


def panels(rows: list[Row]) -> Iterator[Panel]:
    """One for each work that has been measured."""
    for row in rows:
        if "problem" not in row:
            factor, unit = (1.0, row["unit"]) if row["is_ratio"] else (1e3, f"thousand {row['unit']}")
            bars = [Bar(name, value, is_ours=False) for name, value in row["others"].items()]
            bars += [Bar(name, value, is_ours=True) for name, value in row["also"].items()]
            bars.append(Bar(row["ours"], row["value"], is_ours=True))
            scaled = [bar._replace(value=tuple(number / factor for number in bar.value)) for bar in bars]
            yield Panel(row["work"], unit, scaled, row["aim"] / factor, row["is_ratio"])


def main() -> None:
    options = _options()
    folder = options.out or HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    kind = f"{options.device}{'-tiny' if options.tiny else ''}"
    wanted = [] if options.report else scripts(options)
    outcomes = [run(script, folder) for script in wanted if not options.only or script.name in options.only]
    rows = report(folder, kind=kind)
    path = folder / f"suite-{kind}.json"
    measured_here = {"machine": machine(), "outcomes": outcomes} if outcomes else {}
    path.write_text(json.dumps({**measured_here, "rows": rows}, indent=1) + "\n")
    print(f"\n{table(rows)}\n")
    for outcome in outcomes:
        print(f"{outcome['script']} {' '.join(outcome['arguments'])}: {outcome['outcome']} in {outcome['seconds']} s")
    draw(
        path.with_suffix(".png"), list(panels(rows)), title=next((row["gpu"] for row in rows if row.get("gpu")), "CPU")
    )
    print(f"written to {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models and windows, only to see that everything runs")
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", help="these scripts")
    parser.add_argument("--slower", type=float, default=1.0, help="more time for everything, by this factor")
    parser.add_argument("--report", action="store_true", help="measure nothing: report what is in the folder")
    parser.add_argument("--out", type=Path, help="folder for the results instead of benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
