"""Several ranks: what agreeing on a gradient costs, against loops written by hand and against peers, in one run.

    torchrun --nproc_per_node 2 benchmarks/ranks.py gpt124             # GPT-2 124M, whole on every GPU
    torchrun --nproc_per_node 2 benchmarks/ranks.py fsdp1b             # a GPT of 1.2 B parameters under FSDP2
    torchrun --nproc_per_node 2 benchmarks/ranks.py mlp --device cpu   # so small that overhead is what is left
    python benchmarks/ranks.py gpt124                                  # starts torchrun itself

All contenders get the same model, data, window, precision and optimizer (fused AdamW). `gpt124` and `fsdp1b` measure
one after the other, memory included, and with `--turns` all of them several times over, built anew; `mlp` all in turns.
GiB are 2^30 bytes.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import os
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.cuda.nccl
import torch.distributed as dist
from contenders import POLICIES, SHARDED_PRECISION, Job, accelerate, ddp, fsdp, graphed, macrobatch, sharded
from harness import Panels, Row, grid, paired, save
from models import LENGTH, VOCABULARY, gpt_1b, gpt_124m, gpt_tiny, mlp_tiny
from torch.nn.parallel import DistributedDataParallel
from windows import (
    GIB,
    TIMED,
    WARMUP,
    Contender,
    Noted,
    attempt,
    exact_slice,
    gradients_noted,
    over_ranks,
    slice_error,
    together,
)

from macrobatch import tree
from macrobatch.sync import ReplicatedSync, ShardedSync, WrappedSync

# Workloads. What the others' speed is divided by comes first.


def gpt124(job: Job) -> Iterator[Contender]:
    """Eager contenders first, in all sizes of a micro-batch: compiling may run out of time."""
    for num_rows in job.options.micro:
        yield Contender("DDP, no_sync", num_rows, partial(ddp, job, num_rows))
        yield Contender("DDP, every micro-batch", num_rows, partial(ddp, job, num_rows, always=True))
        yield Contender("DDP, no_sync, bucket views", num_rows, partial(ddp, job, num_rows, views=True))
        yield Contender("Accelerate", num_rows, partial(accelerate, job, num_rows))
        yield Contender("macrobatch", num_rows, partial(macrobatch, job, num_rows))
        if job.device.type == "cuda":
            yield Contender("macrobatch, graph", num_rows, partial(macrobatch, job, num_rows, capture="graph"))
            yield Contender("macrobatch, captured", num_rows, partial(macrobatch, job, num_rows, capture="compile"))
            fused = partial(macrobatch, job, num_rows, capture="compile", fused_linear=True)
            yield Contender("macrobatch, captured, fused", num_rows, fused)
            unchecked = partial(fused, nonfinite="ignore")  # as the loops by hand and the peers are
            yield Contender("macrobatch, captured, fused, unchecked", num_rows, unchecked)
            yield Contender("by hand, flat buffer, CUDA graph", num_rows, partial(graphed, job, num_rows))
    after = partial(ReplicatedSync, overlap=False)  # hooks do not fire when a graph is replayed
    for num_rows in job.options.micro:
        compiled = partial(macrobatch, job, num_rows, compile_mode="default")
        captured = partial(macrobatch, job, num_rows, compile_mode="reduce-overhead", make_sync=after)
        yield Contender("macrobatch, compile", num_rows, compiled)
        yield Contender("DDP, no_sync, compile", num_rows, partial(ddp, job, num_rows, compiled=True))
        yield Contender("macrobatch, compile, reduce-overhead", num_rows, captured)


def fsdp1b(job: Job) -> Iterator[Contender]:
    """By hand and peers; every policy of macrobatch; what it chooses by itself, without and with a memory limit."""
    for num_rows in job.options.micro:
        yield Contender(
            "torchtitan's default", num_rows, partial(fsdp, job, num_rows, POLICIES["reshard, reduce each"])
        )
        for name in ("reshard, reduce last", "keep, reduce last"):
            yield Contender(f"FSDP2 by hand, {name}", num_rows, partial(fsdp, job, num_rows, POLICIES[name]))
        policy = POLICIES["keep, reduce last"]
        compiled = partial(fsdp, job, num_rows, policy, compiled=True)
        yield Contender("FSDP2 by hand, keep, reduce last, compiled blocks", num_rows, compiled)
        if job.device.type == "cuda":  # on CPU, Accelerate ignores its plugin
            yield Contender("Accelerate, FSDP2", num_rows, partial(accelerate, job, num_rows, is_sharded=True))
        ours = partial(macrobatch, job, num_rows, make_model=partial(sharded, job))
        for name, policy in POLICIES.items():
            sync = partial(ShardedSync, policy=policy)
            yield Contender(f"macrobatch, {name}", num_rows, partial(ours, make_sync=sync))
        yield Contender("macrobatch, chosen", num_rows, partial(ours, make_sync=ShardedSync))
        compiled = partial(sharded, job, compiled=True)
        yield Contender(
            "macrobatch, chosen, compiled blocks", num_rows, partial(ours, make_sync=ShardedSync, make_model=compiled)
        )
        for limit_gib in job.options.limits or _limits_gib(job, num_rows):
            sync = partial(ShardedSync, memory_limit_bytes=int(limit_gib * GIB))
            yield Contender(f"macrobatch, chosen for {limit_gib:.3f} GiB", num_rows, partial(ours, make_sync=sync))


def _limits_gib(job: Job, num_rows: int) -> list[float]:
    """Halfway between the peaks of the policies, so that each limit lets one more of them fit."""
    peaks = sorted(row["peak_gib"] for row in _policy_rows(job, num_rows))
    return [(low + high) / 2 for low, high in pairwise(peaks) if high - low > 0.1]


def _policy_rows(job: Job, num_rows: int) -> list[Row]:
    names = [f"macrobatch, {name}" for name in POLICIES]
    return [row for row in job.rows if row["name"] in names and row["micro_batch"] == num_rows and "error" not in row]


def mlp(job: Job) -> Iterator[Contender]:
    """Replicas of a model of 1,700 parameters."""
    (num_rows,) = job.options.micro
    ours = partial(macrobatch, job, num_rows)
    yield Contender("DDP, no_sync", num_rows, partial(ddp, job, num_rows))
    yield Contender("DDP, every micro-batch", num_rows, partial(ddp, job, num_rows, always=True))
    yield Contender("DDP, no_sync, bucket views", num_rows, partial(ddp, job, num_rows, views=True))
    yield Contender("Accelerate", num_rows, partial(accelerate, job, num_rows))
    door = partial(accelerate, job, num_rows, package="macrobatch.accelerate")
    yield Contender("macrobatch.accelerate", num_rows, door)
    yield Contender("TrainStep", num_rows, ours)
    yield Contender("TrainStep, nonfinite=ignore", num_rows, partial(ours, nonfinite="ignore"))
    after = partial(ReplicatedSync, overlap=False)
    yield Contender("TrainStep, overlap=False", num_rows, partial(ours, make_sync=after))
    wrapped = partial(ours, make_model=lambda: DistributedDataParallel(job.model()), make_sync=WrappedSync)
    yield Contender("TrainStep on DDP", num_rows, wrapped)


WORKLOADS = {"gpt124": gpt124, "fsdp1b": fsdp1b, "mlp": mlp}


# One run


def compare_in_turns(job: Job, contenders: Iterator[Contender]) -> None:
    """All at once: the only fair way where a window takes a millisecond."""
    ready = {contender.name: contender.build() for contender in contenders}
    exact = exact_slice(job.model(), job.loss, job.micro_batches(job.options.micro[0]), job.device)
    gradients: dict[str, Noted] = {}
    for name, running in ready.items():
        with gradients_noted(running.optimizer, exact) as noted:
            running.update()
        gradients[name] = noted[0]
    if job.options.profile:
        profile(ready["TrainStep"].update)
        return
    num_micro_batches = len(job.micro_batches(job.options.micro[0]))
    updates = {name: running.update for name, running in ready.items()}
    job.rows += paired(updates, rounds=job.options.rounds, calls=20, unit_per_call=num_micro_batches)
    reference = next(iter(gradients.values())).norm
    for row in job.rows:
        mine = gradients[row["name"]]
        row |= {"grad_norms": [mine.norm], "off": abs(mine.norm / reference - 1)}
        row["fp64_error"] = slice_error([mine], exact)
        if row["off"] > 1e-5:
            say(f"WRONG? The gradient's norm of {row['name']} is off by {row['off']:.0e}")
    store(job, {"microseconds per micro-step": {row["name"]: row["us"] for row in job.rows}})
    header = ["", "us per micro-step", f"x {job.rows[0]['name']}", "processor time, us", "x", "error vs fp64"]
    kinds = [("us", 1), ("ratio", 3), ("cpu_us", 1), ("cpu_ratio", 3)]
    cells = [
        [row["name"], *(spread(row[kind], n) for kind, n in kinds), f"{row['fp64_error']:.1e}"] for row in job.rows
    ]
    say(grid(title(job), header, cells))


def compare_one_by_one(job: Job, contenders: Iterator[Contender]) -> None:
    """Each alone, so that its memory is its own; what is found is said and stored at once."""
    began_s = time.monotonic()
    exact = exact_slice(job.model(), job.loss, job.micro_batches(1), job.device)
    turns: dict[tuple[str, int], list[Row]] = {}
    for contender in in_turns(job, contenders):
        (elapsed_s,) = over_ranks([time.monotonic() - began_s], job.device)
        if elapsed_s > job.options.seconds:
            row: Row = {"name": contender.name, "micro_batch": contender.num_rows, "error": "not run: out of time"}
        else:
            reference = next((row["grad_norms"][0] for row in job.rows if "error" not in row), None)
            row = attempt(contender, device=job.device, num_units=job.num_units, reference=reference, exact=exact)
        say("  ".join(cells(job, row)))
        if "error" not in row:
            measured = turns.setdefault((contender.name, contender.num_rows), [])
            measured.append(row)
            row = together(measured, job.num_units)
        known = [other for other in job.rows if (other["name"], other["micro_batch"]) == contender[:2]]
        if not known:
            job.rows.append(row)
        elif "error" not in row:
            job.rows[job.rows.index(known[0])] = row
        done = {f"{row['name']} ({row['micro_batch']})": row for row in by_size(job) if "error" not in row}
        panels = {f"thousand {job.unit}/s": {n: tuple(x / 1e3 for x in row["per_s"]) for n, row in done.items()}}
        if job.device.type == "cuda":
            panels["peak memory, GiB"] = {name: (row["peak_gib"],) * 3 for name, row in done.items()}
        store(job, panels)
    header = [
        "",
        "micro-batch",
        f"k {job.unit}/s",
        f"x {job.rows[0]['name']}",
        "peak GiB",
        "reserved",
        "norm off by",
        "error vs fp64",
        "",
    ]
    say("\n" + grid(title(job), header, [cells(job, row) for row in by_size(job)]))
    for row in job.rows:
        if "chosen" in row["name"] and "error" not in row:
            say(verdict(job, row))


def in_turns(job: Job, contenders: Iterator[Contender]) -> Iterator[Contender]:
    """The contenders, as often as was asked for; what they are may depend on what was found of earlier ones."""
    known: list[Contender] = []
    for contender in contenders:
        known.append(contender)
        yield contender
    for _ in range(job.options.turns - 1):
        yield from known


def spread(quartiles: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{number:.{digits}f}" for number in quartiles)
    return f"{middle} [{low}, {high}]"


def by_size(job: Job) -> list[Row]:
    """The results, those of the same micro-batch together."""
    return [row for num_rows in job.options.micro for row in job.rows if row["micro_batch"] == num_rows]


def cells(job: Job, row: Row) -> list[str]:
    """A result as texts. A gradient whose norm is off by more than bf16 explains is pointed out."""
    start = [row["name"], str(row["micro_batch"])]
    if "error" in row:
        return [*start, *[""] * 6, row["error"][:80]]
    same_size = [other for other in job.rows if other["micro_batch"] == row["micro_batch"] and "error" not in other]
    base = next((other["per_s"][1] for other in same_size if other["name"] == job.rows[0]["name"]), None)
    return [
        *start,
        spread([number / 1e3 for number in row["per_s"]], 1),
        f"{row['per_s'][1] / base:.2f}" if base else "",
        f"{row['peak_gib']:.2f}",
        f"{row['reserved_gib']:.2f}",
        f"{row['off']:.0e}",
        f"{row['fp64_error']:.1e}",
        ("WRONG? " if row["off"] > 0.01 else "") + row.get("policy", ""),
    ]


def verdict(job: Job, row: Row) -> str:
    """Whether what was chosen fits, and how fast it is beside the fastest policy that does."""
    limit_gib = float(row["name"].split()[-2]) if row["name"].endswith("GiB") else float("inf")
    fitting = [other for other in _policy_rows(job, row["micro_batch"]) if other["peak_gib"] <= limit_gib]
    best = max(fitting, key=lambda other: other["per_s"][1], default=None)
    kept = "fits" if row["peak_gib"] <= limit_gib else "DOES NOT FIT"
    beside = "none fits" if best is None else f"{row['per_s'][1] / best['per_s'][1]:.2f} x the fastest that fits"
    best_name = "" if best is None else f" ({best['policy']})"
    return f"{row['name']}: {row['policy']}, {row['peak_gib']:.2f} GiB, {kept}; {beside}{best_name}"


def profile(update: Callable[[], object]) -> None:
    """Where the time of a window goes on the first rank, by Python function."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(500):
        update()
    profiler.disable()
    if dist.get_rank() == 0:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def title(job: Job) -> str:
    hardware = f"on {torch.cuda.get_device_name()}" if job.device.type == "cuda" else "on CPU, one thread each"
    return (
        f"{job.options.workload}: {job.num_units} {job.unit} per window over {dist.get_world_size()} ranks {hardware}"
    )


def store(job: Job, panels: Panels) -> None:
    if dist.get_rank() != 0:
        return
    with torch.device("meta"):
        num_parameters = sum(param.numel() for param in job.make_model().parameters())
    settings = {
        **{name: value for name, value in vars(job.options).items() if name != "out"},
        "num_ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        "nccl": torch.cuda.nccl.version() if job.device.type == "cuda" else None,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "OMP_"))},
        "num_parameters": num_parameters,
        "rows_per_rank": tree.num_rows(job.batch),
        "units_per_window": job.num_units,
        "unit": job.unit,
        "autocast": job.precision,
        "fsdp2_precision": str(SHARDED_PRECISION) if job.options.workload == "fsdp1b" else None,
        "optimizer": "AdamW, fused, lr 0",
        "warmup": WARMUP._asdict(),
        "timed": TIMED._asdict(),
    }
    name = f"ranks-{job.options.workload}-{job.device.type}{'-tiny' if job.options.tiny else ''}"
    save(name, {"settings": settings, "rows": job.rows}, job.options.out, title=title(job), panels=panels)


def make_job(options: argparse.Namespace, device: torch.device) -> Job:
    """The workload's model and this rank's share of its macro-batch."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    seeded = torch.Generator().manual_seed(1)
    if options.workload == "mlp":
        num_samples = 8 * options.micro[0] * num_ranks
        x_BC = torch.randn(num_samples, 16, generator=seeded).chunk(num_ranks)[rank].to(device)
        y_B = torch.randint(4, (num_samples,), generator=seeded).chunk(num_ranks)[rank].to(device)
        batch, num_units, unit, make_model = (x_BC, y_B), num_samples, "samples", mlp_tiny
    else:
        num_sequences = 16 if options.tiny else 64 if options.workload == "gpt124" else 32
        length, vocabulary = (16, 97) if options.tiny else (LENGTH, VOCABULARY)
        ids_BT = torch.randint(vocabulary, (num_sequences, length + 1), generator=seeded)
        batch, num_units, unit = ids_BT.chunk(num_ranks)[rank].to(device), num_sequences * length, "tokens"
        make_model = gpt_tiny if options.tiny else gpt_124m if options.workload == "gpt124" else gpt_1b
    return Job(
        options=options,
        device=device,
        make_model=make_model,
        batch=batch,
        num_units=num_units,
        unit=unit,
        precision="bf16" if options.workload == "gpt124" else "fp32",
    )


def main() -> None:
    options = parsed_options()
    if "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.ranks)]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        device_id=device if device.type == "cuda" else None,
        timeout=datetime.timedelta(minutes=3),  # an error on one rank alone ends the run here
    )
    job = make_job(options, device)
    wanted = (c for c in WORKLOADS[options.workload](job) if any(word in c.name for word in options.only))
    (compare_in_turns if options.workload == "mlp" else compare_one_by_one)(job, wanted)
    dist.destroy_process_group()


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--ranks", type=int, default=2, help="how many to start, if torchrun has not")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models and windows, only to see that everything runs")
    parser.add_argument("--micro", type=int, nargs="+", help="samples per micro-batch")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="contenders with one of these in the name"
    )
    parser.add_argument("--limits", type=float, nargs="+", metavar="GIB", help="fsdp1b: memory limits to choose for")
    parser.add_argument("--seconds", type=float, default=200, help="start no further contender after these")
    parser.add_argument("--turns", type=int, default=1, help="gpt124, fsdp1b: how often to measure every contender")
    parser.add_argument("--rounds", type=int, default=200, help="mlp: turns")
    parser.add_argument("--profile", action="store_true", help="mlp: print a profile of TrainStep instead")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture instead of benchmarks/results")
    options = parser.parse_args()
    if options.device == "cpu" and options.workload != "mlp" and not options.tiny:
        parser.error(f"{options.workload} needs GPUs; with --tiny, it shows on CPU that it runs")
    sizes = {"gpt124": [4, 8], "fsdp1b": [2], "mlp": [8]}
    options.micro = options.micro or ([2, 4] if options.tiny else sizes[options.workload])
    return options


if __name__ == "__main__":
    main()
