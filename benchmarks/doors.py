"""One GPU, micro-batches of a given size: what every door makes of launch-bound micro-steps.

    python benchmarks/doors.py                        # GPT-2 124M, ResNet-18, a small ViT, an MLP
    python benchmarks/doors.py --work gpt124 --seconds 2 --only Accelerate captured
    python benchmarks/doors.py --tiny --device cpu    # tiny models, only to see that everything runs

Each contender runs the same windows with its own copy of the model; AdamW with learning rate 0. "given" contenders get
the micro-batch that the work prescribes, "free" ones may choose. The error is that of the gradient which the optimizer
gets in a window of two micro-batches, against the same micro-batches in float64 by plain PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Row, calls_per_round, error_text, grid, quartiles, recorded, save, seconds_each
from models import GPT, ResNet, TinyViT, gpt_124m, mlp
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.testing.reference import relative_error

Batch = tuple[Tensor, ...]


class Work(NamedTuple):
    """A model, a window of it, and how many samples a micro-batch is given."""

    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.device], Batch]
    window: int
    micro_batch: int
    free: tuple[int, ...]
    units_per_sample: int
    unit: str
    precision: str


def main() -> None:
    options = _options()
    if options.log:
        logging.basicConfig(format="%(relativeCreated)8.0f ms  %(message)s")
        logging.getLogger("macrobatch").setLevel(logging.INFO)
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    results: dict[str, Any] = {}
    name = f"doors-{device.type}{'-tiny' if options.tiny else ''}"
    known = (options.out or Path(__file__).parent / "results") / f"{name}.json"
    if known.exists() and not options.tiny:
        results |= json.loads(known.read_text(encoding="utf-8"))["results"]
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    for each in options.work:
        work = works(options.tiny)[each]
        results[each] = rows = []
        for row in measure(work, device, options):
            rows.append(row)
            print(f"{each}: {'  '.join(_cells(row))}", flush=True)
            panels = {f"{key}, {works(options.tiny)[key].unit}/s": _bars(found) for key, found in results.items()}
            # After each, in case the next one ends badly.
            save(name, {"settings": settings, "results": results}, options.out, title="One GPU", panels=panels)
        print(
            grid(each, ["", f"{work.unit}/s", "x", "GiB", "error vs fp64"], [_cells(row) for row in rows]), flush=True
        )


def _cells(row: Row) -> list[str]:
    if "problem" in row:
        return [row["name"], row["problem"][:60], "", "", ""]
    low, middle, high = row["rate"]
    beside = f"{row['beside']:.2f}" if "beside" in row else ""
    name = row["name"] + (f" ({row['chosen']})" if "chosen" in row else "")
    return [name, f"{middle:.0f} [{low:.0f}, {high:.0f}]", beside, f"{row['gib']:.2f}", f"{row['error']:.1e}"]


def _bars(rows: list[Row]) -> dict[str, Any]:
    return {row["name"]: row["rate"] for row in rows if "problem" not in row}


def works(tiny: bool) -> dict[str, Work]:
    def tokens(num: int, device: torch.device, *, length: int, vocabulary: int) -> Batch:
        return (torch.randint(0, vocabulary, (num, length + 1), device=device),)

    def images(num: int, device: torch.device) -> Batch:
        return torch.randn(num, 3, 32, 32, device=device), torch.randint(0, 10, (num,), device=device)

    if tiny:
        gpt = partial(GPT, 32, 2, 2, vocabulary=97, length=16)
        ids = partial(tokens, length=16, vocabulary=97)
        return {
            "gpt124": Work(gpt, ids, 8, 2, (4, 8), 16, "tokens", "bf16"),
            "resnet18": Work(partial(ResNet, (8, 16)), images, 8, 2, (8,), 1, "images", "fp32"),
            "vit": Work(partial(TinyViT, 16, 2, 1), images, 8, 2, (8,), 1, "images", "fp32"),
            "mlp": Work(partial(mlp, 16), images, 8, 2, (8,), 1, "images", "fp32"),
        }
    ids = partial(tokens, length=1024, vocabulary=50304)
    return {
        "gpt124": Work(gpt_124m, ids, 64, 2, (16, 64), 1024, "tokens", "bf16"),
        "resnet18": Work(partial(ResNet, (64, 128, 256, 512)), images, 256, 8, (256,), 1, "images", "fp32"),
        "vit": Work(partial(TinyViT, 128, 4, 6), images, 256, 8, (256,), 1, "images", "fp32"),
        "mlp": Work(partial(mlp, 512), images, 256, 8, (256,), 1, "images", "fp32"),
    }


def loss_of(model: Any, batch: Batch) -> Tensor:
    """A mean over the batch: GPT computes its own."""
    return model(*batch) if len(batch) == 1 else F.cross_entropy(model(batch[0]).float(), batch[1])


# --- contenders: each returns a function that runs one window of any number of micro-batches, and the optimizer ---

Made = tuple[Callable[[Batch], object], torch.optim.Optimizer]
Build = Callable[[nn.Module, torch.device], Made]


class Contender(NamedTuple):
    name: str
    size: int
    """Of its micro-batches; for "auto", of those that its error is measured on."""
    build: Build


def contenders(work: Work) -> Iterator[Contender]:
    """The most telling ones first: time may be short."""
    given = work.micro_batch
    captured = {"backend": "inductor", "mode": "reduce-overhead"}
    ours = "macrobatch.accelerate"
    yield Contender("hand loop", given, partial(hand, work, given))
    yield Contender("Accelerate", given, partial(accelerate, work, given, "accelerate", {}))
    yield Contender("Lightning Fabric", given, partial(fabric, work, given))
    yield Contender("macrobatch, accelerate door, captured", given, partial(accelerate, work, given, ours, captured))
    for capture in ("graph", "compile"):
        yield Contender(f"TrainStep, {capture}", given, partial(train_step, work, given, capture))
    yield Contender("hand loop, CUDA graph", given, partial(hand_graph, work, given))
    is_16_bit = work.precision == "bf16"
    if is_16_bit:
        yield Contender("TrainStep, compile, fused", given, partial(train_step, work, given, "compile", fused=True))
        for free in reversed(work.free):
            fused = partial(train_step, work, free, "compile", fused=True)
            yield Contender(f"TrainStep, compile, fused, free: {free}", free, fused)
    for free in reversed(work.free):
        for capture in ("compile", "graph"):
            yield Contender(f"TrainStep, {capture}, free: {free}", free, partial(train_step, work, free, capture))
    yield Contender("TrainStep, auto, free: auto", work.free[0], partial(train_step, work, "auto", "auto"))
    yield Contender("macrobatch, accelerate door", given, partial(accelerate, work, given, ours, {}))
    yield Contender("TrainStep", given, partial(train_step, work, given, None))
    yield Contender("hand loop, compiled", given, partial(hand, work, given, is_compiled=True))
    for free in work.free:
        yield Contender(f"hand loop, free: {free}", free, partial(hand, work, free))
        yield Contender(f"hand loop, compiled, free: {free}", free, partial(hand, work, free, is_compiled=True))
    yield Contender(
        "Accelerate, inductor", given, partial(accelerate, work, given, "accelerate", {"backend": "inductor"})
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def cut(batch: Batch, size: int) -> list[Batch]:
    return list(zip(*(tensor.split(size) for tensor in batch), strict=True))


def hand(work: Work, size: int, model: nn.Module, device: torch.device, *, is_compiled: bool = False) -> Made:
    optimizer = adamw(model)
    forward = torch.compile(model, dynamic=False) if is_compiled else model

    def run(batch: Batch) -> None:
        parts = cut(batch, size)
        for part in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = loss_of(forward, part) / len(parts)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run, optimizer


def hand_graph(work: Work, size: int, model: nn.Module, device: torch.device) -> Made:
    """The micro-step as one CUDA graph that adds to gradients which stay where they are."""
    optimizer = adamw(model)
    params = list(model.parameters())
    for param in params:
        param.grad = torch.zeros_like(param)
    static = work.batch(size, device)
    num_parts = torch.ones((), device=device)

    def micro_step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=work.precision == "bf16", cache_enabled=False):
            loss = loss_of(model, static) / num_parts
        loss.backward()

    graph = recorded(micro_step)
    optimizer.zero_grad(set_to_none=False)

    def run(batch: Batch) -> None:
        parts = cut(batch, size)
        num_parts.fill_(len(parts))
        for part in parts:
            for kept, given in zip(static, part, strict=True):
                kept.copy_(given)
            graph.replay()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return run, optimizer


def accelerate(
    work: Work, size: int, package: str, dynamo: dict[str, str], model: nn.Module, device: torch.device
) -> Made:
    door = importlib.import_module(package)
    state = importlib.import_module(f"{package}.state")
    for kind in (state.AcceleratorState, state.PartialState, state.GradientState):
        kind._reset_state()
    plugin = importlib.import_module(f"{package}.utils").TorchDynamoPlugin(**dynamo) if dynamo else None
    accelerator = door.Accelerator(
        gradient_accumulation_steps=work.window // size,
        mixed_precision="bf16" if work.precision == "bf16" else "no",
        cpu=device.type == "cpu",
        dynamo_plugin=plugin,
    )
    bare = adamw(model)
    prepared, optimizer = accelerator.prepare(model, bare)

    def run(batch: Batch) -> None:
        parts = cut(batch, size)
        accelerator.gradient_accumulation_steps = len(parts)
        for part in parts:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, part))
                optimizer.step()
                optimizer.zero_grad()

    return run, bare


def fabric(work: Work, size: int, model: nn.Module, device: torch.device) -> Made:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning.fabric import Fabric

        precision = "bf16-mixed" if work.precision == "bf16" else "32-true"
        runner = Fabric(accelerator=device.type, devices=1, precision=precision)
        bare = adamw(model)
        prepared, optimizer = runner.setup(model, bare)

    def run(batch: Batch) -> None:
        parts = cut(batch, size)
        for index, part in enumerate(parts):
            with runner.no_backward_sync(prepared, enabled=index < len(parts) - 1):
                runner.backward(loss_of(prepared, part) / len(parts))
        optimizer.step()
        optimizer.zero_grad()

    return run, bare


def train_step(
    work: Work, size: Any, capture: Any, model: nn.Module, device: torch.device, *, fused: bool = False
) -> Made:
    optimizer = adamw(model)
    options: dict[str, Any] = {"precision": work.precision, "capture": capture, "fused_linear": fused}
    step = mb.TrainStep(model, optimizer, loss_of, micro_batch=size, nonfinite="ignore", **options)
    return step, optimizer


# --- measuring ---


def measure(work: Work, device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    torch.manual_seed(0)
    with device:
        model = work.make()
    batch = work.batch(work.window, device)
    references: dict[int, tuple[Batch, dict[str, Tensor | None]]] = {}
    base: float | None = None
    began_s = time.monotonic()
    for contender in contenders(work):
        if options.only and not any(word in contender.name for word in options.only):
            continue
        if time.monotonic() - began_s > options.budget:
            yield {"name": contender.name, "problem": "not run: out of time"}
            continue
        try:
            if contender.size not in references:
                few = work.batch(2 * contender.size, device)
                references[contender.size] = few, fp64_gradient(model, loss_of, cut(few, contender.size))
            row = _timed(contender, copy.deepcopy(model), batch, *references[contender.size], work, options.seconds)
            base = base or row["rate"][1]
            yield {**row, "beside": row["rate"][1] / base}
        except Exception as error:  # a contender that fails is a result, too
            yield {"name": contender.name, "problem": error_text(error)}
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def fp64_gradient(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], parts: list[Any]
) -> dict[str, Tensor | None]:
    """The mean gradient of equal micro-batches in float64, by plain PyTorch, a few samples at a time."""
    model = copy.deepcopy(model).double()
    for part in parts:
        tensors = part if isinstance(part, tuple) else (part,)
        num = len(tensors[0])
        has_statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        for few in zip(*(tensor.split(num if has_statistics else 4) for tensor in tensors), strict=True):
            wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in few)
            loss = loss_fn(model, wide if isinstance(part, tuple) else wide[0])
            (loss * (len(few[0]) / num / len(parts))).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def gradient(run: Callable[[], object], optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor | None]:
    """What the optimizer gets in a window."""
    seen: dict[str, Tensor | None] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        found = (None if param.grad is None else param.grad.detach().clone() for param in params)
        seen.update(zip(names, found, strict=True))

    handle = optimizer.register_step_pre_hook(note)
    run()
    handle.remove()
    return seen


def _timed(
    contender: Contender,
    model: nn.Module,
    batch: Batch,
    few: Batch,
    reference: dict[str, Tensor | None],
    work: Work,
    timed_s: float,
) -> Row:
    device = batch[0].device
    is_cuda = device.type == "cuda"
    names = [name for name, _ in model.named_parameters()]
    began = time.perf_counter()
    run, optimizer = contender.build(model, device)
    run(batch)
    error = float("nan")
    for _ in range(2):  # what is captured has been recorded after these
        error = relative_error(gradient(partial(run, few), optimizer, names), reference)
    for _ in range(8):  # what is recorded and verified is trusted after these
        run(batch)
    start_s = time.perf_counter() - began
    window = partial(run, batch)
    num_calls = calls_per_round(seconds_each(window, 1))
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < timed_s or len(times) < 4:
        times.append(seconds_each(window, num_calls))
    units = work.window * work.units_per_sample
    split: Any = getattr(run, "split", None)
    survey = getattr(split, "survey", None)
    return {
        "name": contender.name,
        "micro_batch": contender.size,
        **(
            {} if survey is None else {"chosen": f"{split.size}: {survey.reason}", "trials": survey.as_dict()["trials"]}
        ),
        "rate": quartiles([units / t for t in times]),
        "num_timed": len(times),
        "windows_at_once": num_calls,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0,
        "start_s": round(start_s, 1),
        "error": error,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", nargs="+", default=["gpt124", "resnet18", "vit", "mlp"])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contenders with one of these words")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per contender")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which a work starts no contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="tiny models and windows, only to see that everything runs")
    parser.add_argument("--log", action="store_true", help="show what the library says: sizes chosen, what ran eagerly")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture instead of benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
