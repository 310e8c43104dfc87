"""Weights in bf16: what a gradient buffer in fp32 costs beside one in bf16, and what each is off by.

    python benchmarks/wgrad.py                        # GPT-2 124M, micro-batches of 1 sequence, windows of 32
    python benchmarks/wgrad.py --micro 1 8 --only graph
    python benchmarks/wgrad.py --tiny --device cpu    # tiny, and eager only, to see that everything runs

By hand: gradients added in bf16; added to fp32 in a pass of their own; added by the matrix product itself. macrobatch:
the same by `TrainStep`, without and with `fused_linear`. Eager, and as one CUDA graph per micro-step, since kernels are
what is compared. All step SGD with learning rate 0. A ratio is between times of the same turn.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from doors import fp64_gradient
from harness import Row, attempted, grid, in_turns, recorded, save
from models import GPT, LENGTH, VOCABULARY, gpt_124m
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.testing.reference import relative_error

Run = Callable[[Tensor], object]
Gradients = Callable[[], dict[str, Tensor | None]]
Made = tuple[Run, Gradients]


def loss_of(model: Any, ids_BT: Tensor) -> Tensor:
    return model(ids_BT)


# --- by hand ---


def by_hand(kind: str, is_captured: bool, size: int, model: nn.Module) -> Made:
    """`kind`: "bf16", "fp32, separate add" or "fp32, in the product"."""
    params = dict(model.named_parameters())
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    sums = {name: torch.zeros_like(param, dtype=dtype) for name, param in params.items()}
    if kind == "bf16":
        for name, param in params.items():
            param.grad = sums[name]
    else:
        for name, param in params.items():
            param.register_post_accumulate_grad_hook(partial(_add_to, sums[name]))
    if kind == "fp32, in the product":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(_linear, module, sums[f"{name}.weight"])  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=True)
    step = _graphed(model, sums, size) if is_captured else _eager_step(model)

    def run(ids_BT: Tensor) -> None:
        torch._foreach_zero_(list(sums.values()))  # pyright: ignore[reportPrivateImportUsage]
        parts = ids_BT.split(size)
        for part in parts:
            step(part)
        if kind != "bf16":
            for name, param in params.items():
                param.grad = sums[name].to(torch.bfloat16)
        optimizer.step()
        if kind != "bf16":
            optimizer.zero_grad()
        run.num = len(parts)  # pyright: ignore[reportFunctionMemberAccess]

    return run, lambda: {name: total.float() / run.num for name, total in sums.items()}  # pyright: ignore[reportFunctionMemberAccess]


def _add_to(total: Tensor, param: Tensor) -> None:
    if param.grad is not None:
        total.add_(param.grad)
        param.grad = None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.has_bias = total, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad_NO, x_NI = grad.flatten(0, -2), x.flatten(0, -2)
        if grad.is_cuda:
            torch.addmm(ctx.total, grad_NO.t(), x_NI, out_dtype=torch.float32, out=ctx.total)
        else:
            ctx.total.addmm_(grad_NO.t().float(), x_NI.float())
        return grad @ weight, None, grad_NO.sum(0) if ctx.has_bias else None, None


def _linear(module: nn.Linear, total: Tensor, x: Tensor) -> Any:
    return _Linear.apply(x, module.weight, module.bias, total)


def _eager_step(model: nn.Module) -> Callable[[Tensor], object]:
    return lambda ids_BT: loss_of(model, ids_BT).backward()


def _graphed(model: nn.Module, sums: dict[str, Tensor], size: int) -> Callable[[Tensor], object]:
    static_BT = torch.zeros(size, _length(model) + 1, dtype=torch.int64, device=next(iter(sums.values())).device)
    graph = recorded(lambda: loss_of(model, static_BT).backward())

    def step(ids_BT: Tensor) -> None:
        static_BT.copy_(ids_BT)
        graph.replay()

    return step


def _length(model: Any) -> int:
    return model.position.num_embeddings


# --- macrobatch ---


def train_step(capture: str | None, fused: bool, size: int, model: nn.Module) -> Made:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=True)
    settings: dict[str, Any] = {"capture": capture, "fused_linear": fused, "nonfinite": "ignore"}
    step = mb.TrainStep(model, optimizer, loss_of, micro_batch=size, sync="local", **settings)
    return step, lambda: {name: param.grad for name, param in model.named_parameters()}


def contenders(options: argparse.Namespace, size: int) -> Iterator[tuple[str, Callable[[nn.Module], Made]]]:
    """What the others' time is divided by comes first of those that run in the same way."""
    for way in options.ways:
        kinds = {"bf16 buffer": "bf16", "fp32 buffer, separate add": "fp32, separate add"}
        kinds["fp32 buffer, in the product"] = "fp32, in the product"
        if way in ("eager", "graph"):
            for name, kind in kinds.items():
                yield f"{way}: by hand, {name}", partial(by_hand, kind, way == "graph", size)
        capture = None if way == "eager" else way
        yield f"{way}: macrobatch, fp32 buffer", partial(train_step, capture, False, size)
        yield f"{way}: macrobatch, fused_linear", partial(train_step, capture, True, size)


# --- measuring ---


def measure(options: argparse.Namespace, size: int, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    with device:
        model = GPT(64, 2, 2, vocabulary=97, length=16) if options.tiny else gpt_124m()
    model = model.to(torch.bfloat16)
    vocabulary, length = (97, 16) if options.tiny else (VOCABULARY, LENGTH)
    ids_BT = torch.randint(vocabulary, (options.window, length + 1), device=device)
    few_BT = ids_BT[: min(8 * size, len(ids_BT))]
    exact = fp64_gradient(model, loss_of, [few_BT[at : at + 1] for at in range(len(few_BT))])
    rows: list[Row] = []
    for way in options.ways:
        named = [(n, build) for n, build in contenders(options, size) if n.startswith(f"{way}:")]
        named = [(n, build) for n, build in named if not options.only or any(word in n for word in options.only)]
        ready: dict[str, Callable[[], object]] = {}
        off: dict[str, float] = {}
        for name, build in named:
            made = attempted(partial(_prepared, build, copy.deepcopy(model), few_BT, exact))
            if isinstance(made, str):
                rows.append({"name": name, "micro_batch": size, "problem": made})
            else:
                run, off[name] = made
                ready[name] = partial(run, ids_BT)
        if ready:
            for row in in_turns(ready, seconds=options.seconds * len(ready)):
                tokens = [options.window * length / s for s in reversed(row["s"])]
                rows.append({**row, "micro_batch": size, "error": off[row["name"]], "tokens_per_s": tokens})
        ready.clear()
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _prepared(build: Callable[[nn.Module], Made], model: nn.Module, few_BT: Tensor, exact: Any) -> Any:
    """A contender that is warm, and what its gradient is off by."""
    run, gradients = build(model)
    for _ in range(3):  # a capture warms up, records and replays
        run(few_BT)
    return run, relative_error(gradients(), exact)


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    rows: list[Row] = []
    panels: dict[str, dict[str, Any]] = {}
    name = f"wgrad-{options.device}{'-tiny' if options.tiny else ''}"
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    for size in options.micro:
        rows += measure(options, size, device)
        done = [row for row in rows if "problem" not in row and row["micro_batch"] == size]
        panels[f"time, bf16 buffer = 1; micro-batch {size}"] = {row["name"]: row["ratio"] for row in done}
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        title = f"GPT-2 in bf16, windows of {options.window} sequences, {hardware}"
        save(name, {"settings": settings, "rows": rows}, options.out, title=title, panels=panels)
    cells = [[row["name"], str(row["micro_batch"]), *_cells(row)] for row in rows]
    print(grid("bf16 weights", ["", "micro-batch", "x bf16 buffer", "ms per window", "error vs fp64"], cells))


def _cells(row: Row) -> list[str]:
    if "problem" in row:
        return [row["problem"], "", ""]
    low, middle, high = row["ratio"]
    return [f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{row['s'][1] * 1e3:.1f}", f"{row['error']:.1e}"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, only to see that everything runs")
    parser.add_argument("--micro", type=int, nargs="+", default=[1], help="sequences per micro-batch")
    parser.add_argument("--window", type=int, help="sequences per window")
    parser.add_argument("--ways", nargs="+", default=None, help="of eager, graph, compile")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contenders with one of these words")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per contender")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture instead of benchmarks/results")
    options = parser.parse_args()
    options.window = options.window or (8 if options.tiny else 32)
    options.ways = options.ways or (["eager"] if options.device == "cpu" else ["graph", "eager"])
    return options


if __name__ == "__main__":
    main()
