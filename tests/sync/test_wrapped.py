"""`WrappedSync`: the user's own DistributedDataParallel, with any of its options, equals one process.

Numbers are compared with one process that runs the micro-batches of all ranks (`off_from_alone`), in float64 and to the
promise, EXACT, unless a test says otherwise.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch.sync import WrappedSync
from macrobatch.testing.reference import full_batch_gradient, relative_error
from tests.sync.windows import (
    EXACT,
    WRONG,
    Collectives,
    bits,
    gradient_seen,
    off_from_alone,
    run,
    same_everywhere,
)

pytestmark = pytest.mark.xdist_group("ranks")

F64 = torch.float64
IMPATIENT_S = 20.0  # for what would leave ranks waiting if it failed
Sizes = list[list[list[int]]]
UNEQUAL: Sizes = [[[3, 3], [2, 1, 4]], [[1], [2, 2]], [[2], []], [[], [1, 1]], [[3], [3]]]
FULL: Sizes = [[[3, 3], [2, 1, 4]], [[1], [2, 2]], [[3], [3]]]


def rows(num: int, width: int = 8, *, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(num, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def data(sizes: Sizes) -> list[list[list[Tensor]]]:
    """Micro-batches of these sizes, by window and rank; no two alike, the same on every rank."""
    return [
        [
            [rows(num, seed=hash((window, rank, index))) for index, num in enumerate(share)]
            for rank, share in enumerate(shares)
        ]
        for window, shares in enumerate(sizes)
    ]


def layers(num: int = 3, *, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(p for _ in range(num) for p in (nn.Linear(8, 8, dtype=dtype), nn.Tanh())))


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def wrap(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "views of buckets": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "find unused, views of buckets": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "static graph, views of buckets": {"static_graph": True, "gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.0005},
    "no broadcast of buffers": {"broadcast_buffers": False},
}


def options_of_ddp(name: str, sizes: Sizes, options: dict[str, Any]) -> float:
    prepare = partial(wrap, **OPTIONS[name])
    return off_from_alone(layers(), mean_square, data(sizes), prepare=prepare, sync=WrappedSync(), **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_window_any_option_of_ddp_and_unequal_shares_equals_one_process(ranks, name):
    assert max(ranks(2).run(options_of_ddp, name, UNEQUAL, {})) <= EXACT


@pytest.mark.parametrize("name", OPTIONS)
def test_first_window_without_samples_on_a_rank_equals_one_process(ranks, name):
    assert max(ranks(2).run(options_of_ddp, name, [[[], [2, 1]], *UNEQUAL], {})) <= EXACT


def statistics(kind: str) -> list[Any]:
    """Running means of two layers after two windows over other data on each rank, and those of this rank alone."""
    own = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).double()
    model = copy.deepcopy(own)
    ignored = ["1.running_mean", "1.running_var", "1.num_batches_tracked"] if kind == "ignored" else []
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = wrap(model, broadcast_buffers=kind != "left alone")
    step = mb.TrainStep(wrapped, SGD(model.parameters(), lr=0.0), mean_square, micro_batch=2, sync=WrappedSync())
    for _ in range(2):
        x = torch.randn(4, 2, dtype=F64) + dist.get_rank()
        step(x)
        [own(part) for part in x.split(2)]
    return [layer.running_mean for each in (model, own) for layer in each]


@pytest.mark.parametrize(("kind", "shared"), [("shared", [1, 1]), ("left alone", [0, 0]), ("ignored", [1, 0])])
def test_buffers_are_shared_as_ddp_shares_them(ranks, kind, shared):
    first, second = ranks(2).run(statistics, kind)
    for layer, is_shared in enumerate(shared):
        assert torch.equal(first[layer], first[layer + 2])
        assert not torch.equal(second[layer + 2], first[layer + 2])  # the control
        assert torch.equal(second[layer], first[layer] if is_shared else second[layer + 2])


class Reentrant(nn.Sequential):
    """Its layers' backwards run forwards and backwards of their own, so that hooks fire within them."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = checkpoint(layer, input.requires_grad_() if input.is_leaf else input, use_reentrant=True)
        return input


def reentrant_under_ddp(name: str) -> float:
    model = Reentrant(*layers())
    return off_from_alone(model, mean_square, data(UNEQUAL), prepare=partial(wrap, **OPTIONS[name]), sync=WrappedSync())


@pytest.mark.parametrize("name", ["default", "views of buckets", "static graph"])
def test_window_reentrant_checkpoints_under_ddp_equal_one_process(ranks, name):
    """DDP cannot find unused parameters behind these, and says so itself."""
    assert max(ranks(2).run(reentrant_under_ddp, name)) <= EXACT


def begins_without_samples(kind: str) -> list[str | None]:
    model: Any = layers(1)
    model = fully_shard(model) if kind == "FSDP2" else wrap(model)
    step = mb.TrainStep(
        model,
        SGD(model.parameters(), lr=0.1),
        lambda m, x: mb.Loss(m(x).square().sum(), (x[:, 0] != 0).sum()),
        micro_batch=2,
    )
    without, some = torch.zeros(3, 8, dtype=F64), rows(3)
    shares = [None, without, some, None, some]
    return [step(share if dist.get_rank() == 0 else None).skipped for share in shares]


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_first_windows_without_a_sample_anywhere_or_without_weight_are_skipped(ranks, kind):
    """There is nothing to borrow in the first; in the second there is, and it is kept, although nothing counts."""
    fates = ["no weight", "no weight", None, "no weight", None]
    assert ranks(2).run(begins_without_samples, kind) == [fates, fates]


@pytest.mark.parametrize("options", [{"clip_norm": 0.01}, {"normalize": "uniform"}, {"nonfinite": "ignore"}], ids=str)
def test_window_options_of_the_step_equal_one_process(ranks, options):
    assert max(ranks(2).run(options_of_ddp, "default", UNEQUAL, options)) <= EXACT


def test_window_over_four_ranks_equals_one_process(ranks):
    sizes: Sizes = [[[3], [1, 1], [], [2, 2, 2]], [[1], [1], [1], [1]], [[], [], [4, 1], [2]]]
    assert max(ranks(4).run(options_of_ddp, "views of buckets", sizes, {})) <= EXACT


def updates_of_adamw(name: str) -> float:
    make = partial(AdamW, weight_decay=0.1)
    prepare = partial(wrap, **OPTIONS[name])
    windows = data([[[2, 1], [3]]] * 20)
    return off_from_alone(layers(), mean_square, windows, prepare=prepare, sync=WrappedSync(), make_optimizer=make)


@pytest.mark.parametrize("name", ["default", "static graph, views of buckets"])
def test_20_updates_of_adamw_equal_one_process(ranks, name):
    # AdamW divides by the root of a mean square, which is near 0 for some elements: rounding grows with every update.
    assert max(ranks(2).run(updates_of_adamw, name)) <= 1e-8


# --- what travels ---


def collectives_by_window(name: str) -> list[dict[str, int]]:
    model = wrap(layers(), **OPTIONS[name])
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=WrappedSync())
    counts: list[dict[str, int]] = []
    for num_micro_batches in (2, 2, 1, 4, 13):
        with Collectives() as collectives:
            step(rows(2 * num_micro_batches))
        counts.append(dict(collectives.count))
    return counts


@pytest.mark.parametrize("name", ["default", "views of buckets", "static graph"])
def test_window_is_one_reduction_whatever_the_number_of_micro_batches(ranks, name):
    for counts in ranks(2).run(collectives_by_window, name):
        # DDP rebuilds its buckets after the first window. Beside the reduction: the sums of all ranks.
        assert [count["allreduce"] for count in counts[2:]] == [2, 2, 2]


def test_window_finding_unused_parameters_is_one_reduction_and_ddp_s_own_all_reduce_of_the_unused(ranks):
    for counts in ranks(2).run(collectives_by_window, "find unused"):
        assert [count["allreduce"] for count in counts[2:]] == [3, 3, 3]


# --- which parameters are used ---


class Branches(nn.Module):
    """Uses the branches that the batch names, and never the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 2) for _ in range(4))
        self.double()

    def forward(self, x: Tensor, names: str) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        return hidden.sum() + sum(self.branches[int(name)](hidden).square().sum() for name in names)


def named(names: list[list[str]]) -> list[list[Any]]:
    """By rank, the micro-batches that use these branches."""
    return [
        [{"x": rows(2, seed=10 * rank + i), "names": used} for i, used in enumerate(share)]
        for rank, share in enumerate(names)
    ]


def branch_loss(model: Any, batch: Any) -> mb.Loss:
    return mb.Loss(model(batch["x"], batch["names"]), len(batch["x"]))


def branches_used(windows: list[list[list[str]]], options: dict[str, Any]) -> tuple[float, list[bool]]:
    """By window, rank and micro-batch, the branches in use.

    Returns:
        The distance from one process, and whether each branch's last gradient was None to the optimizer.
    """
    prepare = partial(wrap, find_unused_parameters=True, **options)
    off = off_from_alone(
        Branches(), branch_loss, [named(window) for window in windows], prepare=prepare, sync=WrappedSync()
    )
    mine = [named(window)[dist.get_rank()] for window in windows]
    seen = run(prepare(Branches()), branch_loss, mine, sync=WrappedSync())
    return off, [seen[-1].gradients[f"branches.{index}.weight"] is None for index in range(4)]


@pytest.mark.parametrize("views", [False, True], ids=["", "views of buckets"])
@pytest.mark.parametrize(
    ("names", "is_none"),
    [
        ([["01", "1"], ["01", "1"]], [False, False, True, True]),
        ([["0", "01"], ["1", "12"]], [False, False, False, True]),
        ([["", ""], ["", ""]], [True, True, True, True]),
    ],
    ids=["in the last micro-batch", "on one rank", "on all ranks"],
)
def test_window_unused_parameters_equal_one_process_and_are_none_if_no_rank_used_them(ranks, names, is_none, views):
    for off, found in ranks(2).run(branches_used, [names, names], {"gradient_as_bucket_view": views}):
        assert off <= EXACT
        assert found == is_none


def test_parameter_that_only_a_borrowed_micro_batch_uses_is_none(ranks):
    """Rank 1 has no samples in the second window and runs what it ran last, whose branch no sample of this one uses."""
    for off, found in ranks(2).run(branches_used, [[["0"], ["1"]], [["0"], []]], {}):
        assert found == [False, True, True, True]
        assert off <= EXACT


def unused_in_the_last(cross_check: bool) -> tuple[str, float]:
    """Without find_unused_parameters, a parameter that the last micro-batch leaves out is not reduced by DDP."""
    window = named([["01", "0"], ["01", "0"]])
    parts = [part for share in window for part in share]
    model = Branches()
    model.branches = model.branches[:2]
    reference = full_batch_gradient(model, lambda m, _: sum(branch_loss(m, part).total for part in parts) / 8, ())
    optimizer = SGD(model.parameters(), lr=0.0)
    seen = gradient_seen(model, optimizer)
    sync = WrappedSync(cross_check=cross_check)
    step = mb.TrainStep(wrap(model), optimizer, branch_loss, micro_batch=2, sync=sync)
    try:
        step.window(window[dist.get_rank()])
    except mb.errors.PeerError as error:
        return error.what, 0.0
    return "passed", relative_error(seen, reference)


def test_cross_check_catches_what_ddp_leaves_unsynchronised(ranks):
    assert ranks(2).run(unused_in_the_last, True) == [("the gradients of the first window", 0.0)] * 2


def test_control_without_cross_check_what_ddp_leaves_unsynchronised_is_wrong_in_silence(ranks):
    for what, off in ranks(2).run(unused_in_the_last, False):
        assert what == "passed"
        assert off > WRONG


# --- precision ---


def sent_in_bf16(state, bucket):
    """What torch's bf16_compress_hook does, which insists on NCCL. (DDP refuses annotations that are strings.)"""
    whole = bucket.buffer()
    short = whole.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(short, async_op=True)
    assert work is not None
    return work.get_future().then(lambda _: whole.copy_(short))


def hooked(hook: str) -> tuple[float, bool]:
    """With a communication hook: the error of a window, and whether replicas are equal after twenty updates."""
    model = layers(dtype=torch.float32)
    shares = data([[[3, 1], [5]]])[0]
    shares = [[x.float() for x in share] for share in shares]
    reference = full_batch_gradient(model, mean_square, torch.cat([x for share in shares for x in share]))
    wrapped = wrap(model)
    wrapped.register_comm_hook(None, sent_in_bf16 if hook == "bf16" else getattr(default_hooks, hook))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    seen = gradient_seen(model, optimizer)
    step = mb.TrainStep(wrapped, optimizer, mean_square, micro_batch=2, sync=WrappedSync())
    step.window(shares[dist.get_rank()])
    error = relative_error(seen, reference)
    for _ in range(19):
        step.window(shares[dist.get_rank()])
    return error, same_everywhere(bits(model))


@pytest.mark.parametrize(
    ("hook", "tolerance"),
    [
        ("allreduce_hook", 1e-6),  # the promise for float32
        ("bf16", 2**-7),  # bf16 rounds by 2^-9: two shares, their sum, and what is divided before
        ("fp16_compress_hook", 2**-9),  # fp16 by 2^-11
    ],
)
def test_window_with_a_comm_hook_is_off_by_its_rounding_and_replicas_stay_equal(ranks, hook, tolerance):
    for error, same in ranks(2).run(hooked, hook):
        assert error <= tolerance
        assert same
        assert hook == "allreduce_hook" or error > 1e-6  # the hook was there


def bf16_parameters(name: str) -> tuple[float, bool]:
    model = layers(dtype=torch.bfloat16)
    shares = [[x.bfloat16() for x in share] for share in data([[[1] * 8, [2] * 5]])[0]]
    reference = full_batch_gradient(model, mean_square, torch.cat([x for share in shares for x in share]))
    optimizer = SGD(model.parameters(), lr=0.1)
    seen = gradient_seen(model, optimizer)
    wrapped = wrap(model, **OPTIONS[name])
    step = mb.TrainStep(
        wrapped, optimizer, lambda m, x: m(x).float().square().mean(), micro_batch=2, sync=WrappedSync()
    )
    step.window(shares[dist.get_rank()])
    error = relative_error(seen, reference)
    for _ in range(5):
        step.window(shares[dist.get_rank()])
    return error, same_everywhere(bits(model))


@pytest.mark.parametrize("name", ["default", "views of buckets", "static graph"])
def test_window_of_bf16_parameters_is_off_by_bf16_sums(ranks, name):
    for error, same in ranks(2).run(bf16_parameters, name):
        # DDP accumulates 16-bit gradients in 16 bits: up to 8 additions of 2^-9 each, on top of a backward's own 2^-7.
        assert error <= 2**-5
        assert same


def scaler(name: str) -> list[tuple[str | None, float]]:
    """An overflow on rank 1 alone; rank 1 has no samples in the first window."""
    model = wrap(layers(1, dtype=torch.float32), **OPTIONS[name])
    bad = [False]

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        y = model(x).float()
        if bad[0]:
            y.register_hook(lambda grad: grad * float("inf"))
        return y.square().mean()

    precision = mb.Fp16("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=2, precision=precision, sync=WrappedSync()
    )
    found: list[tuple[str | None, float]] = []
    for window in range(4):
        bad[0] = window == 1 and dist.get_rank() == 1
        empty = window == 0 and dist.get_rank() == 1
        result = step(None if empty else rows(4, seed=dist.get_rank(), dtype=torch.float32))
        found.append((result.skipped, precision.scaler.get_scale()))
    return found


@pytest.mark.parametrize("name", ["default", "views of buckets"])
def test_fp16_overflow_on_one_rank_is_skipped_on_all_and_the_scale_agrees(ranks, name):
    expected = [(None, 256.0), ("overflow", 128.0), (None, 128.0), (None, 128.0)]
    assert ranks(2).run(scaler, name) == [expected] * 2


# --- windows ---


def called_with_none() -> list[Any]:
    """One rank has no samples, each in turn, then both."""
    model = wrap(layers())
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=WrappedSync())
    found: list[Any] = []
    for who in ({0}, {1}, {0, 1}, set(), {0}):
        result = step(rows(3) if dist.get_rank() in who else None)
        found.append((result.skipped, result.weight, "StepResult" in repr(result)))
    return found


def test_step_none_on_some_ranks_or_all_is_a_share_of_no_samples(ranks):
    of_one, of_none = (None, 3, True), ("no weight", 0, True)
    for found in ranks(2).run(called_with_none):
        assert found == [of_one, of_one, (None, 6, True), of_none, of_one]


def nan_on_one_rank(nonfinite: Any) -> tuple[list[str | None], bool]:
    model = layers()
    step = mb.TrainStep(
        wrap(model),
        SGD(model.parameters(), lr=0.1),
        mean_square,
        micro_batch=2,
        nonfinite=nonfinite,
        sync=WrappedSync(),
    )
    step(rows(4))
    before = bits(model)
    batch = rows(4)
    batch[1] = float("nan") if dist.get_rank() else 1.0
    try:
        outcome = step(batch).skipped
    except mb.errors.NonFiniteError as error:
        outcome = type(error).__name__
    unchanged = bits(model) == before
    return [outcome, step(rows(4)).skipped], unchanged


@pytest.mark.parametrize(("nonfinite", "outcome"), [("raise", "NonFiniteError"), ("skip", "not finite")])
def test_nan_on_one_rank_is_treated_alike_on_all(ranks, nonfinite, outcome):
    for found, unchanged in ranks(2).run(nan_on_one_rank, nonfinite):
        assert found == [outcome, None]
        assert unchanged


def nan_then_none() -> list[str | None]:
    """A rank without samples runs an old micro-batch; not one that has poisoned a window."""
    model = layers()
    step = mb.TrainStep(
        wrap(model), SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, nonfinite="skip", sync=WrappedSync()
    )
    bad = rows(4) * (float("nan") if dist.get_rank() else 1.0)
    return [step(rows(4)).skipped, step(bad).skipped, step(None if dist.get_rank() else rows(4)).skipped]


def test_rank_without_samples_does_not_run_a_poisoned_micro_batch_again(ranks):
    assert ranks(2).run(nan_then_none) == [[None, "not finite", None]] * 2


def batch_norm(sizes: list[list[int]]) -> tuple[list[float], bool]:
    """How many micro-batches the statistics have seen, by window, and whether they are the same on all ranks."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    step = mb.TrainStep(wrap(model), SGD(model.parameters(), lr=0.1), mean_square, micro_batch=3, sync=WrappedSync())
    tracked: list[float] = []
    same = True
    for window, nums in enumerate(sizes):
        num = nums[dist.get_rank()]
        step(rows(num, seed=10 * window + dist.get_rank()) if num else None)
        tracked.append(float(model[1].num_batches_tracked))  # pyright: ignore[reportArgumentType]
        same &= same_everywhere(bits(model))
    return tracked, same


def test_window_batch_norm_statistics_are_the_same_on_all_ranks(ranks):
    for _, same in ranks(2).run(batch_norm, [[6, 6], [3, 9]]):
        assert same


def test_window_batch_norm_on_a_rank_without_samples_works(ranks):
    ranks(2, IMPATIENT_S).run(batch_norm, [[6, 0], [0, 3]])


def two_of_four() -> tuple[float, bool]:
    """Ranks 0 and 1 train one model, ranks 2 and 3 another."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, member = divmod(dist.get_rank(), 2)
    model, alone = layers(), layers()
    windows = [window[2 * number : 2 * number + 2] for window in data([[[3, 1], [2], [1], [4, 4]]] * 2)]
    run(alone, mean_square, [[x for share in pair for x in share] for pair in windows], sync="local")
    wrapped = wrap(model, process_group=groups[number])
    run(wrapped, mean_square, [pair[member] for pair in windows], sync=WrappedSync())
    off = relative_error(dict(model.named_parameters()), dict(alone.named_parameters()))
    same = same_everywhere(bits(model), groups[number])
    del wrapped
    dist.destroy_process_group(groups[number])
    return off, same


def test_group_two_of_four_ranks_train_by_themselves(ranks):
    for off, same in ranks(4).run(two_of_four):
        assert off <= EXACT
        assert same


# --- what it takes ---


def not_wrapped() -> str:
    model = layers()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=WrappedSync())
    with pytest.raises(mb.errors.ArgumentError) as raised:
        step(rows(2))
    return raised.value.what


def test_model_that_is_not_wrapped_is_refused(ranks):
    assert ranks(2).run(not_wrapped) == ["model"] * 2


def found_out() -> bool:
    model = wrap(layers())
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2)
    return isinstance(step._step.sync, WrappedSync)


def test_auto_takes_a_wrapped_model_for_what_it_is(ranks):
    assert all(ranks(2).run(found_out))


def replicas_forked() -> str:
    """Replicas that DDP was told not to make equal."""
    model = layers()
    with torch.no_grad():
        model[0].weight.add_(0.01 * dist.get_rank())
    wrapped = wrap(model, init_sync=False)
    step = mb.TrainStep(wrapped, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=WrappedSync())
    try:
        step(rows(2))
    except mb.errors.PeerError as error:
        return error.what
    return "passed"


def test_cross_check_replicas_that_differ_are_refused(ranks):
    assert ranks(2).run(replicas_forked) == ["the parameters of the first window"] * 2
