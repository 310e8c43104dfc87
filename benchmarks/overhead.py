"""What a step costs beyond its forwards and backwards: a tiny MLP, windows of 8, one CPU thread.

    python benchmarks/overhead.py [--rounds 200] [--device cuda] [--profile]

The work per micro-step is so small that little else than overhead is left to see. The hand loop is the shortest one
that is right for equal micro-batches; it neither checks nor reports anything. The error is that of the first window's
gradient, as the optimizer gets it, against float64.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import importlib
import pstats
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import attempted, paired, save, table
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import macrobatch as mb
from macrobatch.testing.reference import full_batch_gradient, relative_error

NUM_MICRO_BATCHES = 8
ROWS = 8


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).to(device)
    x_BC = torch.randn(NUM_MICRO_BATCHES * ROWS, 16, device=device)
    y_B = torch.randint(0, 4, (NUM_MICRO_BATCHES * ROWS,), device=device)
    builds: dict[str, Callable[[], Callable[[], object]]] = {
        "hand loop": lambda: hand_loop(copy.deepcopy(model), x_BC, y_B),
        "hand loop, clip and loss": lambda: hand_loop(copy.deepcopy(model), x_BC, y_B, clip_norm=1e9),
        "TrainStep": lambda: train_step(copy.deepcopy(model), x_BC, y_B, {}),
        "TrainStep, clip_norm": lambda: train_step(copy.deepcopy(model), x_BC, y_B, {"clip_norm": 1e9}),
        "TrainStep, nonfinite=ignore": lambda: train_step(copy.deepcopy(model), x_BC, y_B, {"nonfinite": "ignore"}),
        "macrobatch.accelerate": lambda: accelerate(copy.deepcopy(model), x_BC, y_B, "macrobatch.accelerate"),
        "macrobatch.colossalai": lambda: colossalai(copy.deepcopy(model), x_BC, y_B),
        "Accelerate": lambda: accelerate(copy.deepcopy(model), x_BC, y_B, "accelerate"),
        "Lightning Fabric": lambda: fabric(copy.deepcopy(model), x_BC, y_B),
    }
    made = {name: attempted(build) for name, build in builds.items()}
    contenders = {name: update for name, update in made.items() if not isinstance(update, str)}
    for name, problem in made.items():
        if isinstance(problem, str):
            print(f"{name}: {problem}")
    if options.profile:
        profile(contenders["TrainStep"])
        return
    exact = full_batch_gradient(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), (x_BC, y_B))
    errors = {name: gradient_error(update, exact) for name, update in contenders.items()}
    rows = paired(contenders, rounds=options.rounds, calls=20, unit_per_call=NUM_MICRO_BATCHES)
    for row in rows:
        row["error"] = errors[row["name"]]
    print(table(f"tiny MLP, 8 micro-batches of 8, on {options.device}, one CPU thread", rows))
    print("written to", save(f"overhead-{options.device}", {"rounds": options.rounds, "rows": rows}, options.out))


def gradient_error(update: Callable[[], object], exact: Mapping[str, Tensor | None]) -> float:
    """Relative error of the gradient that the optimizer gets from `update`."""
    seen: dict[str, Tensor | None] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        seen.update({name: param.grad.clone() for name, param in zip(exact, params, strict=True)})

    handle = register_optimizer_step_pre_hook(note)
    try:
        update()
    finally:
        handle.remove()
    return relative_error(seen, exact)


def hand_loop(
    model: nn.Module, x_BC: torch.Tensor, y_B: torch.Tensor, *, clip_norm: float | None = None
) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def update() -> float:
        total = torch.zeros((), device=x_BC.device)
        for x, y in zip(x_BC.split(ROWS), y_B.split(ROWS), strict=True):
            loss = F.cross_entropy(model(x), y) / NUM_MICRO_BATCHES
            loss.backward()
            if clip_norm is not None:
                total += loss.detach()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        return 0.0 if clip_norm is None else total.item()

    return update


def train_step(model: nn.Module, x_BC: torch.Tensor, y_B: torch.Tensor, options: dict) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = mb.TrainStep(
        model, optimizer, lambda model, b: F.cross_entropy(model(b[0]), b[1]), micro_batch=ROWS, **options
    )
    return lambda: step((x_BC, y_B))


def accelerate(model: nn.Module, x_BC: torch.Tensor, y_B: torch.Tensor, package: str) -> Callable[[], object]:
    accelerator = importlib.import_module(package).Accelerator(
        gradient_accumulation_steps=NUM_MICRO_BATCHES, cpu=x_BC.device.type == "cpu"
    )
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))

    def update() -> None:
        for x, y in zip(x_BC.split(ROWS), y_B.split(ROWS), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    return update


def colossalai(model: nn.Module, x_BC: torch.Tensor, y_B: torch.Tensor) -> Callable[[], object]:
    from macrobatch.colossalai import core, initialize

    core.global_context.load_config({"gradient_accumulation": NUM_MICRO_BATCHES})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = initialize(model, optimizer, nn.CrossEntropyLoss(), verbose=False)

    def update() -> None:
        for x, y in zip(x_BC.split(ROWS), y_B.split(ROWS), strict=True):
            engine.zero_grad()
            engine.backward(engine.criterion(engine(x), y))
            engine.step()

    return update


def fabric(model: nn.Module, x_BC: torch.Tensor, y_B: torch.Tensor) -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator=x_BC.device.type, devices=1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))

    def update() -> None:
        for i, (x, y) in enumerate(zip(x_BC.split(ROWS), y_B.split(ROWS), strict=True)):
            with fabric.no_backward_sync(model, enabled=i < NUM_MICRO_BATCHES - 1):
                fabric.backward(F.cross_entropy(model(x), y) / NUM_MICRO_BATCHES)
        optimizer.step()
        optimizer.zero_grad()

    return update


def profile(update: Callable[[], object]) -> None:
    """Where the time of `TrainStep` goes, by Python function."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(500):
        update()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true", help="print a profile of TrainStep instead")
    parser.add_argument("--out", type=Path, help="folder for the JSON instead of benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
