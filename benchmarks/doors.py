"""One GPU, micro-batches of a given size: what every door makes of launch-bound micro-steps.

    python benchmarks/doors.py                        # GPT-2 124M, ResNet-18, a small ViT, an MLP
    python benchmarks/doors.py --work gpt124 --rounds 5
    python benchmarks/doors.py --tiny --device cpu    # tiny models, only to see that everything runs

Each contender runs the same windows with its own copy of the model; AdamW with learning rate 0. The norm of its
gradient is compared with the hand loop's; the error is that of a small window's gradient against float64.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import grid, quartiles, save
from models import GPT, gpt_124m
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error


class Work(NamedTuple):
    """A model, a window of it, and how many samples a micro-batch is given."""

    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.device], tuple[Tensor, ...]]
    window: int
    micro_batch: int
    free: int
    units_per_sample: int
    unit: str
    precision: str


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    results: dict[str, Any] = {}
    known = (options.out or Path(__file__).parent / "results") / f"doors-{device.type}.json"
    if known.exists() and not options.tiny:
        results |= json.loads(known.read_text(encoding="utf-8"))["results"]
    for name in options.work:
        results[name] = measure(works(options.tiny)[name], device, options)
        rows = [
            [row["name"], row.get("problem") or f"{row['rate'][1]:.0f} [{row['rate'][0]:.0f}, {row['rate'][2]:.0f}]"]
            + ([] if "problem" in row else [f"{row['gib']:.2f}", f"{row['norm_error']:.0e}", f"{row['error']:.1e}"])
            for row in results[name]
        ]
        rows = [[*row, *[""] * (5 - len(row))] for row in rows]
        unit = works(options.tiny)[name].unit
        print(grid(name, ["", f"{unit}/s", "GiB", "norm vs hand", "error vs fp64"], rows), flush=True)
        save(f"doors-{device.type}", {"results": results}, options.out)  # after each, in case the next one ends badly


def works(tiny: bool) -> dict[str, Work]:
    def tokens(num: int, device: torch.device, *, length: int, vocabulary: int) -> tuple[Tensor, ...]:
        return (torch.randint(0, vocabulary, (num, length + 1), device=device),)

    def images(num: int, device: torch.device) -> tuple[Tensor, ...]:
        return torch.randn(num, 3, 32, 32, device=device), torch.randint(0, 10, (num,), device=device)

    if tiny:
        gpt = partial(GPT, 32, 2, 2, vocabulary=97, length=16)
        ids = partial(tokens, length=16, vocabulary=97)
        return {
            "gpt124": Work(gpt, ids, 8, 2, 4, 16, "tokens", "bf16"),
            "resnet18": Work(partial(ResNet, (8, 16)), images, 8, 2, 8, 1, "images", "fp32"),
            "vit": Work(partial(ViT, 16, 1), images, 8, 2, 8, 1, "images", "fp32"),
            "mlp": Work(partial(mlp, 16), images, 8, 2, 8, 1, "images", "fp32"),
        }
    ids = partial(tokens, length=1024, vocabulary=50304)
    return {
        "gpt124": Work(gpt_124m, ids, 64, 2, 16, 1024, "tokens", "bf16"),
        "resnet18": Work(partial(ResNet, (64, 128, 256, 512)), images, 256, 8, 256, 1, "images", "fp32"),
        "vit": Work(partial(ViT, 192, 6), images, 256, 8, 256, 1, "images", "fp32"),
        "mlp": Work(partial(mlp, 512), images, 256, 8, 256, 1, "images", "fp32"),
    }


def loss_of(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """A mean over the batch: GPT computes its own."""
    return model(*batch) if len(batch) == 1 else F.cross_entropy(model(batch[0]).float(), batch[1])


# --- contenders: each returns a function that runs one window, and the model ---

Made = tuple[Callable[[], object], nn.Module]


def contenders(work: Work) -> Iterator[tuple[str, Callable[[nn.Module, tuple[Tensor, ...]], Made]]]:
    given = work.micro_batch
    yield "hand loop", partial(hand, work, given)
    yield "Accelerate", partial(accelerate, work, given, "accelerate", {})
    yield "Accelerate, inductor", partial(accelerate, work, given, "accelerate", {"backend": "inductor"})
    yield "Lightning Fabric", partial(fabric, work, given)
    yield "accelerate door", partial(accelerate, work, given, "macrobatch.accelerate", {})
    captured = {"backend": "inductor", "mode": "reduce-overhead"}
    yield "accelerate door, captured", partial(accelerate, work, given, "macrobatch.accelerate", captured)
    yield "TrainStep", partial(train_step, work, given, None)
    yield "TrainStep, captured", partial(train_step, work, given, "compile")
    yield f"TrainStep, captured, {work.free} a micro-batch", partial(train_step, work, work.free, "compile")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def cut(batch: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(size) for tensor in batch), strict=True))


def hand(work: Work, size: int, model: nn.Module, batch: tuple[Tensor, ...]) -> Made:
    optimizer, parts = adamw(model), cut(batch, size)

    def update() -> None:
        optimizer.zero_grad()
        for part in parts:
            with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = loss_of(model, part) / len(parts)
            loss.backward()
        optimizer.step()

    return update, model


def accelerate(
    work: Work, size: int, package: str, dynamo: dict[str, str], model: nn.Module, batch: tuple[Tensor, ...]
) -> Made:
    door = importlib.import_module(package)
    state = importlib.import_module(f"{package}.state")
    for kind in (state.AcceleratorState, state.PartialState, state.GradientState):
        kind._reset_state()
    plugin = importlib.import_module(f"{package}.utils").TorchDynamoPlugin(**dynamo) if dynamo else None
    parts = cut(batch, size)
    accelerator = door.Accelerator(
        gradient_accumulation_steps=len(parts),
        mixed_precision="bf16" if work.precision == "bf16" else "no",
        cpu=batch[0].device.type == "cpu",
        dynamo_plugin=plugin,
    )
    prepared, optimizer = accelerator.prepare(model, adamw(model))

    def update() -> None:
        for part in parts:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, part))
                optimizer.step()
                if package == "accelerate":
                    optimizer.zero_grad()

    return update, model


def fabric(work: Work, size: int, model: nn.Module, batch: tuple[Tensor, ...]) -> Made:
    from lightning.fabric import Fabric

    precision = "bf16-mixed" if work.precision == "bf16" else "32-true"
    runner = Fabric(accelerator=batch[0].device.type, devices=1, precision=precision)
    prepared, optimizer = runner.setup(model, adamw(model))
    parts = cut(batch, size)

    def update() -> None:
        optimizer.zero_grad()
        for index, part in enumerate(parts):
            with runner.no_backward_sync(prepared, enabled=index < len(parts) - 1):
                runner.backward(loss_of(prepared, part) / len(parts))
        optimizer.step()

    return update, model


def train_step(work: Work, size: int, capture: str | None, model: nn.Module, batch: tuple[Tensor, ...]) -> Made:
    step = mb.TrainStep(
        model, adamw(model), loss_of, micro_batch=size, precision=work.precision, capture=capture, nonfinite="ignore"
    )
    return lambda: step(batch), model


# --- measuring ---


def measure(work: Work, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    with device:
        model = work.make()
    batch = work.batch(work.window, device)
    rows: list[dict[str, Any]] = []
    wanted = [(n, b) for n, b in contenders(work) if not options.only or any(word in n for word in options.only)]
    for name, build in wanted:
        try:
            row = _timed(name, build, model, batch, work, options.seconds)
        except Exception as error:  # a contender that fails is a result, too
            row = {"name": name, "problem": f"{type(error).__name__}: {str(error)[:60]}"}
        rows.append(row)
        if "norm" in row and "norm" in rows[0]:
            row["norm_error"] = abs(row["norm"] / rows[0]["norm"] - 1)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _timed(
    name: str, build: Any, model: nn.Module, batch: tuple[Tensor, ...], work: Work, seconds: float
) -> dict[str, Any]:
    is_cuda = batch[0].device.type == "cuda"
    update, own = build(copy.deepcopy(model), batch)
    for _ in range(3):
        update()
    squares = [float(p.grad.double().square().sum()) for p in own.parameters() if p.grad is not None]
    norm = math.sqrt(sum(squares)) if squares else math.nan  # cleared by the contender itself
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < 4:
        if is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        update()
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    units = work.window * work.units_per_sample
    gib = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
    error = _error(build, work, batch[0].device)
    return {"name": name, "rate": quartiles([units / t for t in times]), "gib": gib, "norm": norm, "error": error}


def _error(build: Any, work: Work, device: torch.device) -> float:
    """Of a window of a few samples, against float64."""
    torch.manual_seed(1)
    with device:
        small = GPT(64, 2, 2, vocabulary=97, length=16) if work.unit == "tokens" else work.make()
    num = work.micro_batch * 2
    if work.unit == "tokens":
        batch: tuple[Tensor, ...] = (torch.randint(0, 97, (num, 17), device=device),)
    else:
        batch = work.batch(num, device)
    reference = full_batch_gradient(small, loss_of, batch)
    update, own = build(small, batch)
    update()
    grads = gradients_of(own)
    if all(gradient is None for gradient in grads.values()):
        return math.nan
    return relative_error(grads, reference)


# --- models ---


class Residual(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False),
            nn.GroupNorm(8, num_out),
            nn.ReLU(),
            nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False),
            nn.GroupNorm(8, num_out),
        )
        same = stride == 1 and num_in == num_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """ResNet-18's blocks with group normalisation, which does not couple samples."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1), nn.ReLU()]
        before = widths[0]
        for width in widths:
            layers += [Residual(before, width, 1 if width == widths[0] else 2), Residual(width, width, 1)]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class ViT(nn.Module):
    """A small vision transformer on 4 x 4 patches."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2) + self.position).mean(1))


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", nargs="+", default=["gpt124", "resnet18", "vit", "mlp"])
    parser.add_argument("--only", nargs="+", help="contenders with one of these words")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per contender")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON instead of benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
