"""`ShardedSync`: FSDP2 under every policy and mesh equals one process, with the collectives that the policy stands for.

Numbers are compared with one process that runs the micro-batches of all ranks (`off_from_alone`), in float64 and to the
promise, EXACT, unless a test says otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW

import macrobatch as mb
from macrobatch.sync import Policy, ShardedSync
from macrobatch.testing.reference import full_batch_gradient, relative_error
from tests.sync.windows import (
    EXACT,
    WRONG,
    Collectives,
    build,
    gradient_seen,
    off_from_alone,
    pieces,
    run,
    same_everywhere,
    whole_parameters,
)

pytestmark = pytest.mark.xdist_group("ranks")

F64 = torch.float64
IMPATIENT_S = 20.0  # for what would leave ranks waiting if it failed
POLICIES = {
    f"{'keep' if keep else 'reshard'}-{'last' if last else 'each'}": Policy(keep_parameters=keep, reduce_last=last)
    for keep in (False, True)
    for last in (False, True)
}
UNEQUAL = [[3, 2, 1], [1, 1, 4, 3], [2], []]  # samples in the micro-batches of four ranks


def rows(num: int, width: int = 8, *, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(num, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def data(sizes: list[list[list[int]]]) -> list[list[list[Tensor]]]:
    """Micro-batches of these sizes, by window and rank; no two alike, the same on every rank."""
    return [
        [
            [rows(num, seed=hash((window, rank, index))) for index, num in enumerate(share)]
            for rank, share in enumerate(shares)
        ]
        for window, shares in enumerate(sizes)
    ]


def unequal_windows(num: int = 4) -> list[list[list[Tensor]]]:
    """Windows of unequal shares, in which each rank comes to have none."""
    world_size = dist.get_world_size()
    shares = UNEQUAL[-world_size:] if world_size < 4 else UNEQUAL
    shares = [[3, 2, 1], []] if world_size == 2 else shares
    return data([shares[turn % world_size :] + shares[: turn % world_size] for turn in range(num)])


def layers(num: int = 3, *, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(p for _ in range(num) for p in (nn.Linear(8, 8, dtype=dtype), nn.Tanh())))


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


@cache
def mesh_of(kind: str) -> DeviceMesh:
    """One for all jobs of a rank: each group of gloo's has threads, which wake up a hundred times a second."""
    if kind == "hybrid":
        return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: nn.Module, mesh: str = "plain", **options: Any) -> Any:
    """Every linear layer by itself, and the rest."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh_of(mesh), **options)
    return fully_shard(model, mesh=mesh_of(mesh), **options)


# --- meshes and policies ---


def policies(mesh: str, policy: str | None, options: dict[str, Any]) -> float:
    sync = ShardedSync(policy=None if policy is None else POLICIES[policy])
    return off_from_alone(
        layers(), mean_square, unequal_windows(), sync=sync, prepare=partial(shard, mesh=mesh), **options
    )


@pytest.mark.parametrize("policy", [*POLICIES, None])
@pytest.mark.parametrize(("world_size", "mesh"), [(2, "plain"), (4, "plain"), (4, "hybrid")])
def test_window_any_mesh_and_policy_unequal_shares_equals_one_process(ranks, world_size, mesh, policy):
    assert max(ranks(world_size).run(policies, mesh, policy, {})) <= EXACT


@pytest.mark.parametrize("options", [{"clip_norm": 0.01}, {"clip_norm": 0.01, "nonfinite": "ignore"}], ids=str)
@pytest.mark.parametrize(("world_size", "mesh"), [(2, "plain"), (4, "hybrid")])
def test_clip_norm_over_shards_equals_one_process(ranks, world_size, mesh, options):
    assert max(ranks(world_size).run(policies, mesh, "keep-last", options)) <= EXACT


@pytest.mark.parametrize("normalize", ["uniform", mb.Constant(7)], ids=str)
def test_window_other_weightings_over_shards_equal_one_process(ranks, normalize):
    assert max(ranks(2).run(policies, "plain", "reshard-each", {"normalize": normalize})) <= EXACT


def ddp_style(mesh: str) -> float:
    """FSDP2 by itself, without `ShardedSync`: the mean over ranks of the means of their shares."""
    model = layers()
    shares = [rows(3, seed=1), rows(1, seed=2), rows(9, seed=3), rows(1, seed=4)][: dist.get_world_size()]
    reference = full_batch_gradient(model, mean_square, torch.cat(shares))
    shard(model, mesh)
    mean_square(model, shares[dist.get_rank()]).backward()
    found = {name: _whole_gradient(param) for name, param in model.named_parameters()}
    return relative_error(found, reference)


def _whole_gradient(param: Tensor) -> Tensor | None:
    return param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad


def test_control_fsdp_mean_of_uneven_ranks_is_wrong(ranks):
    assert min(ranks(2).run(ddp_style, "plain")) > WRONG


# --- what travels ---


def collectives_by_window(policy: str, mesh: str) -> list[dict[str, int]]:
    model = shard(layers(3), mesh)
    optimizer = SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, mean_square, micro_batch=2, sync=ShardedSync(policy=POLICIES[policy]))
    counts: list[dict[str, int]] = []
    for num_micro_batches in (2, 1, 4):
        with Collectives() as collectives:
            step(rows(2 * num_micro_batches))
        counts.append(dict(collectives.count))
    return counts


def gathers_and_reductions(counts: dict[str, int]) -> tuple[int, int]:
    return counts["allgather_base"], counts["reduce_scatter_base"]


@pytest.mark.parametrize(
    ("policy", "once", "four"),
    [
        # Three layers. Resharded ones are gathered in the forward and again in the backward of every micro-batch.
        ("reshard-each", (6, 3), (24, 12)),
        ("reshard-last", (6, 3), (24, 3)),
        ("keep-each", (3, 3), (3, 12)),
        ("keep-last", (3, 3), (3, 3)),
    ],
)
def test_window_collectives_are_those_of_the_policy(ranks, policy, once, four):
    for _, of_one, of_four in ranks(2).run(collectives_by_window, policy, "plain"):
        assert gathers_and_reductions(of_one) == once
        # FSDP2's prefetch, which looks back over micro-batches, may gather the last layer in vain, once per window.
        assert gathers_and_reductions(of_four) in (four, (four[0] + 1, four[1]))
        # Beside them: how many micro-batches, the sums of all ranks, the norm.
        assert of_one["allreduce"] == of_four["allreduce"] == 3


@pytest.mark.parametrize(("policy", "num"), [("keep-last", 3), ("keep-each", 12)])
def test_window_on_a_hybrid_mesh_reduces_over_replicas_as_often_as_over_shards(ranks, policy, num):
    for _, _, of_four in ranks(4).run(collectives_by_window, policy, "hybrid"):
        assert gathers_and_reductions(of_four) in ((3, num), (4, num))
        assert of_four["allreduce"] == 3 + num


# --- the choice of a policy ---


def chosen(limit_bytes: int | None, mixed: bool) -> tuple[Policy, list[str]]:
    """The policy after some windows, and what the log says of it."""
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if mixed else {}
    model = shard(layers(3, dtype=torch.float32), **options)
    sync = ShardedSync(memory_limit_bytes=limit_bytes)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("macrobatch")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        run(model, mean_square, [[rows(2, dtype=torch.float32)]] * 4, sync=sync)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return sync.policy, lines


PARAMETER_BYTES = 3 * (8 * 8 + 8) * 4


@pytest.mark.parametrize(
    ("limit_bytes", "policy"),
    [
        (None, "keep-last"),
        (2 * PARAMETER_BYTES, "keep-last"),
        (2 * PARAMETER_BYTES - 1, "keep-each"),
        (PARAMETER_BYTES, "keep-each"),
        (PARAMETER_BYTES - 1, "reshard-each"),
        (0, "reshard-each"),
    ],
)
def test_policy_is_the_fastest_that_fits_into_the_memory_and_the_log_says_so_once(ranks, limit_bytes, policy):
    for found, (line,) in ranks(2).run(chosen, limit_bytes, False):
        assert found == POLICIES[policy]
        assert ("parameters kept" if "keep" in policy else "parameters resharded") in line
        assert ("in the last micro-batch" if "last" in policy else "in each micro-batch") in line


def test_policy_is_never_one_that_sums_up_a_window_in_16_bits(ranks):
    for found, _ in ranks(2).run(chosen, None, True):
        assert found == POLICIES["keep-each"]


def limit_differs() -> Policy:
    sync = ShardedSync(memory_limit_bytes=0 if dist.get_rank() else 10 * PARAMETER_BYTES)
    run(shard(layers(3)), mean_square, [[rows(2)]] * 4, sync=sync)
    return sync.policy


def test_policy_fits_the_rank_with_the_least_memory(ranks):
    assert ranks(2).run(limit_differs) == [POLICIES["reshard-each"]] * 2


# --- precision ---


def mixed_precision(policy: str, reduce_dtype: torch.dtype | None, param_dtype: torch.dtype | None) -> Any:
    """The error of a window of many micro-batches, or the argument that was refused. Parameters are bf16 if FSDP2 is
    to do no casting."""
    model = layers(3, dtype=torch.bfloat16 if param_dtype is None else torch.float32)
    batch = rows(256, dtype=torch.float32).to(model[0].weight.dtype)
    reference = full_batch_gradient(model, mean_square, batch)
    mp_policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    shard(model, mp_policy=mp_policy)
    optimizer = SGD(model.parameters(), lr=0.0)
    seen = gradient_seen(model, optimizer)
    try:
        step = mb.TrainStep(
            model,
            optimizer,
            lambda model, x: model(x).float().square().mean(),
            micro_batch=1,
            sync=ShardedSync(policy=POLICIES[policy]),
        )
        step(batch.chunk(2)[dist.get_rank()])
    except mb.errors.ArgumentError as error:
        return error.what
    return relative_error(seen, reference)


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("policy", ["keep-last", "reshard-last"])
@pytest.mark.parametrize(
    ("reduce_dtype", "param_dtype"), [(None, BF16), (BF16, BF16), (torch.float16, BF16), (None, None)]
)
def test_reduce_last_with_gradients_in_16_bits_is_refused(ranks, policy, reduce_dtype, param_dtype):
    assert ranks(2).run(mixed_precision, policy, reduce_dtype, param_dtype) == ["policy"] * 2


@pytest.mark.parametrize("policy", POLICIES)
def test_reduce_dtype_float32_sums_up_without_loss(ranks, policy):
    for error in ranks(2).run(mixed_precision, policy, F32, BF16):
        # bf16 rounds activations and gradients by 2^-9 a few times in three layers; summing adds nothing to speak of.
        assert error < 2**-7


def test_reduce_each_with_gradients_in_bf16_is_off_by_their_rounding(ranks):
    for error in ranks(2).run(mixed_precision, "keep-each", None, BF16):
        assert error < 2**-7


def scaler(policy: str) -> list[tuple[str | None, float]]:
    """An overflow in a single row of a weight, which is in one rank's shard."""
    model = shard(layers(1, dtype=torch.float32))
    bad = [False]

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        y = model(x).float()
        if bad[0]:
            y.register_hook(lambda grad: torch.cat([grad[:, :-1], grad[:, -1:] * float("inf")], 1))
        return y.square().mean()

    precision = mb.Fp16("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    sync = ShardedSync(policy=POLICIES[policy])
    optimizer = SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=2, precision=precision, sync=sync)
    found: list[tuple[str | None, float]] = []
    for window in range(4):
        bad[0] = window == 1
        empty = window == 0 and dist.get_rank() == 1
        result = step(None if empty else rows(4, seed=dist.get_rank(), dtype=torch.float32))
        found.append((result.skipped, precision.scaler.get_scale()))
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_fp16_overflow_in_one_shard_is_skipped_on_all_ranks_and_the_scale_agrees(ranks, policy):
    expected = [(None, 256.0), ("overflow", 128.0), (None, 128.0), (None, 128.0)]
    assert ranks(2).run(scaler, policy) == [expected] * 2


# --- what a model may be ---


class Branches(nn.Module):
    """Uses the branch that the micro-batch names, and never the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))
        self.double()

    def forward(self, x: Tensor, name: int) -> Tensor:
        return self.branches[name](torch.tanh(self.trunk(x)))


def unused(policy: str, by_layer: bool) -> tuple[float, bool]:
    """Branches used in some micro-batches, the same on all ranks, as FSDP2 demands.

    Returns:
        The distance from one process, and whether the last branch has no gradient.
    """

    def loss_fn(model: Any, batch: Any) -> mb.Loss:
        return mb.Loss(model(batch["x"], int(batch["name"])).square().sum(), len(batch["x"]))

    windows = [
        [[{"x": rows(2, seed=9 * rank + i), "name": name} for i, name in enumerate(names)] for rank in range(2)]
        for names in ("010", "0", "11")
    ]
    prepare: Callable[[nn.Module], Any] = shard if by_layer else lambda model: fully_shard(model, mesh=mesh_of("plain"))
    sync = ShardedSync(policy=POLICIES[policy])
    off = off_from_alone(Branches(), loss_fn, windows, prepare=prepare, sync=sync)
    (seen,) = run(
        prepare(Branches()), loss_fn, [windows[0][dist.get_rank()]], sync=ShardedSync(policy=POLICIES[policy])
    )
    return off, seen.gradients["branches.2.weight"] is None


@pytest.mark.parametrize("by_layer", [True, False], ids=["by layer", "as a whole"])
@pytest.mark.parametrize("policy", POLICIES)
def test_window_unused_parameters_equal_one_process(ranks, policy, by_layer):
    for off, is_none in ranks(2).run(unused, policy, by_layer):
        assert off <= EXACT
        assert is_none


def user_sharded(how: str) -> float:
    mesh = mesh_of("plain")

    def prepare(model: nn.Module) -> Any:
        if how == "kept after the forward":
            return shard(model, reshard_after_forward=False)
        if how == "two layers in one group":
            fully_shard([model[0], model[2]], mesh=mesh)  # pyright: ignore[reportIndexIssue]
        if how == "by columns":
            return shard(model, shard_placement_fn=lambda param: torch.distributed.tensor.Shard(param.ndim - 1))
        if how == "prefetching":
            shard(model)
            model[0].set_modules_to_forward_prefetch([model[2]])  # pyright: ignore[reportIndexIssue]
            return model
        return fully_shard(model, mesh=mesh)

    return off_from_alone(layers(), mean_square, unequal_windows(), prepare=prepare, sync=ShardedSync())


@pytest.mark.parametrize(
    "how", ["as a whole", "kept after the forward", "two layers in one group", "by columns", "prefetching"]
)
def test_window_model_that_the_user_sharded_equals_one_process(ranks, how):
    assert max(ranks(2).run(user_sharded, how)) <= EXACT


def caught(name: str, *args: Any) -> tuple[bool, Any]:
    """A job's result, or the name of what it raised."""
    try:
        return True, globals()[name](*args)
    except mb.errors.MacrobatchError as error:
        return False, type(error).__name__


def blocks_alone() -> float:
    """Only the first layer is sharded; the others are plain parameters on every rank."""

    def prepare(model: nn.Module) -> nn.Module:
        fully_shard(model[0], mesh=mesh_of("plain"))  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
        return model

    return off_from_alone(layers(), mean_square, unequal_windows(), prepare=prepare, sync=ShardedSync())


def outside() -> float:
    """A scale that is in the optimizer and in no module."""
    model = shard(layers(1))
    scale = torch.ones(8, dtype=F64, requires_grad=True)
    optimizer = SGD([*model.parameters(), scale], lr=0.1)
    step = mb.TrainStep(
        model, optimizer, lambda model, x: (model(x) * scale).square().mean(), micro_batch=2, sync=ShardedSync()
    )
    shares = [rows(4, seed=rank) for rank in range(2)]
    alone = layers(1)
    grad = full_batch_gradient(nn.Identity(), lambda _, x: (alone(x) * scale).square().mean(), torch.cat(shares))
    del grad
    (expected,) = torch.autograd.grad((alone(torch.cat(shares)) * scale).square().mean(), scale)
    step(shares[dist.get_rank()])
    assert scale.grad is not None
    return float((scale.grad - expected).norm() / expected.norm())


@pytest.mark.parametrize("what", ["blocks_alone", "outside"])
def test_parameters_that_are_not_sharded_are_synchronised_or_refused(ranks, what):
    for ok, value in ranks(2).run(caught, what):
        assert value <= EXACT if ok else value == "ArgumentError"


def not_sharded() -> str:
    model = layers()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=ShardedSync())
    with pytest.raises(mb.errors.ArgumentError) as raised:
        step(rows(2))
    return raised.value.what


def test_model_that_is_not_sharded_is_refused(ranks):
    assert ranks(2).run(not_sharded) == ["model"] * 2


def found_out() -> bool:
    model = shard(layers())
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2)
    return isinstance(step._step.sync, ShardedSync)


def test_auto_takes_a_sharded_model_for_what_it_is(ranks):
    assert all(ranks(2).run(found_out))


def frozen_and_unfrozen() -> float:
    def before(index: int, model: nn.Module) -> None:
        model[0].requires_grad_(index != 1)  # pyright: ignore[reportIndexIssue]

    return off_from_alone(layers(), mean_square, unequal_windows(), prepare=shard, before=before, sync=ShardedSync())


def test_window_layer_frozen_and_unfrozen_between_windows_equals_one_process(ranks):
    assert max(ranks(2).run(frozen_and_unfrozen)) <= EXACT


def two_terms() -> float:
    def loss_fn(model: Any, x: Tensor) -> dict[str, mb.Loss]:
        y = model(x)
        return {"tokens": mb.Loss(y.square().sum(), len(x)), "aux": mb.Loss(y.sum(), 3 * len(x) + 1)}

    def count(x: Tensor) -> dict[str, float]:
        return {"tokens": len(x), "aux": 3 * len(x) + 1}

    windows = data([[[3, 2, 1], [4]], [[1], [2, 2]]])
    return off_from_alone(layers(), loss_fn, windows, prepare=shard, sync=ShardedSync(), count=count)


def test_window_several_terms_with_count_equals_one_process(ranks):
    assert max(ranks(2).run(two_terms)) <= EXACT


# --- windows ---


def called_with_none(policy: str) -> list[Any]:
    """One rank has no samples, first in turn, then both."""
    model = shard(layers())
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=ShardedSync(policy=POLICIES[policy])
    )
    found: list[Any] = []
    for who in ({0}, {1}, {0, 1}, set(), {0}):
        result = step(rows(3) if dist.get_rank() in who else None)
        found.append((result.skipped, result.weight, "StepResult" in repr(result)))
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_step_none_on_some_ranks_or_all_is_a_share_of_no_samples(ranks, policy):
    of_one, of_none = (None, 3, True), ("no weight", 0, True)
    for found in ranks(2).run(called_with_none, policy):
        assert found == [of_one, of_one, (None, 6, True), of_none, of_one]


def evaluated(policy: str) -> float:
    """Forwards without a backward between windows see the updated parameters, and disturb no window."""
    seen: list[Tensor] = []

    def before(index: int, model: nn.Module) -> None:
        with torch.no_grad():
            seen.append(model(rows(4, seed=99)))

    sync = ShardedSync(policy=POLICIES[policy])
    off = off_from_alone(layers(), mean_square, unequal_windows(), prepare=shard, before=before, sync=sync)
    half = len(seen) // 2  # of the one process, then of the ranks
    return max(off, *(float((a - b).norm() / b.norm()) for a, b in zip(seen[half:], seen[:half], strict=True)))


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_between_windows_sees_the_updated_parameters(ranks, policy):
    assert max(ranks(2).run(evaluated, policy)) <= EXACT


def nan_on_one_rank(nonfinite: Any) -> tuple[list[str | None], bool]:
    model = shard(layers())
    optimizer = SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, mean_square, micro_batch=2, nonfinite=nonfinite, sync=ShardedSync())
    step(rows(4))
    before = whole_parameters(model)
    batch = rows(4)
    batch[1] = float("nan") if dist.get_rank() else 1.0
    try:
        outcome = step(batch).skipped
    except mb.errors.NonFiniteError as error:
        outcome = type(error).__name__
    unchanged = all(torch.equal(param, before[name]) for name, param in whole_parameters(model).items())
    return [outcome, step(rows(4)).skipped], unchanged


@pytest.mark.parametrize(("nonfinite", "outcome"), [("raise", "NonFiniteError"), ("skip", "not finite")])
def test_nan_on_one_rank_is_treated_alike_on_all(ranks, nonfinite, outcome):
    for found, unchanged in ranks(2).run(nan_on_one_rank, nonfinite):
        assert found == [outcome, None]
        assert unchanged


def nan_then_none() -> list[str | None]:
    """A rank without samples runs an old micro-batch; not one that has poisoned a window."""
    model = shard(layers())
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, nonfinite="skip", sync=ShardedSync()
    )
    bad = rows(4) * (float("nan") if dist.get_rank() else 1.0)
    return [step(rows(4)).skipped, step(bad).skipped, step(None if dist.get_rank() else rows(4)).skipped]


def test_rank_without_samples_does_not_run_a_poisoned_micro_batch_again(ranks):
    assert ranks(2).run(nan_then_none) == [[None, "not finite", None]] * 2


def batch_norm(sizes: list[list[int]]) -> tuple[list[float], bool]:
    """How many micro-batches the statistics have seen, by window, and whether they are the same on all ranks."""
    model = shard(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double())
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=3, sync=ShardedSync())
    tracked: list[float] = []
    for window, nums in enumerate(sizes):
        num = nums[dist.get_rank()]
        step(rows(num, seed=10 * window + dist.get_rank()) if num else None)
        tracked.append(float(model[1].num_batches_tracked))
    return tracked, same_everywhere([buffer.tolist() for buffer in model.buffers()])


def test_window_batch_norm_statistics_are_the_same_on_all_ranks(ranks):
    for _, same in ranks(2).run(batch_norm, [[6, 6], [3, 3]]):
        assert same


def test_window_batch_norm_statistics_do_not_count_micro_batches_of_weight_zero(ranks):
    (tracked, _), _ = ranks(2).run(batch_norm, [[3, 9], [3, 3]])
    assert tracked == [1, 2]


def test_window_batch_norm_on_a_rank_without_samples_works(ranks):
    ranks(2, IMPATIENT_S).run(batch_norm, [[6, 0], [0, 3]])


def updates_of_adamw(mesh: str) -> float:
    """Twenty updates over ranks against one process."""
    sizes = [[[2, 1], [3], [1, 1], [2]][: dist.get_world_size()]] * 20
    make = partial(AdamW, weight_decay=0.1)
    return off_from_alone(
        layers(), mean_square, data(sizes), prepare=partial(shard, mesh=mesh), sync=ShardedSync(), make_optimizer=make
    )


@pytest.mark.parametrize(("world_size", "mesh"), [(2, "plain"), (4, "hybrid")])
def test_20_updates_of_adamw_equal_one_process(ranks, world_size, mesh):
    # AdamW divides by the root of a mean square, which is near 0 for some elements: rounding grows with every update.
    assert max(ranks(world_size).run(updates_of_adamw, mesh)) <= 1e-8


def all_fail_before_the_forward() -> tuple[list[str | None], float]:
    """What fails on all ranks before a micro-batch runs leaves FSDP2 as it was."""
    model = layers()
    batch = rows(6)
    reference = full_batch_gradient(model, mean_square, batch)
    shard(model)
    optimizer = SGD(model.parameters(), lr=0.0)
    seen = gradient_seen(model, optimizer)
    step = mb.TrainStep(model, optimizer, mean_square, micro_batch=2, sync=ShardedSync())
    errors: list[str | None] = []
    for bad in (True, False, True, False):
        try:
            step({"x": rows(2), "y": rows(3)} if bad else batch)
            errors.append(None)
        except mb.errors.BatchError as error:  # noqa: PERF203
            errors.append(type(error).__name__)
    return errors, relative_error(seen, reference)


def test_error_on_all_ranks_before_the_forward_leaves_the_next_window_right(ranks):
    for errors, off in ranks(2).run(all_fail_before_the_forward):
        assert errors == ["BatchError", None, "BatchError", None]
        assert off <= EXACT


def kinds_of_models(kind: str) -> float:
    """Whole micro-batches of a case's batch, lent to a rank that has none in its first window."""
    case = build(kind)
    parts = pieces(case.batch, 6)
    windows = [[parts[:2], []], [[], parts[2:]]]
    sync = ShardedSync()
    case.model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # FSDP2 takes no other
    return off_from_alone(
        case.model, case.loss_fn, windows, prepare=lambda m: fully_shard(m, mesh=mesh_of("plain")), sync=sync
    )


@pytest.mark.parametrize("kind", ["conv", "tied_lm", "embedding", "lora"])
def test_first_window_without_samples_borrows_from_another_rank(ranks, kind):
    assert max(ranks(2).run(kinds_of_models, kind)) <= EXACT


def unreadable(how: str) -> list[str]:
    """Rank 1 fails in front of a window: in its loader, or in cutting its batch. The next window is a good one."""
    model = shard(layers(), mesh="plain")
    bad = [dist.get_rank() == 1]

    class Rows(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            if bad[0] and index >= 4:
                raise OSError("gone")
            return rows(8, seed=1)[index]

    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, global_batch=8, sync=ShardedSync()
    )
    seen: list[str] = []
    for _ in range(2):
        try:
            if how == "loader":
                for batch in step.loader(Rows()):
                    step(batch)
            else:
                step("nothing to cut" if bad[0] else rows(4))
            seen.append("passed")
        except (OSError, mb.errors.MacrobatchError) as error:
            seen.append(type(error).__name__)
        bad[0] = False
    return seen


@pytest.mark.parametrize(("how", "error"), [("loader", "OSError"), ("batch", "BatchError")])
def test_error_in_front_of_a_window_reaches_the_other_ranks(ranks, how, error):
    assert ranks(2, IMPATIENT_S).run(unreadable, how) == [["PeerError", "passed"], [error, "passed"]]


def ranks_of_a_group() -> list[int]:
    """A loader of a step whose sync is over half of the ranks, and one of a step that keeps to itself."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    sizes: list[int] = []
    for sync in (mb.sync.ReplicatedSync(group=group), "local"):
        model = layers()
        step = mb.TrainStep(
            model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, global_batch=8, sync=sync
        )
        sizes.append(len(next(iter(step.loader(torch.arange(8))))))
    return sizes


def test_loader_of_a_step_makes_shares_for_the_ranks_of_its_sync(ranks):
    assert ranks(4).run(ranks_of_a_group) == [[4, 8]] * 4


# --- cross-check ---


def unlike_replicas(cross_check: bool) -> str:
    """The first replica of a hybrid mesh begins with another parameter, in the shard of rank 0."""
    model = shard(layers(), "hybrid")
    if dist.get_rank() == 0:
        with torch.no_grad():
            model[0].weight.to_local()[0, 0] += 0.01
    sync = ShardedSync(cross_check=cross_check)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=sync)
    try:
        step(torch.ones(4, 8, dtype=F64))
    except mb.errors.PeerError as error:
        return error.what
    return "passed"


def test_cross_check_replicas_of_a_hybrid_mesh_that_differ_are_refused_on_all(ranks):
    said = ranks(4).run(unlike_replicas, True)
    assert said == ["the parameters of the first window", "the window"] * 2


def test_cross_check_off_lets_them_pass(ranks):
    assert ranks(4).run(unlike_replicas, False) == ["passed"] * 4


# --- parameters that come to differ ---


def frozen_on_one_rank() -> list[str]:
    """Rank 1 freezes a layer after the first window, and unfreezes it after the second."""
    model = shard(layers())
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=ShardedSync())
    said: list[str] = []
    for index in range(4):
        if dist.get_rank() == 1:
            model[2].requires_grad_(index != 1)
        try:
            step(rows(4, seed=index))
            said.append("passed")
        except mb.errors.ArgumentError as error:
            said.append(error.what)
    return said


def test_layer_frozen_on_one_rank_is_refused_on_all_and_the_next_window_works(ranks):
    expected = ["passed", "the trained parameters", "passed", "passed"]
    assert ranks(2, IMPATIENT_S).run(frozen_on_one_rank) == [expected] * 2
