"""`WrappedSync` over the user's own FSDP1 equals one process, and a full batch in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import SGD, AdamW

import macrobatch as mb
from macrobatch.sync import WrappedSync, make_sync
from macrobatch.testing.reference import full_batch_gradient, relative_error
from tests.sync.windows import EXACT, WRONG, build, ragged

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # FSDP1 is on its way out
]

F64 = torch.float64
UNEQUAL = [[[3, 3], [2, 1, 4]], [[1], [2, 2]], [[2], []], [[], [1, 1]], [[3], [3]]]
STRATEGIES = ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"]


def rows(num: int, *, seed: int) -> Tensor:
    return torch.randn(num, 8, dtype=F64, generator=torch.Generator().manual_seed(seed))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(8, 8, dtype=F64), nn.Tanh())))


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def wrap(model: nn.Module, strategy: str, original: bool, *, whole: bool = False) -> FullyShardedDataParallel:
    """FSDP1 around the model and, unless it is wrapped as a whole, around every layer."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=None if whole else ModuleWrapPolicy({nn.Linear}),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )


def state(model: FullyShardedDataParallel) -> list[Tensor]:
    """All parameters, put together."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return [param.detach().clone().view(-1) for param in model.parameters()]


def together(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def off_from_alone(strategy: str, original: bool, make: Any, options: dict[str, Any]) -> float:
    """Parameters, losses, weights and norms, against one process that runs the micro-batches of all ranks."""
    rank = dist.get_rank()
    lonely, model = layers(), wrap(layers(), strategy, original)
    steps = [
        mb.TrainStep(each, make(each.parameters(), lr=0.1), mean_square, micro_batch=1, sync=sync, **options)
        for each, sync in ((lonely, "local"), (model, make_sync("auto", model)))
    ]
    off = 0.0
    for index, shares in enumerate(UNEQUAL):
        window = [[rows(num, seed=100 * index + 10 * r + i) for i, num in enumerate(s)] for r, s in enumerate(shares)]
        alone, ours = steps[0].window([x for share in window for x in share]), steps[1].window(window[rank])
        for a, b in ((ours.loss, alone.loss), (ours.weight, alone.weight), (ours.grad_norm, alone.grad_norm)):
            off = max(off, abs(a - b) / abs(b))
    expected = together(lonely.parameters())
    return max(off, float((together(state(model)) - expected).norm() / expected.norm()))


@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.01}, {"normalize": "uniform"}], ids=str)
def test_windows_of_unequal_shares_equal_one_process(ranks, strategy, original, options):
    assert max(ranks(2).run(off_from_alone, strategy, original, SGD, options)) <= EXACT


@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_windows_with_adamw_equal_one_process(ranks, original):
    make = partial(AdamW, weight_decay=0.1)
    assert max(ranks(2).run(off_from_alone, "FULL_SHARD", original, make, {})) <= 1e-8  # divides by small roots


def oracle(kind: str, averages: bool = False) -> float:
    """One window of SGD from zero momentum moves parameters by the gradient: against the full batch in float64."""
    case = build(kind)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    before = {name: param.detach().clone() for name, param in case.model.named_parameters()}
    share = ragged(case.batch, dist.get_world_size())[dist.get_rank()]
    model = wrap(case.model, "FULL_SHARD", original=True, whole=kind in ("tied_lm", "conditional"))
    sync = WrappedSync()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=1.0), case.loss_fn, micro_batch=1, sync=sync)
    if averages:
        step.gradients.scale_ = lambda factor: None  # pyright: ignore[reportAttributeAccessIssue]
    step.window(share)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        found = {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: before[name] - param for name, param in found.items()}
    return relative_error(
        {name: moved[name] for name, g in reference.items() if g is not None},
        {name: gradient for name, gradient in reference.items() if gradient is not None},
    )


@pytest.mark.parametrize("kind", ["mlp", "conv", "tied_lm", "lora", "conditional", "embedding"])
def test_window_of_ragged_shares_equals_full_batch(ranks, kind):
    assert max(ranks(2).run(oracle, kind)) <= 1e-10  # read off parameters, which are larger than their gradients


def test_control_averaging_left_in_is_wrong(ranks):
    assert min(ranks(2).run(oracle, "mlp", True)) > WRONG


def used_on_one_rank() -> float:
    """Each rank's samples go through a branch of their own: how far the update is from the whole batch's gradient."""
    case = build("conditional")
    x, labels = case.batch
    order = x[:, 0].argsort()
    x, labels = x[order], labels[order]
    num_negative = int((x[:, 0] <= 0).sum())
    reference = full_batch_gradient(case.model, case.loss_fn, (x, labels))
    before = {name: param.detach().clone() for name, param in case.model.named_parameters()}
    share = [slice(0, num_negative), slice(num_negative, None)][dist.get_rank()]
    model = wrap(case.model, "FULL_SHARD", original=True, whole=True)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=1.0), case.loss_fn, micro_batch=5, sync=WrappedSync())
    step((x[share], labels[share]))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        found = {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: before[name] - param for name, param in found.items()}
    used = {name: gradient for name, gradient in reference.items() if gradient is not None}
    return relative_error({name: moved[name] for name in used}, used)


def test_parameters_used_on_one_rank_alone_get_their_gradient_on_all(ranks):
    assert max(ranks(2).run(used_on_one_rank)) <= 1e-10


def one_shard_overflows(how: str) -> tuple[float, str | None, float]:
    """A gradient that is infinite in one rank's shard alone.

    Returns:
        The loss scale after the window, why it was skipped, and the loss scale after one that was not.
    """
    torch.manual_seed(0)
    model: Any = nn.Linear(8, 8, bias=False)
    if how == "FSDP1":
        model = wrap(model, "FULL_SHARD", original=True, whole=True)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    scale_8 = torch.ones(8)

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        return (model(x).float() * scale_8).mean()

    precision = mb.Fp16("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10))
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=2, precision=precision)
    scale_8[-1] = 1e36  # the last output's row of the weight is in the last rank's shard
    skipped = step(torch.full((4, 8), 10.0)).skipped
    after = precision.scaler.get_scale()
    scale_8[-1] = 1.0
    step(torch.ones(4, 8))
    return after, skipped, precision.scaler.get_scale()


@pytest.mark.parametrize("how", ["FSDP1", "FSDP2"])
def test_fp16_overflow_in_one_shard_lowers_the_scale_on_all_ranks(ranks, how):
    assert ranks(2).run(one_shard_overflows, how) == [(2.0**7, "overflow", 2.0**7)] * 2


def refused(how: str) -> str:
    model = layers()
    if how == "ignored":
        wrapped = FullyShardedDataParallel(model, ignored_modules=[model[0]], device_id=torch.device("cpu"))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        hybrid = ShardingStrategy.HYBRID_SHARD
        wrapped = FullyShardedDataParallel(
            model, device_mesh=mesh, sharding_strategy=hybrid, device_id=torch.device("cpu")
        )
    step = mb.TrainStep(wrapped, SGD(wrapped.parameters(), lr=0.1), mean_square, micro_batch=2)
    try:
        step(rows(4, seed=0))
    except mb.errors.ArgumentError as error:
        return error.what
    return "passed"


@pytest.mark.parametrize(("world_size", "how"), [(2, "ignored"), (4, "hybrid")])
def test_wrapping_that_leaves_ranks_apart_is_refused(ranks, world_size, how):
    assert ranks(world_size).run(refused, how) == ["model"] * world_size


def frozen_on_one_rank() -> list[str]:
    """Rank 1 freezes a layer after the first window, and unfreezes it after the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    first = next(iter(model.parameters()))
    step = mb.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, x: model(x).square().mean(), micro_batch=2
    )
    said: list[str] = []
    for index in range(4):
        first.requires_grad_(dist.get_rank() != 1 or index != 1)
        try:
            step(torch.ones(4, 4, dtype=torch.float64))
            said.append("passed")
        except mb.errors.ArgumentError as error:
            said.append(error.what)
    return said


def test_parameter_frozen_on_one_rank_is_refused_on_all_and_the_next_window_works(ranks):
    expected = ["passed", "the trained parameters", "passed", "passed"]
    assert ranks(2, 20.0).run(frozen_on_one_rank) == [expected] * 2
