"""Windows over several ranks: build a contender, warm it up, time it, check its gradient, leave nothing of it behind.

A contender's optimizer must have the learning rate 0. Every window then has the same gradient, and its norm is compared
with the first contender's, in the first window and in the last one: a fast wrong answer is seen. A slice of it, the
gradients of a few parameters, is compared with float64.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from harness import Row, calls_per_round, quartiles, seconds_each
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from macrobatch import tree

__all__ = [
    "GIB",
    "TIMED",
    "WARMUP",
    "Contender",
    "Extent",
    "Noted",
    "Running",
    "Slice",
    "adamw",
    "attempt",
    "exact_slice",
    "gradients_noted",
    "over_ranks",
    "rates",
    "slice_error",
    "together",
]

GIB = 2**30
_WORST = ("off", "fp64_error")
Slice = Mapping[int, Tensor]
"""Gradients in float64 of some parameters, by their place among all."""


class Extent(NamedTuple):
    """How often to repeat something: for some time, but neither too often nor too rarely."""

    seconds: float
    least: int
    most: int

    def times(self, each_s: float) -> int:
        """How often, if each time takes so long."""
        return min(max(round(self.seconds / each_s), self.least), self.most)


WARMUP = Extent(1.0, 3, 10)  # after the first window, in which most things are made
TIMED = Extent(4.0, 6, 25)  # rounds; the clock of a host that is busy launching kernels takes its time to settle


class Running(NamedTuple):
    """A contender that is ready.

    Attributes:
        update: runs one window.
        optimizer: what `update` steps.
        notes: what else there is to say of it afterwards.
    """

    update: Callable[[], object]
    optimizer: Optimizer
    notes: Callable[[], Row] = dict


class Contender(NamedTuple):
    """One way to run a window, in micro-batches of `num_rows` samples. `build` may not keep what it builds alive."""

    name: str
    num_rows: int
    build: Callable[[], Running]


def adamw(model: nn.Module) -> Optimizer:
    """The optimizer of all contenders."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


class Noted(NamedTuple):
    """A gradient that an optimizer got: its norm, and its slice."""

    norm: float
    parts: dict[int, Tensor]


def exact_slice(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], micro_batches: Sequence[Any], device: torch.device
) -> Slice:
    """The slice in float64, by plain PyTorch: of the mean over all ranks' equal micro-batches, for at most a dozen
    parameters at the start of the model, through which all of the backward has gone."""
    found = _exact_slice(model.double(), loss, micro_batches)
    for gradient in found.values():
        dist.all_reduce(gradient)
    del model
    gc.collect()
    _forget_memory(device)  # no contender's
    return found


def _exact_slice(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], micro_batches: Sequence[Any]
) -> dict[int, Tensor]:
    params = list(model.parameters())
    places = [place for place, param in enumerate(params) if param.ndim > 1 and param.numel() < 2**25][1:4]
    for place, param in enumerate(params):
        param.requires_grad_(place in places)
    for micro_batch in micro_batches:
        wide = tree.map_tensors(lambda x: x.double() if x.is_floating_point() else x, micro_batch)
        (loss(model, wide) / len(micro_batches) / dist.get_world_size()).backward()
    grads = {place: params[place].grad for place in places}
    return {place: grad.clone() for place, grad in grads.items() if grad is not None}


def slice_error(noted: Sequence[Noted], exact: Slice) -> float:
    """The largest relative error of the noted slices; the same on all ranks."""
    size = torch.stack([part.norm() for part in exact.values()]).norm()
    off = [
        torch.stack([(each.parts[at].double() - part).norm() for at, part in exact.items()]).norm() for each in noted
    ]
    return over_ranks([float(torch.stack(off).max() / size)], size.device)[0]


def attempt(
    contender: Contender, *, device: torch.device, num_units: int, reference: float | None, exact: Slice
) -> Row:
    """Measure a contender. All ranks call this; an error on any of them is the result on all.

    Memory is of the rank that had most. "peak" is what tensors held at once, from building the model to the last
    window; what a captured graph uses is not in it once the graph is made. "reserved" is what the process had of the
    device from the second window on, with that and with what fragmentation costs.

    Args:
        num_units: tokens or samples of a window, over all ranks.
        reference: norm that the gradient should have; None for the first contender.
        exact: some of the gradient in float64.

    Returns:
        Quartiles of seconds per window and of units per second, memory in GiB, the gradient's norms, and what its
        slice is off by, "fp64_error"; or "error".
    """
    row: Row = {"name": contender.name, "micro_batch": contender.num_rows}
    error = None
    try:
        row |= _measured(contender, device, num_units, reference, exact)
    except Exception as failure:  # whatever it is, the other contenders are worth measuring
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    torch.compiler.reset()
    gc.collect()
    _forget_memory(device)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    error = next((each for each in errors if each), None)
    return row if error is None else {"name": contender.name, "micro_batch": contender.num_rows, "error": error}


@contextmanager
def gradients_noted(optimizer: Optimizer, exact: Slice) -> Generator[list[Noted]]:
    """The gradients that an optimizer gets within the context."""
    noted: list[Noted] = []

    def note(optimizer: Optimizer, *_: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        parts = {place: params[place].grad for place in exact}
        whole = {at: part.full_tensor() if isinstance(part, DTensor) else part.clone() for at, part in parts.items()}
        noted.append(Noted(_gradient_norm(optimizer), whole))

    handle = optimizer.register_step_pre_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


def over_ranks(
    numbers: Sequence[float], device: torch.device, op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX
) -> list[float]:
    """Numbers reduced over ranks; the largest of each by default."""
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total, op)
    return total.tolist()


def _measured(contender: Contender, device: torch.device, num_units: int, reference: float | None, exact: Slice) -> Row:
    left_gib = _memory_gib(device)["allocated"]
    began_s = time.perf_counter()
    running = contender.build()
    with gradients_noted(running.optimizer, exact) as noted:
        running.update()
    _wait(device)
    start_s = time.perf_counter() - began_s
    start_gib = _memory_gib(device)["peak"]
    _forget_memory(device)
    (each_s,) = over_ranks([seconds_each(running.update, 1)], device)
    for _ in range(WARMUP.times(each_s)):
        (each_s,) = over_ranks([seconds_each(running.update, 1)], device)
    num_calls = calls_per_round(each_s)
    num_rounds = TIMED.times(num_calls * each_s)
    times_s = over_ranks([seconds_each(running.update, num_calls) for _ in range(num_rounds)], device)
    with gradients_noted(running.optimizer, exact) as last:
        running.update()
    noted += last
    norms = [each.norm for each in noted]
    reference = norms[0] if reference is None else reference
    off = [abs(norm / reference - 1) for norm in norms]
    memory_gib = _memory_gib(device)
    memory_gib["peak"] = max(memory_gib["peak"], start_gib)
    most_gib = over_ranks([*memory_gib.values()], device)
    return {
        **rates(times_s, num_units),
        "windows_at_once": num_calls,
        **{f"{kind}_gib": round(most, 3) for kind, most in zip(memory_gib, most_gib, strict=True)},
        "left_by_others_gib": round(left_gib, 3),
        "start_s": round(start_s, 1),
        "grad_norms": norms,
        "off": max(over_ranks(off, device)),
        "fp64_error": slice_error(noted, exact),
        **running.notes(),
    }


def rates(times_s: Sequence[float], num_units: int) -> Row:
    """Windows' times, as a result says them."""
    return {
        "times_s": [round(time_s, 6) for time_s in times_s],
        "num_timed": len(times_s),
        "window_s": quartiles(times_s),
        "per_s": quartiles([num_units / time_s for time_s in times_s]),
    }


def together(turns: Sequence[Row], num_units: int) -> Row:
    """One result of several of the same contender: all of their windows, and the worst of the rest."""
    worst = {kind: max(row[kind] for row in turns) for kind in turns[0] if kind.endswith("_gib") or kind in _WORST}
    return {**turns[0], **worst, **rates([time_s for row in turns for time_s in row["times_s"]], num_units)}


def _gradient_norm(optimizer: Optimizer) -> float:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params if param.grad is not None]
    parts = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    norm = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]).norm()
    if any(isinstance(grad, DTensor) for grad in grads):
        (square,) = over_ranks([float(norm) ** 2], norm.device, dist.ReduceOp.SUM)
        return square**0.5
    return float(norm)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory_gib(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {"allocated": 0.0, "peak": 0.0, "reserved": 0.0}
    return {
        "allocated": torch.cuda.memory_allocated() / GIB,
        "peak": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
    }


def _forget_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
