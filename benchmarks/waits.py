"""What the device and the host do in a window: a trace for chrome://tracing, and a table of what waits.

    python benchmarks/waits.py                        # GPT-2 124M, micro-batches of 2
    python benchmarks/waits.py --tiny --device cpu

Then, how long a pass over the flat gradient buffer takes beside a window; a window makes two, or three where it clips.
Fails if a micro-step makes the host wait for the device (a synchronisation, or a copy to the host).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from doors import adamw, loss_of, works
from harness import Row, grid, in_turns, save
from torch.profiler import ProfilerActivity, profile, record_function

import macrobatch as mb

ON_HOST = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
BESIDE = ("Memcpy DtoH", "aten::item", "aten::nonzero")
"""Copies to the host, by when the device makes them; calls that may lead to one, or be about a number on the host."""


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    work = works(options.tiny)["gpt124"]
    torch.manual_seed(0)
    with device:
        model = work.make()
    batch = tuple(tensor.cpu() for tensor in work.batch(options.window, device))
    step = mb.TrainStep(
        model, adamw(model), loss_of, micro_batch=work.micro_batch, precision=work.precision, clip_norm=1.0,
        capture=options.capture,
    )  # fmt: skip
    marks: list[Any] = []

    def mark(_: object) -> None:
        marks.append(record_function("between micro-steps"))
        marks[-1].__enter__()
        marks[-1].__exit__(None, None, None)

    step.listeners.append(mb.on(mb.MicroBatchDone, mark))
    for _ in range(4):
        step(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        mark(None)
        result = step(batch)
        loss = result.loss
    rows = _waits(profiler, num_micro_batches=result.num_micro_batches)
    name = f"waits-{device.type}{'-tiny' if options.tiny else ''}"
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    buffer = step.gradients
    passes = in_turns(
        {
            "window": lambda: step(batch),
            "zero": lambda: [flat.storage.zero_() for flat in buffer.flats],
            "norm": buffer.norm,
            "scale": lambda: buffer.scale_(1.0),
        },
        seconds=options.seconds,
    )
    path = save(name, {"settings": settings, "loss": loss, "rows": rows, "passes": passes}, options.out)
    profiler.export_chrome_trace(str(path.with_name(f"{name}.chrome.json.gz")))
    cells = [[row["name"], str(row["within"]), str(row["after"])] for row in rows]
    title = f"a window of {result.num_micro_batches} micro-batches: how often the host waits"
    print(grid(title, ["", "in micro-steps", "at the end of the window"], cells))
    cells = [[row["name"], f"{row['s'][1] * 1e3:.3f}", f"{row['ratio'][1]:.2%}"] for row in passes]
    print(grid("passes over the buffer", ["", "ms", "of a window"], cells))
    print("written to", path)
    if any(row["within"] for row in rows if row["name"] in ON_HOST):
        sys.exit("a micro-step waits for the device")


def _waits(profiler: Any, *, num_micro_batches: int) -> list[Row]:
    """Events that wait, until the last micro-step has been launched and after."""
    events = list(profiler.events())
    marks = sorted(event.time_range.start for event in events if event.name == "between micro-steps")
    if len(marks) <= num_micro_batches:
        raise RuntimeError(f"{len(marks)} marks for {num_micro_batches} micro-batches")
    begin, end = marks[0], marks[-1]
    rows: list[Row] = []
    for name in (*ON_HOST, *BESIDE):
        starts = [event.time_range.start for event in events if name in event.name]
        within = sum(begin <= start <= end for start in starts)
        rows.append({"name": name, "within": within, "after": sum(start > end for start in starts)})
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, only to see that it runs")
    parser.add_argument("--window", type=int, default=8, help="samples")
    parser.add_argument("--capture", choices=["compile", "graph"], help="as TrainStep takes it; eager without")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing windows and passes")
    parser.add_argument("--out", type=Path, help="folder for JSON and trace instead of benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
