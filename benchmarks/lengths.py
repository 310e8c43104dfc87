"""Samples of different lengths on one device: real tokens per second, padded in order of arrival, planned, packed.

    python benchmarks/lengths.py                        # GPT-2 124M, a window of 512 samples, bf16
    python benchmarks/lengths.py --compile              # with a compiled contender, too
    python benchmarks/lengths.py --tiny --device cpu    # tiny models and windows, only to see that everything runs

Lengths are log-normal (mean of the logarithm 5.2, sigma 0.9), clipped to 16 ... 1024. All contenders run the same
samples of one window with the same model and optimizer (fused AdamW, learning rate 0), in turns; micro-batches are made
and on the device beforehand. Tokens that are padding do not count. Each contender's gradient on a few short samples, in
several micro-batches, is compared with that of the samples one by one in float64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Row, attempted, grid, paired, save
from models import GPT, LENGTH, VOCABULARY, Block, gpt_124m, gpt_tiny
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from windows import Running, adamw

import macrobatch as mb
from macrobatch import tree
from macrobatch.plan.lengths import LengthCost
from macrobatch.plan.pack import TokenBudget
from macrobatch.plan.varlen import Packer, packed_attention
from macrobatch.testing.reference import gradients_of, relative_error

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all contenders have in common."""

    options: argparse.Namespace
    device: torch.device
    cost: LengthCost
    rows: int
    max_tokens: int

    def model(self) -> GPT:
        torch.manual_seed(0)
        with self.device:
            return gpt_tiny() if self.options.tiny else gpt_124m()

    def samples(self, lengths: np.ndarray) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        vocabulary = 97 if self.options.tiny else VOCABULARY
        return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths.tolist()]

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def on_device(self, micro_batches: list[Any]) -> list[Any]:
        return [tree.to_device(micro_batch, self.device) for micro_batch in micro_batches]


# The model, on padded rows and on a packed one.


def mixed(block: Block, x_BTC: Tensor, batch: Any) -> Tensor:
    """A block of `models.GPT`, of which the attention stays within the samples of a packed row."""
    if "cu_seqlens" not in batch:
        return block(x_BTC)
    q, k, v = (part[0].unflatten(-1, (block.num_heads, -1)) for part in block.qkv(block.norm1(x_BTC)).chunk(3, dim=-1))
    mixed_TC = packed_attention(q, k, v, batch["cu_seqlens"], batch["max_seqlen"]).flatten(1)
    x_BTC = x_BTC + block.out(mixed_TC[None])
    return x_BTC + block.down(F.gelu(block.up(block.norm2(x_BTC))))


def loss_of(model: Any, batch: Any) -> mb.Loss:
    x_BTC = model.embed(batch["input_ids"]) + model.position(batch["position_ids"])
    for block in model.blocks:
        x_BTC = mixed(block, x_BTC, batch)
    return mb.cross_entropy(model.head(model.norm(x_BTC)), batch["targets"], ignore_index=IGNORED)


def padded(samples: list[Tensor]) -> dict[str, Any]:
    """Rows as long as the longest; a causal model sees no padding before the end of a sample."""
    ids_BT = pad_sequence(samples, batch_first=True)
    labels_BT = pad_sequence(samples, batch_first=True, padding_value=IGNORED)
    positions_T = torch.arange(ids_BT.shape[1])
    return {
        "input_ids": ids_BT,
        "position_ids": positions_T.expand(len(ids_BT), -1),
        "targets": F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED),
    }


def packed(samples: list[Tensor]) -> dict[str, Any]:
    batch = Packer(ignore_index=IGNORED)(samples)
    return batch | {"targets": F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)}


# Contenders. Each is built for a window of samples, and runs it.


def in_arrival_order(job: Job, samples: list[Tensor]) -> list[Any]:
    num = job.rows
    return job.on_device([padded(samples[at : at + num]) for at in range(0, len(samples), num)])


def by_hand(job: Job, samples: list[Tensor]) -> Running:
    """In order of arrival, padded; the sum of the losses over the tokens of the window."""
    model, micro_batches = job.model(), in_arrival_order(job, samples)
    optimizer = adamw(model)
    num_tokens = sum(len(sample) - 1 for sample in samples)

    def update() -> None:
        for micro_batch in micro_batches:
            with job.autocast():
                loss = loss_of(model, micro_batch).total / num_tokens
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Running(update, optimizer)


def accelerate(job: Job, samples: list[Tensor]) -> Running:
    """In order of arrival, padded; the mean loss of each micro-batch, as most scripts have it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    micro_batches = in_arrival_order(job, samples)
    accelerator = Accelerator(
        gradient_accumulation_steps=len(micro_batches),
        mixed_precision="bf16" if job.options.precision == "bf16" else "no",
        cpu=job.device.type == "cpu",
    )
    model = job.model()
    optimizer = adamw(model)
    forward, prepared = accelerator.prepare(model, optimizer)

    def update() -> None:
        for micro_batch in micro_batches:
            with accelerator.accumulate(forward):
                with accelerator.autocast():
                    loss = loss_of(forward, micro_batch).mean
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()

    return Running(update, optimizer)


def macrobatch(job: Job, samples: list[Tensor], *, layout: str, is_compiled: bool = False) -> Running:
    """Planned under the cap on tokens."""
    budget = TokenBudget(job.max_tokens, layout=layout, cost=job.cost)
    packing = budget.pack([len(sample) for sample in samples])
    collate = packed if layout == "packed" else padded
    micro_batches = job.on_device([collate([samples[at] for at in part]) for part in packing.of(0)])
    model = job.model()
    optimizer = adamw(model)
    loss_fn = torch.compile(loss_of, dynamic=True) if is_compiled else loss_of
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=1, precision=job.options.precision, sync="local")
    notes = partial(dict, num_slots=packing.num_slots, num_micro_batches=len(micro_batches))
    return Running(lambda: step.window(micro_batches), optimizer, notes)


def contenders(options: argparse.Namespace) -> dict[str, Callable[[Job, list[Tensor]], Running]]:
    """What the others' speed is divided by comes first."""
    named: dict[str, Callable[[Job, list[Tensor]], Running]] = {
        "Accelerate, padded as they come": accelerate,
        "by hand, padded as they come": by_hand,
        "macrobatch, padded, planned": partial(macrobatch, layout="padded"),
        "macrobatch, packed, planned": partial(macrobatch, layout="packed"),
    }
    if options.compile:
        named["macrobatch, packed, compiled"] = partial(macrobatch, layout="packed", is_compiled=True)
    return {name: build for name, build in named.items() if any(word in name for word in options.only)}


# Errors and times.


def reference(job: Job, samples: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradient of the mean loss over the tokens, sample by sample, in float64 by plain PyTorch."""
    model = job.model().double()
    num_tokens = sum(len(sample) - 1 for sample in samples)
    for micro_batch in job.on_device([padded([sample]) for sample in samples]):
        (loss_of(model, micro_batch).total / num_tokens).backward()
    return gradients_of(model)


def gradient(running: Running, model: nn.Module) -> dict[str, Tensor | None]:
    """What the optimizer gets in one window, by the names of a model of the same kind."""
    names = [name for name, _ in model.named_parameters()]
    seen: dict[str, Tensor | None] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        found = (None if param.grad is None else param.grad.detach().clone() for param in params)
        seen.update(zip(names, found, strict=True))

    handle = running.optimizer.register_step_pre_hook(note)
    running.update()
    handle.remove()
    return seen


def errors(job: Job, lengths: np.ndarray) -> dict[str, float | str]:
    """Of each contender's gradient, on a few samples that are short enough for float64; or why there is none."""
    samples = job.samples(lengths)
    job = replace(job, rows=max(len(lengths) // 4, 1), max_tokens=max(int(lengths.sum()) // 3, int(lengths.max())))
    expected = reference(job, samples)
    found: dict[str, float | str] = {}
    for name, build in contenders(job.options).items():
        found[name] = attempted(
            lambda build=build: relative_error(gradient(build(job, samples), job.model()), expected)
        )
    return found


def drawn_lengths(options: argparse.Namespace) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(5.2, 0.9, options.window).astype(np.int64)
    return np.clip(drawn // 64, 1, 16) if options.tiny else np.clip(drawn, 16, LENGTH)


def main() -> None:
    options = parsed_options()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    cost = LengthCost.of_width(32 if options.tiny else 768)
    job = Job(options=options, device=device, cost=cost, rows=options.rows, max_tokens=options.max_tokens)
    lengths = drawn_lengths(options)
    began_s = time.perf_counter()
    TokenBudget(options.max_tokens, cost=job.cost).pack(lengths)
    plan_s = time.perf_counter() - began_s
    short = np.sort(lengths)[: 8 * options.slice : 8]
    off = errors(job, np.random.default_rng(1).permutation(short))
    samples = job.samples(lengths)
    ready: dict[str, Running] = {}
    for name, build in contenders(options).items():
        made = attempted(lambda build=build: warm(build(job, samples))) if not isinstance(off[name], str) else off[name]
        if isinstance(made, str):
            print(f"{name}: {made}", flush=True)
        else:
            ready[name] = made
    updates = {name: running.update for name, running in ready.items()}
    rows = paired(updates, rounds=options.rounds, calls=1, unit_per_call=1, warmup=2)
    num_tokens = int(lengths.sum())
    for row in rows:
        row["tokens_per_s"] = tuple(round(num_tokens / us * 1e6, 1) for us in reversed(row["us"]))
        row |= {"gradient_error": off[row["name"]], **ready[row["name"]].notes()}
    report(options, rows, num_tokens, plan_s)


def warm(running: Running) -> Running:
    running.update()
    return running


def report(options: argparse.Namespace, rows: list[Row], num_tokens: int, plan_s: float) -> None:
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    title = f"{options.window} samples, {num_tokens} tokens, {options.precision} on {hardware}"
    cells = [
        [
            row["name"],
            "{1:.1f} [{0:.1f}, {2:.1f}]".format(*(number / 1e3 for number in row["tokens_per_s"])),
            f"{1 / row['ratio'][1]:.2f}",
            f"{row['num_slots'] / num_tokens:.3f}" if "num_slots" in row else "",
            f"{row['gradient_error']:.1e}",
        ]
        for row in rows
    ]
    header = ["", "k real tokens/s", f"x {rows[0]['name']}", "computed / real", "gradient off by"]
    print(grid(title, header, cells))
    print(f"planning the window takes {plan_s * 1e3:.1f} ms")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    results = {"settings": settings | {"num_tokens": num_tokens, "plan_s": plan_s}, "rows": rows}
    thousands = {row["name"]: quartiles_in_thousands(row) for row in rows}
    name = f"lengths-{options.device}{'-tiny' if options.tiny else ''}"
    save(name, results, options.out, title=title, panels={"thousand real tokens/s": thousands})


def quartiles_in_thousands(row: Row) -> tuple[float, float, float]:
    low, middle, high = row["tokens_per_s"]
    return low / 1e3, middle / 1e3, high / 1e3


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models and windows, only to see that everything runs")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--window", type=int, help="samples of the window")
    parser.add_argument("--rows", type=int, help="samples per micro-batch as they come")
    parser.add_argument("--max-tokens", type=int, help="cap on the tokens of a planned micro-batch")
    parser.add_argument("--slice", type=int, default=16, help="short samples that errors are measured on")
    parser.add_argument("--rounds", type=int, default=10, help="turns")
    parser.add_argument("--compile", action="store_true", help="one contender more")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="contenders with one of these words")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture instead of benchmarks/results")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("the full size needs a GPU; with --tiny, it shows on CPU that it runs")
    options.window = options.window or (48 if options.tiny else 512)
    options.rows = options.rows or (8 if options.tiny else 16)
    options.max_tokens = options.max_tokens or (64 if options.tiny else 16 * LENGTH)
    return options


if __name__ == "__main__":
    main()
