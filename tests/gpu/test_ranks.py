"""The oracle's subset over GPUs, one NCCL rank each. Skipped with fewer than two.

Tolerances: as in tests/equivalence/test_oracle.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import macrobatch as mb
from macrobatch import tree
from macrobatch.testing.models import CASES
from macrobatch.testing.pool import RankPool
from macrobatch.testing.reference import full_batch_gradient, relative_error

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

NUM_SAMPLES = 29
SHARES = {"even": [15, 14], "uneven": [4, 25], "one rank empty": [29, 0]}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, backend="nccl") as ranks:
        yield ranks


def errors(strategy: str, kind: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Relative gradient error and gradient norm of the third window, by how the samples are shared. Runs on a rank."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for name, shares in SHARES.items():
        torch.manual_seed(11)
        case = CASES[kind](NUM_SAMPLES)
        batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, case.batch)
        model = case.model.to(dtype)
        reference = full_batch_gradient(model, case.loss_fn, batch)
        model = model.cuda()
        if strategy == "sharded":
            fully_shard(model)
        trained: nn.Module = model
        if strategy == "wrapped":
            trained = DistributedDataParallel(model, device_ids=[dist.get_rank()], find_unused_parameters=True)
        seen: dict[str, Tensor | None] = {}
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_, m=model, s=seen: s.update(whole_gradients(m)))
        step = mb.TrainStep(trained, optimizer, case.loss_fn, micro_batch=3, **options)
        start = sum(shares[: dist.get_rank()])
        share = tree.select(batch, slice(start, start + shares[dist.get_rank()])) if shares[dist.get_rank()] else None
        results = [step(share) for _ in range(3)]
        found[name] = relative_error(seen, reference), results[-1].grad_norm
    return found


def whole_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    gradients = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    return {
        name: None
        if gradient is None
        else (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().cpu().clone()
        for name, gradient in gradients.items()
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["mlp", "tied_lm", "conditional", "lora", "embedding"])
@pytest.mark.parametrize("strategy", ["replicated", "sharded", "wrapped"])
def test_window_over_two_gpus_equals_full_batch(pool, strategy, kind, dtype):
    if strategy == "sharded" and kind == "conditional":
        pytest.skip("FSDP2 reduces a parameter only where every rank used it")
    for found in pool.run(errors, strategy, kind, dtype, {}):
        assert all(error <= TOLERANCE[dtype] for error, _ in found.values()), found


@pytest.mark.parametrize("strategy", ["replicated", "sharded"])
def test_norm_and_clip_over_two_gpus_agree(pool, strategy):
    one, other = pool.run(errors, strategy, "mlp", torch.float64, {"clip_norm": 1e9})
    assert one == other


def normed() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def synchronised_norms(strategy: str, micro_batch: int) -> tuple[float, float, float]:
    """Errors of the gradient and of the running mean, against a process that has both ranks' micro-batches at once; and
    that of the gradient against norms that each rank keeps to itself. Runs on a rank."""
    from torch.nn.parallel import DistributedDataParallel

    x = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = zip(x[:12].split(micro_batch), x[12:].split(micro_batch), strict=True)
    together, apart = normed(), normed()
    num = 24 // (2 * micro_batch)
    for one, other in pairs:
        (squares(together, torch.cat([one, other])) / num).backward()
        for alone in (one, other):
            (squares(apart, alone) / num / 2).backward()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normed()).cuda()
    trained = DistributedDataParallel(model, device_ids=[dist.get_rank()]) if strategy == "wrapped" else model
    seen: dict[str, Tensor | None] = {}
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.update(whole_gradients(model)))
    step = mb.TrainStep(trained, optimizer, squares, micro_batch=micro_batch)
    step(x[12 * dist.get_rank() :][:12].cuda())
    exact = {name: param.grad for name, param in together.named_parameters()}
    mean = model[1].running_mean.cpu() - together[1].running_mean  # pyright: ignore[reportOperatorIssue]
    control = {name: param.grad for name, param in apart.named_parameters()}
    return relative_error(seen, exact), float(mean.norm()), relative_error(seen, control)


@pytest.mark.parametrize("micro_batch", [12, 4])
@pytest.mark.parametrize("strategy", ["replicated", "wrapped"])
def test_sync_batch_norm_sees_the_micro_batches_of_all_ranks(pool, strategy, micro_batch):
    """It takes its statistics over ranks, not over micro-batches: those of one turn at a time."""
    for gradient, mean, apart in pool.run(synchronised_norms, strategy, micro_batch):
        assert gradient < 1e-12
        assert mean < 1e-12
        assert apart > 1e-3  # the control: norms of one rank's samples give another gradient


def bf16_drift() -> float:
    """Largest difference between the ranks' parameters after 20 updates with gradients in bf16 on the wire."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sync = mb.ReplicatedSync(wire_dtype=torch.bfloat16, bucket_bytes=2**14)
    step = mb.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), micro_batch=4, sync=sync, precision="bf16")
    torch.manual_seed(dist.get_rank())
    for _ in range(20):
        step(torch.randn(16, 64, device="cuda"))
    mine = torch.cat([param.detach().view(-1) for param in model.parameters()])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    return max(float((other - mine).abs().max()) for other in others)


def test_replicas_over_two_gpus_do_not_drift_with_bf16_on_the_wire(pool):
    assert pool.run(bf16_drift) == [0.0, 0.0]  # every rank adds the same bits


class Wide(nn.Module):
    """8 layers that keep 6 MiB of activations of each sample of 64 x 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(8))

    def forward(self, x_BTC: Tensor) -> Tensor:
        for layer in self.layers:
            x_BTC = x_BTC + torch.tanh(layer(x_BTC)) * torch.sigmoid(x_BTC)
        return x_BTC


def out_of_memory_in_step(num_failing: int) -> tuple[list[int], bool, float, bool]:
    """Three windows under FSDP2 of which the last two find less memory on some ranks, and a window cut so at once."""
    from torch.distributed.fsdp import fully_shard

    def stepped(micro_batch: Any) -> tuple[Any, dict[str, Tensor | None]]:
        torch.manual_seed(3)
        model = Wide().cuda()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        seen: dict[str, Tensor | None] = {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: seen.update(whole_gradients(model)))
        return mb.TrainStep(model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=micro_batch), seen

    batch = torch.randn(64, 64, 1024, generator=torch.Generator().manual_seed(dist.get_rank()))
    step, seen = stepped("auto")
    step.window([batch])  # as it is, and not cut to a size that was found to be faster
    num = [step.window([batch]).num_micro_batches]
    whole = dict(seen)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(dist.get_rank()).total_memory
    if dist.get_rank() >= 2 - num_failing:
        limit = torch.cuda.memory_reserved() + 150 * 2**20
        torch.cuda.set_per_process_memory_fraction(limit / total, dist.get_rank())
    try:
        num += [step.window([batch]).num_micro_batches for _ in range(2)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, dist.get_rank())
    plain, expected = stepped(-(-64 // num[-1]))
    for _ in range(3):  # the policy is chosen after the second
        plain(batch)
    same = all(torch.equal(mine, theirs) for mine, theirs in zip(seen.values(), expected.values(), strict=True))
    changed = all(torch.equal(mine, theirs) for mine, theirs in zip(seen.values(), whole.values(), strict=True))
    return num, same, relative_error(seen, whole), changed


@pytest.mark.parametrize("num_failing", [1, 2])
def test_memory_that_runs_out_under_fsdp2_is_made_up_for_by_all_ranks(pool, num_failing):
    """Of one rank of two, the allocator really fails within a forward or backward."""
    one, other = pool.run(out_of_memory_in_step, num_failing)
    assert one == other
    (first, *later), is_same, error, is_as_whole = one
    assert first == 1
    assert later[0] == later[1] > 1
    assert is_same  # to the bit, as a window that was smaller from the start
    assert error < 1e-5  # fp32, summed up in another order
    assert not is_as_whole
