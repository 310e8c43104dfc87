"""What the tests over ranks are made of: shares of a macro-batch, what an optimizer saw, how many collectives ran.

A job runs on every rank of a pool. It builds the same model and the same macro-batch everywhere, so that each rank can
compute the yardstick, the whole batch in one process, by itself.
"""

from __future__ import annotations

import collections
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb
from macrobatch import tree
from macrobatch.sync import LocalSync, ReplicatedSync, Sync
from macrobatch.testing.models import CASES, Case
from macrobatch.testing.reference import relative_error

NUM_SAMPLES = 29  # a prime: every split but one is ragged
EXACT = 1e-12  # the promise for float64; sums of this size are off by some 1e-16
FLOAT32 = 1e-6  # the promise for float32
WRONG = 1e-2  # what a control is off by at least: naive ways are wrong in the order of the gradient itself

LossFn = Callable[[Any, Any], Any]
Gradients = Mapping[str, Tensor | None]


def build(kind: str, dtype: torch.dtype = torch.float64, num_samples: int = NUM_SAMPLES) -> Case:
    """A case of `macrobatch.testing.models`, the same on every rank."""
    torch.manual_seed(11)
    case = CASES[kind](num_samples)
    batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, case.batch)
    return Case(case.model.to(dtype), batch, case.loss_fn)


def contiguous(batch: Any, world_size: int) -> list[Any]:
    """Equal shares by rank, the first ones one sample larger if need be."""
    size, rest = divmod(tree.num_rows(batch), world_size)
    return tree.split(batch, [size + (rank < rest) for rank in range(world_size)])


def pieces(share: Any, num_rows: int) -> list[Any]:
    """A share cut into micro-batches of `num_rows`, the last one ragged."""
    full, rest = divmod(tree.num_rows(share), num_rows)
    return tree.split(share, [num_rows] * full + [rest] * bool(rest))


# --- splits: from a macro-batch, the micro-batches of every rank ---


def whole(batch: Any, world_size: int) -> list[list[Any]]:
    return [[share] for share in contiguous(batch, world_size)]


def ragged(batch: Any, world_size: int) -> list[list[Any]]:
    return [pieces(share, 4) for share in contiguous(batch, world_size)]


def one_sample(batch: Any, world_size: int) -> list[list[Any]]:
    return [pieces(share, 1) for share in contiguous(batch, world_size)]


def permuted(batch: Any, world_size: int) -> list[list[Any]]:
    order = torch.randperm(tree.num_rows(batch), generator=torch.Generator().manual_seed(7)).tolist()
    return [pieces(share, 3) for share in contiguous(tree.select(batch, order), world_size)]


def unequal(batch: Any, world_size: int) -> list[list[Any]]:
    """One sample on rank 0, more samples in more micro-batches on each further rank."""
    sizes = {1: [29], 2: [1, 28], 4: [1, 4, 9, 15]}[world_size]
    return [pieces(share, 3 + rank) for rank, share in enumerate(tree.split(batch, sizes))]


def empty_rank(batch: Any, world_size: int) -> list[list[Any]]:
    """The first rank has no sample at all; where it is the only one, the split is an ordinary one."""
    if world_size == 1:
        return [pieces(batch, 6)]
    return [[], *(pieces(share, 3) for share in contiguous(batch, world_size - 1))]


SPLITS = {split.__name__: split for split in (whole, ragged, one_sample, permuted, unequal, empty_rank)}


def with_zero_weight_rank(case: Case, world_size: int) -> tuple[Case, list[list[Any]]]:
    """The last rank's samples count nothing; in one process, the last three samples.

    Returns:
        What the gradient has to be that of, and every rank's micro-batches of `(batch, keep)` for `weighted`.
    """
    num_kept = NUM_SAMPLES - (3 if world_size == 1 else 6)
    kept, rest = tree.split(case.batch, [num_kept, NUM_SAMPLES - num_kept])
    parts = [pieces(share, 5) for share in contiguous(kept, max(world_size - 1, 1))]
    by_rank = [[(part, torch.ones(tree.num_rows(part))) for part in share] for share in parts]
    weightless = [(part, torch.zeros(tree.num_rows(part))) for part in pieces(rest, 3)]
    if world_size == 1:
        by_rank[0] += weightless
    else:
        by_rank.append(weightless)
    return Case(case.model, kept, case.loss_fn), by_rank


def weighted(loss_fn: LossFn) -> LossFn:
    """A loss function on `(batch, keep)`, with `keep` all zeros or all ones."""

    def weigh(model: Any, batch_and_keep: tuple[Any, Tensor]) -> mb.Loss:
        batch, keep_B = batch_and_keep
        loss = loss_fn(model, batch)
        total, weight = loss if isinstance(loss, mb.Loss) else (loss * len(keep_B), len(keep_B))
        return mb.Loss(total * keep_B[0].to(total.dtype), weight * keep_B[0])

    return weigh


# --- what happened ---


def gradient_seen(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor | None]:
    """A dictionary that the next steps of the optimizer fill with what `.grad` holds when they begin; copies."""
    seen: dict[str, Tensor | None] = {}

    def look(*_: object) -> None:
        seen.clear()
        for name, param in model.named_parameters():
            if param.requires_grad:
                seen[name.removeprefix("module.")] = None if param.grad is None else _whole(param.grad)

    optimizer.register_step_pre_hook(look)
    return seen


class Collectives(TorchDispatchMode):
    """Counts the collectives inside its context, also those that DDP and FSDP2 start."""

    def __init__(self) -> None:
        super().__init__()
        self.count = collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func.overloadpacket.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, put together where they are sharded, under the names that they have in the bare model."""
    return {name.removeprefix("module."): _whole(param) for name, param in model.named_parameters()}


def bits(model: nn.Module) -> bytes:
    """All parameters and buffers of a model that is not sharded."""
    return b"".join(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_everywhere(value: Any, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks hold an equal value. A collective."""
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, value, group=group)
    return all(other == everywhere[0] for other in everywhere)


def copy_of(case: Case) -> Case:
    return Case(copy.deepcopy(case.model), case.batch, case.loss_fn)


class Seen(NamedTuple):
    """What one window came to."""

    gradients: Gradients
    loss: float
    weight: float
    grad_norm: float
    skipped: str | None


def run(
    model: nn.Module,
    loss_fn: LossFn,
    windows: Sequence[Sequence[Any]],
    *,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    expected: Sequence[Any] | None = None,
    before: Callable[[int, nn.Module], object] = lambda index, model: None,
    **options: Any,
) -> list[Seen]:
    """Windows of given micro-batches, one after the other; the model is trained.

    Args:
        expected: each window's weight as `TrainStep.window` takes it.
        before: called in front of every window with its number and the model.
    """
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    gradients = gradient_seen(model, optimizer)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=1, **options)
    seen: list[Seen] = []
    for index, micro_batches in enumerate(windows):
        before(index, model)
        result = step.window(micro_batches, expected=None if expected is None else expected[index])
        seen.append(Seen(dict(gradients), result.loss, result.weight, float(result.grad_norm), result.skipped))
    return seen


def off_from_alone(
    model: nn.Module,
    loss_fn: LossFn,
    windows: Sequence[Sequence[Sequence[Any]]],
    *,
    sync: Sync | None = None,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    count: Callable[[Any], Any] | None = None,
    **options: Any,
) -> float:
    """How far windows over ranks are from the same micro-batches in one process, which other tests have proven.

    Args:
        windows: by window and rank, the micro-batches.
        prepare: shards or wraps the model.
        count: the weight of one micro-batch, to be added up and given to the window.

    Returns:
        The largest relative difference of gradients, parameters, losses, weights and norms; infinite where a window
        was skipped on one side only, or where ranks disagree in as much as a bit.
    """
    rank = dist.get_rank()
    lonely, model = copy.deepcopy(model), prepare(model)
    everything = [[micro_batch for share in window for micro_batch in share] for window in windows]
    mine = [list(window[rank]) for window in windows]
    alone = run(lonely, loss_fn, everything, sync=LocalSync(), expected=_counted(everything, count), **options)
    sync = sync or ReplicatedSync(bucket_bytes=128)  # several buckets, also for small models
    together = run(model, loss_fn, mine, sync=sync, expected=_counted(mine, count), **options)
    found, wanted = whole_parameters(model), whole_parameters(lonely)
    numbers = [(seen.loss, seen.weight, seen.grad_norm, seen.skipped) for seen in together]
    if not same_everywhere(({name: _bytes(param) for name, param in found.items()}, numbers)):
        return math.inf
    off = [relative_error(found, wanted)]
    for ours, theirs in zip(together, alone, strict=True):
        if ours.skipped != theirs.skipped:
            return math.inf
        off += [_relative(a, b) for a, b in zip(ours[1:4], theirs[1:4], strict=True)]
        off.append(0.0 if ours.skipped else relative_error(ours.gradients, theirs.gradients))
    return max(off)


def _counted(windows: Sequence[Sequence[Any]], count: Callable[[Any], Any] | None) -> list[Any] | None:
    if count is None:
        return None
    totals: list[Any] = []
    for micro_batches in windows:
        counts = [count(micro_batch) for micro_batch in micro_batches]
        names = counts[0].keys() if counts else ()
        totals.append({name: sum(each[name] for each in counts) for name in names})
    return totals


def _relative(found: float, expected: float) -> float:
    if math.isnan(found) and math.isnan(expected):
        return 0.0
    return abs(found - expected) / max(abs(expected), 1e-300)
