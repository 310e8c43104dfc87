"""Ways to run a window over several ranks: by hand, by a peer, by macrobatch. Each function builds one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import Row, recorded
from models import GPT
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from windows import Running, adamw

import macrobatch as mb
from macrobatch import tree
from macrobatch.sync import Policy, ShardedSync, Sync

__all__ = ["POLICIES", "SHARDED_PRECISION", "Job", "accelerate", "ddp", "fsdp", "graphed", "macrobatch", "sharded"]

POLICIES = {
    f"{'keep' if keep else 'reshard'}, reduce {'last' if last else 'each'}": Policy(
        keep_parameters=keep, reduce_last=last
    )
    for keep in (True, False)
    for last in (True, False)
}
SHARDED_PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@dataclass(kw_only=True)
class Job:
    """What all contenders have in common.

    Attributes:
        options: of the command line.
        precision: "bf16" autocast or "fp32". FSDP2 brings a precision of its own.
        batch: this rank's share of the macro-batch, the same in every window.
        num_units: tokens or samples of the macro-batch over all ranks.
        unit: what these are.
        rows: results so far.
    """

    options: argparse.Namespace
    device: torch.device
    make_model: Callable[[], nn.Module]
    batch: Any
    num_units: int
    unit: str
    precision: str
    rows: list[Row] = field(default_factory=list)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        with self.device:
            return self.make_model()

    def micro_batches(self, num_rows: int) -> list[Any]:
        return tree.split(self.batch, [num_rows] * (tree.num_rows(self.batch) // num_rows))

    def loss(self, model: Callable[..., Tensor], micro_batch: Any) -> Tensor:
        """The mean over the micro-batch."""
        if isinstance(micro_batch, Tensor):
            return model(micro_batch)
        x_BC, y_B = micro_batch
        return F.cross_entropy(model(x_BC), y_B)

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cache)


def ddp(job: Job, num_rows: int, *, always: bool = False, views: bool = False, compiled: bool = False) -> Running:
    """By hand: `no_sync` around forward and backward of all micro-batches but the last, unless `always`."""
    model = job.model()
    wrapped = DistributedDataParallel(
        torch.compile(model) if compiled else model,
        device_ids=[job.device] if job.device.type == "cuda" else None,
        gradient_as_bucket_view=views,
    )
    optimizer = adamw(model)
    micro_batches = job.micro_batches(num_rows)

    def update() -> None:
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with nullcontext() if always or is_last else wrapped.no_sync():
                with job.autocast():
                    loss = job.loss(wrapped, micro_batch) / len(micro_batches)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not views)

    return Running(update, optimizer)


def graphed(job: Job, num_rows: int) -> Running:
    """By hand: a flat gradient buffer, the micro-step as one CUDA graph, one all-reduce per window."""
    model = job.model()
    optimizer = adamw(model)
    flat = torch.zeros(sum(param.numel() for param in model.parameters()), device=job.device)
    start = 0
    for param in model.parameters():
        param.grad = flat[start : start + param.numel()].view_as(param)
        start += param.numel()
    micro_batches = job.micro_batches(num_rows)
    static = micro_batches[0].clone()

    def micro_step() -> None:
        with job.autocast(cache=False):  # a cast made before the capture would stay as it is
            loss = job.loss(model, static) / len(micro_batches)
        loss.backward()

    graph = recorded(micro_step, capture_error_mode="thread_local")  # NCCL's watchdog may do what it likes
    flat.zero_()

    def update() -> None:
        for micro_batch in micro_batches:
            static.copy_(micro_batch)
            graph.replay()
        dist.all_reduce(flat, dist.ReduceOp.AVG)
        optimizer.step()
        flat.zero_()

    return Running(update, optimizer)


def accelerate(job: Job, num_rows: int, *, package: str = "accelerate", is_sharded: bool = False) -> Running:
    """The same script, whichever of the two packages its imports name."""
    library, state = import_module(package), import_module(f"{package}.state")
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
    micro_batches = job.micro_batches(num_rows)
    plugin = partial(
        library.FullyShardedDataParallelPlugin,
        fsdp_version=2,
        mixed_precision_policy=SHARDED_PRECISION,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = library.Accelerator(
        gradient_accumulation_steps=len(micro_batches),
        mixed_precision="bf16" if job.precision == "bf16" else "no",
        cpu=job.device.type == "cpu",
        fsdp_plugin=plugin() if is_sharded else None,
    )
    if accelerator.num_processes != dist.get_world_size() or is_sharded != accelerator.is_fsdp2:
        raise RuntimeError(f"Accelerate runs as {accelerator.distributed_type} on {accelerator.device}")
    model = job.model()
    optimizer = adamw(model)
    model, prepared = accelerator.prepare(model, optimizer)

    def update() -> None:
        for micro_batch in micro_batches:
            with accelerator.accumulate(model):
                accelerator.backward(job.loss(model, micro_batch))
                prepared.step()
                prepared.zero_grad()

    return Running(update, optimizer)


def macrobatch(
    job: Job,
    num_rows: int,
    *,
    make_model: Callable[[], nn.Module] | None = None,
    make_sync: Callable[[], Sync] | None = None,
    compile_mode: str | None = None,
    **settings: Any,
) -> Running:
    """`TrainStep`; with `compile_mode`, its loss function calls the compiled model."""
    model = (make_model or job.model)()
    optimizer = adamw(model)
    forward = model if compile_mode is None else torch.compile(model, mode=compile_mode)
    is_captured = compile_mode == "reduce-overhead"

    def loss_fn(_: nn.Module, micro_batch: Any) -> Tensor:
        if is_captured:
            torch.compiler.cudagraph_mark_step_begin()
        loss = job.loss(forward, micro_batch)
        return loss.clone() if is_captured else loss  # the next replay overwrites it

    sync = make_sync() if make_sync else "auto"
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=num_rows, precision=job.precision, sync=sync, **settings)
    notes = partial(_policy_note, sync) if isinstance(sync, ShardedSync) else dict
    return Running(lambda: step(job.batch), optimizer, notes)


def _policy_note(sync: ShardedSync) -> Row:
    return {"policy": next(name for name, policy in POLICIES.items() if policy == sync.policy)}


def sharded(job: Job, *, keep: bool = False, compiled: bool = False) -> nn.Module:
    """Cut as torchtitan does and with its default: all units but the last are resharded after the forward. As there,
    blocks are `compiled` before they are sharded."""
    model = job.model()
    assert isinstance(model, GPT)
    if compiled:
        for block in model.blocks:
            block.compile()
    shard = partial(
        fully_shard, mesh=init_device_mesh(job.device.type, (dist.get_world_size(),)), mp_policy=SHARDED_PRECISION
    )
    *units, tail = model.shard_units()
    for unit in units:
        shard(unit, reshard_after_forward=not keep)
    shard(tail, reshard_after_forward=False)
    shard(model)
    return model


def fsdp(job: Job, num_rows: int, policy: Policy, *, compiled: bool = False) -> Running:
    """FSDP2 by hand. Gathering and reducing in each micro-batch is torchtitan's policy."""
    model: Any = sharded(job, keep=policy.keep_parameters, compiled=compiled)
    optimizer = adamw(model)
    micro_batches = job.micro_batches(num_rows)

    def update() -> None:
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            if policy.reduce_last:
                model.set_requires_gradient_sync(is_last)
                model.set_is_last_backward(is_last)
            if policy.keep_parameters:
                model.set_reshard_after_backward(is_last)
            (job.loss(model, micro_batch) / len(micro_batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Running(update, optimizer)
