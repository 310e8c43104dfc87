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
