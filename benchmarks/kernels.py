"""Where a window's time goes on the device: kernels by kind, and how long it does nothing.

    python benchmarks/kernels.py --micro 64                                # GPT-2 124M, the window as one micro-batch
    torchrun --nproc_per_node 2 benchmarks/kernels.py --micro 4            # the same window over two GPUs

Several windows in a row, as a training runs them, of `TrainStep` and of a compiled loop by hand. What is idle within a
replay are the gaps between kernels; what is idle between them, the host. The profiler itself costs some of both.

Then, without the profiler, how fast they are in the long run and, one window at a time, in the first moments after a
pause: a card at its power limit lowers its clock within a second or two. Its clock and power are asked of nvidia-smi.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from doors import adamw, hand, loss_of, works
from harness import Row, calls_per_round, error_text, grid, quartiles, save, seconds_each
from torch.profiler import ProfilerActivity, profile
from windows import over_ranks

import macrobatch as mb

KINDS = {
    "collectives": r"nccl",
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated",
    "optimizer": r"multi_tensor|adam",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|triton_.*mm_",
    "copies and fills": r"memcpy|memset|fillfunctor",
    "compiled, reductions": r"triton_(red|per)_",
    "compiled, elementwise": r"triton_",
}
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def main() -> None:
    options = _options()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    num_ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if num_ranks > 1:
        dist.init_process_group("nccl", device_id=device)
    work = works(tiny=False)["gpt124"]
    torch.manual_seed(0)
    with device:
        model = work.make()
    batch = work.batch(options.window // num_ranks, device)
    step = mb.TrainStep(
        model, adamw(model), loss_of, micro_batch=options.micro, precision="bf16", nonfinite=options.nonfinite,
        capture=None if options.capture == "none" else options.capture, fused_linear=options.fused,
    )  # fmt: skip
    contenders: dict[str, Callable[[], object]] = {"TrainStep": lambda: step(batch)}
    if num_ranks == 1:
        loop, _ = hand(work, options.micro, model, device, is_compiled=True)
        contenders["hand loop, compiled"] = lambda: loop(batch)
    found = {name: _profiled(run, options.windows) for name, run in contenders.items()}
    num_units = options.window * work.units_per_sample
    speeds = {name: _speeds(run, num_units, options) for name, run in contenders.items()}
    if rank == 0:
        rows = [{"name": name, **row} for name, (row, _) in found.items()]
        largest = {name: kernels for name, (_, kernels) in found.items()}
        settings = {**{k: v for k, v in vars(options).items() if k != "out"}, "num_ranks": num_ranks}
        name = f"kernels-{options.micro}-{num_ranks}gpu"
        save(name, {"settings": settings, "rows": rows, "speeds": speeds, "largest_ms": largest}, options.out)
        kinds = list(rows[0])[1:]
        print(grid("ms per window", ["", *found], [[k, *(f"{row[k]:.2f}" for row in rows)] for k in kinds]))
        cells = [[kernel, f"{ms:.3f}"] for kernel, ms in list(largest["TrainStep"].items())[: options.largest]]
        print(grid("largest kernels of TrainStep, ms per window", ["", "ms"], cells))
        cells = [[name, *(str(cell) for cell in speed.values())] for name, speed in speeds.items()]
        print(grid("k tokens/s", ["", *next(iter(speeds.values()))], cells))
    if num_ranks > 1:
        dist.destroy_process_group()


def _profiled(run: Callable[[], object], num_windows: int) -> tuple[Row, dict[str, float]]:
    """ms per window: of all, of each kind, and of nothing; and those of every kernel's name."""
    for _ in range(8):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_windows):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in ON_DEVICE)
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    busy_us, until = 0.0, spans[0][0]
    gaps_us: Counter[str] = Counter()
    for start, end, name in spans:
        by_kind[kind_of(name)] += end - start
        by_name[name[:100]] += end - start
        if start > until:
            gaps_us["idle, gaps below 20 us" if start - until < 20 else "idle, longer"] += start - until
        busy_us += max(0.0, end - max(start, until))
        until = max(until, end)
    scale = 1e-3 / num_windows
    row = {"window": (until - spans[0][0]) * scale, "kernels, one at a time": busy_us * scale}
    row |= {kind: gaps_us[kind] * scale for kind in ("idle, gaps below 20 us", "idle, longer")}
    row |= {kind: by_kind[kind] * scale for kind in (*KINDS, "other")}
    row["number of kernels"] = len(spans) / num_windows
    return row, {name: us * scale for name, us in by_name.most_common(40)}


def _speeds(run: Callable[[], object], num_units: int, options: argparse.Namespace) -> Row:
    """Thousand tokens per second, quartiles: in rounds of half a second without a pause; and of single windows, the
    third to the sixth after each pause."""
    seconds_each(run, 8)
    each_s = seconds_each(run, 1)
    if dist.is_initialized():
        (each_s,) = over_ranks([each_s], torch.device("cuda", torch.cuda.current_device()))
    num_calls = calls_per_round(each_s)
    long_s = [seconds_each(run, num_calls) for _ in range(options.rounds)]
    for _ in range(num_calls):
        run()
    clock = _clock()
    first_s: list[float] = []
    for _ in range(options.pauses):
        torch.cuda.synchronize()
        time.sleep(options.pause)
        first_s += [seconds_each(run, 1) for _ in range(6)][2:]
    rates = ([num_units / each_s / 1e3 for each_s in times_s] for times_s in (long_s, first_s))
    lasting, first = (quartiles(each, digits=1) for each in rates)
    return {"in the long run": lasting, "after a pause": first, "MHz and W in the long run": clock}


def _clock() -> str:
    asked = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,power.limit", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return error_text(error)
    return answer.splitlines()[0]


def kind_of(kernel: str) -> str:
    """The first kind whose pattern a kernel's name has."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--window", type=int, default=64, help="samples, over all ranks")
    parser.add_argument("--micro", type=int, default=64, help="samples per micro-batch")
    parser.add_argument("--windows", type=int, default=5, help="profiled in a row")
    parser.add_argument("--capture", choices=["compile", "graph", "auto", "none"], default="compile")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="fused_linear")
    parser.add_argument("--nonfinite", choices=["raise", "skip", "ignore"], default="raise")
    parser.add_argument("--rounds", type=int, default=12, help="of half a second, for the long run")
    parser.add_argument("--pauses", type=int, default=5, help="how many")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds of each")
    parser.add_argument("--largest", type=int, default=25, help="kernels to print")
    parser.add_argument("--out", type=Path, help="folder for JSON instead of benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
