"""`ReplicatedSync`: what travels, when, and that nothing a model may do in a window makes replicas wrong or different.

Numbers are compared with one process that runs the micro-batches of all ranks (`off_from_alone`), in float64 and to the
promise, EXACT, unless a test says otherwise; replicas are compared bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.utils.checkpoint import checkpoint

import macrobatch as mb
from macrobatch.sync import ReplicatedSync
from macrobatch.testing.models import CASES
from macrobatch.testing.reference import full_batch_gradient, relative_error
from tests.sync.windows import (
    EXACT,
    Collectives,
    bits,
    build,
    contiguous,
    gradient_seen,
    off_from_alone,
    one_sample,
    pieces,
    run,
    same_everywhere,
    unequal,
)

pytestmark = pytest.mark.xdist_group("ranks")

F64 = torch.float64
SMALL = 128  # bytes: a bucket of a weight or two, so that small models have several
Sizes = list[list[list[int]]]


# --- what the tests are made of ---


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


TWO_WINDOWS: Sizes = [[[3, 3], [2, 1, 4]], [[1], [2, 2]]]


def layers(num: int = 3, *, width: int = 8, dtype: torch.dtype = F64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    each = [part for _ in range(num) for part in (nn.Linear(width, width, bias=bias, dtype=dtype), nn.Tanh())]
    return nn.Sequential(*each)


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).abs().square().mean()


# --- before the first window ---


def broadcast_at_start() -> tuple[bool, bool]:
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    model[0].bias.requires_grad_(False)
    model.register_parameter("phase", nn.Parameter(torch.randn(3, dtype=torch.complex128)))
    model.register_parameter("short", nn.Parameter(torch.randn(3, dtype=torch.bfloat16)))
    model.register_buffer("mask", torch.rand(4, 4) > 0.5)
    model.register_buffer("turns", torch.randn(4, dtype=torch.complex64))
    model.register_buffer("positions", torch.randint(0, 100, (5,)).expand(1, 5))
    model.register_buffer("nothing", torch.zeros(0))
    outside = torch.randn(3, dtype=F64, requires_grad=True)  # a parameter of the optimizer alone
    first = copy.deepcopy(model) if rank == 0 else None
    first_outside = outside.detach().clone()

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        return (model[2](model[0](x)) * outside).square().mean()

    trained = [param for param in [*model.parameters(), outside] if param.requires_grad]
    step = mb.TrainStep(model, SGD(trained, lr=0.0), loss_fn, micro_batch=2, sync=ReplicatedSync())
    step(rows(4, seed=rank))
    unchanged = first is None or (bits(model) == bits(first) and torch.equal(outside, first_outside))
    return same_everywhere((bits(model), outside.tolist())), unchanged


def test_begin_different_models_on_ranks_all_get_that_of_rank_0(ranks):
    for same, first_unchanged in ranks(2).run(broadcast_at_start):
        assert same
        assert first_unchanged


# --- what travels ---


def collectives_by_window(bucket_bytes: int, sizes: list[int], options: dict[str, Any]) -> list[dict[str, int]]:
    """For windows of so many micro-batches; six weights of 4,096 bytes each, 24,576 in all."""
    model = layers(6, width=32, dtype=torch.float32, bias=False)
    sync = ReplicatedSync(bucket_bytes=bucket_bytes)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=sync, **options)
    counts: list[dict[str, int]] = []
    for num_micro_batches in sizes:
        batch = rows(2 * num_micro_batches, 32, seed=dist.get_rank(), dtype=torch.float32)
        with Collectives() as collectives:
            step(batch)
        counts.append(dict(collectives.count))
    return counts


def test_window_small_model_is_one_all_reduce_whatever_the_number_of_micro_batches(ranks):
    for _, *later in ranks(2).run(collectives_by_window, 25 * 2**20, [2, 1, 4, 13], {}):
        assert later == [{"allreduce": 1}] * 3


def test_window_large_model_is_one_all_reduce_per_bucket_whatever_the_number_of_micro_batches(ranks):
    for _, *later in ranks(2).run(collectives_by_window, 2 * 4096, [2, 1, 4, 13], {}):
        assert later == [{"allreduce": 3}] * 3


@pytest.mark.parametrize(("wire_dtype", "num"), [(None, 1), (torch.bfloat16, 3)])
def test_window_without_overlap_is_cut_only_if_copies_of_it_travel(ranks, wire_dtype, num):
    for _, *later in ranks(2).run(collectives_without_overlap, wire_dtype):
        assert later == [{"allreduce": num}] * 2


def collectives_without_overlap(wire_dtype: torch.dtype | None) -> list[dict[str, int]]:
    model = layers(6, width=32, dtype=torch.float32, bias=False)
    step = mb.TrainStep(
        model,
        SGD(model.parameters(), lr=0.1),
        mean_square,
        micro_batch=2,
        sync=ReplicatedSync(bucket_bytes=2 * 4096, overlap=False, wire_dtype=wire_dtype),
    )
    counts: list[dict[str, int]] = []
    for num_rows in (4, 2, 10):
        with Collectives() as collectives:
            step(rows(num_rows, 32, dtype=torch.float32))
        counts.append(dict(collectives.count))
    return counts


def collectives_with_count() -> list[dict[str, int]]:
    model = layers(2)

    def loss_fn(model: Any, x: Tensor) -> mb.Loss:
        return mb.Loss(model(x).square().sum(), len(x))

    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=2, sync=ReplicatedSync(), count=len
    )
    counts: list[dict[str, int]] = []
    for num_rows in (4, 2, 10):
        with Collectives() as collectives:
            step(rows(num_rows))
        counts.append(dict(collectives.count))
    return counts


def test_window_counted_ahead_is_one_all_reduce_more(ranks):
    for _, *later in ranks(2).run(collectives_with_count):
        assert later == [{"allreduce": 2}] * 2


def events(overlap: bool) -> list[str]:
    """What happens in a second window of three micro-batches: gradients that become final, buckets that are sent."""
    model = layers(6, width=32, bias=False)
    seen: list[str] = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: seen.append("gradient"))
    sync = ReplicatedSync(bucket_bytes=32 * 32 * 8, overlap=overlap)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=sync)
    step(rows(6, 32, seed=dist.get_rank()))
    seen.clear()
    with _noted(seen, "sent"):
        step(rows(6, 32, seed=dist.get_rank()))
    return seen


@contextmanager
def _noted(seen: list[str], what: str) -> Generator[None]:
    all_reduce = dist.all_reduce

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(what)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = noting
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


def test_overlap_buckets_leave_during_the_last_backward_and_not_before(ranks):
    for seen in ranks(2).run(events, True):
        # The bucket of a layer leaves when its gradient is there; the one with the header, of the first layer, last.
        assert seen == ["gradient"] * 12 + ["gradient", "sent"] * 5 + ["gradient"] + ["sent"]


def test_overlap_off_buckets_leave_after_the_last_backward(ranks):
    for seen in ranks(2).run(events, False):
        assert seen == ["gradient"] * 18 + ["sent"]  # of all that a cut would only slow down


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


def branches_used(names: list[list[str]], bucket_bytes: int = SMALL) -> tuple[float, list[bool]]:
    """By rank and micro-batch, the branches in use.

    Returns:
        The distance from one process, and whether each branch's gradient was None to the optimizer.
    """

    def loss_fn(model: Any, batch: Any) -> mb.Loss:
        return mb.Loss(model(batch["x"], batch["names"]), len(batch["x"]))

    window = [
        [{"x": rows(2, seed=10 * rank + i), "names": used} for i, used in enumerate(share)]
        for rank, share in enumerate(names)
    ]
    off = off_from_alone(Branches(), loss_fn, [window, window], sync=ReplicatedSync(bucket_bytes=bucket_bytes))
    (seen,) = run(Branches(), loss_fn, [window[dist.get_rank()]], sync=ReplicatedSync(bucket_bytes=bucket_bytes))
    return off, [seen.gradients[f"branches.{index}.weight"] is None for index in range(4)]


@pytest.mark.parametrize(
    ("names", "is_none"),
    [
        ([["01", "1"], ["01", "1"]], [False, False, True, True]),
        ([["0", "01"], ["1", "12"]], [False, False, False, True]),
        ([["", ""], ["", ""]], [True, True, True, True]),
        ([["210"], ["012"]], [False, False, False, True]),
        ([[], ["1"]], [True, False, True, True]),
    ],
    ids=["in the last micro-batch", "on one rank", "on all ranks", "in another order", "on an empty rank"],
)
def test_window_unused_parameters_equal_one_process_and_are_none_if_no_rank_used_them(ranks, names, is_none):
    for off, found in ranks(2).run(branches_used, names):
        assert off <= EXACT
        assert found == is_none


def frozen_and_unfrozen() -> float:
    def before(index: int, model: nn.Module) -> None:
        model[0].requires_grad_(index != 1)  # pyright: ignore[reportIndexIssue]
        model[2].bias.requires_grad_(index > 1)  # pyright: ignore[reportIndexIssue]

    return off_from_alone(layers(), mean_square, data([*TWO_WINDOWS, *TWO_WINDOWS]), before=before)


def test_window_layers_frozen_and_unfrozen_between_windows_equals_one_process(ranks):
    assert max(ranks(2).run(frozen_and_unfrozen)) <= EXACT


def model_that_ends_frozen() -> float:
    """A frozen last layer: the bucket that would leave first has no gradient of its own."""
    model = layers(4)
    model[6].requires_grad_(False)
    return off_from_alone(model, mean_square, data(TWO_WINDOWS))


def test_window_frozen_last_layer_equals_one_process(ranks):
    assert max(ranks(2).run(model_that_ends_frozen)) <= EXACT


def tied() -> float:
    case = build("tied_lm")
    windows = [unequal(case.batch, 2), one_sample(case.batch, 2)]
    return off_from_alone(case.model, case.loss_fn, windows)


def test_window_tied_weights_equals_one_process(ranks):
    assert max(ranks(2).run(tied)) <= EXACT


# --- which backwards there are ---


def two_forwards_then_two_backwards() -> float:
    """The first backward is the loss function's own; in the last micro-batch buckets leave in it, and all that the
    second one adds comes late."""

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        first, second = model(x).square().mean(), model(2 * x).square().mean()
        first.backward()
        return second

    return off_from_alone(layers(), loss_fn, data([[[3, 3], [3, 3]], [[3, 3], [3, 3]]]))


def test_window_two_forwards_then_two_backwards_in_loss_fn_equals_one_process(ranks):
    assert max(ranks(2).run(two_forwards_then_two_backwards)) <= EXACT


class Checkpointed(nn.Module):
    """A chain of layers, each under its own checkpoint, the first one twice if `shares`."""

    def __init__(self, *, use_reentrant: bool, shares: bool) -> None:
        super().__init__()
        self.layers = layers()
        self.use_reentrant = use_reentrant
        self.shares = shares

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for layer in [*self.layers, *([self.layers[0]] if self.shares else [])]:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def checkpointed(use_reentrant: bool, shares: bool, sizes: Sizes) -> tuple[float, float, int]:
    """Distance from one process, from the same model without checkpoints, and how many parameters came late."""
    model = Checkpointed(use_reentrant=use_reentrant, shares=shares)
    plain = copy.deepcopy(model.layers)

    def loss_fn(layers: Any, x: Tensor) -> Tensor:
        x = layers(x)
        return (layers[0](x) if shares else x).square().mean()

    sync = ReplicatedSync(bucket_bytes=SMALL)
    off = off_from_alone(model, mean_square, data(sizes), sync=sync)
    off_plain = off_from_alone(plain, loss_fn, data(sizes))
    return (
        off,
        max(off_plain, relative_error(dict(model.layers.named_parameters()), dict(plain.named_parameters()))),
        len(sync._unpredictable),
    )


@pytest.mark.parametrize("shares", [False, True], ids=["", "shared weight"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-re-entrant", "re-entrant"])
def test_window_checkpointing_equals_one_process_and_no_checkpointing(ranks, use_reentrant, shares):
    for off, off_plain, num_late in ranks(2).run(checkpointed, use_reentrant, shares, [*TWO_WINDOWS, *TWO_WINDOWS]):
        assert off <= EXACT
        assert off_plain <= EXACT
        # Only a weight in two re-entrant checkpoints gets a second gradient in one backward; the test is one of that.
        assert bool(num_late) == (use_reentrant and shares)


def test_window_latecomers_on_one_rank_alone_equals_one_process(ranks):
    sizes: Sizes = [[[2, 3], []], [[], [2]], [[1], [1]]]
    for off, off_plain, _ in ranks(2).run(checkpointed, True, True, sizes):
        assert off <= EXACT
        assert off_plain <= EXACT


def gradient_penalty() -> float:
    def loss_fn(model: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return output.square().mean() + slope.square().sum(1).mean()

    return off_from_alone(layers(), loss_fn, data(TWO_WINDOWS))


def test_window_gradient_penalty_equals_one_process(ranks):
    assert max(ranks(2).run(gradient_penalty)) <= EXACT


# --- shares of any size ---


SIZES: dict[str, Sizes] = {
    "other numbers of micro-batches": [[[1, 1, 1, 1, 1], [5]], [[4], [1, 1]], [[2, 2], [2, 2]]],
    "an empty share": [[[3], []], [[], [2, 2]], [[1], [1]]],
    "an empty share first on rank 0": [[[], [3]], [[3], []]],
    "sizes that grow": [[[1], [1]], [[50, 50], [70]], [[1], [1]]],
}


def any_sizes(name: str, options: dict[str, Any]) -> float:
    return off_from_alone(layers(), mean_square, data(SIZES[name]), **options)


@pytest.mark.parametrize("name", SIZES)
def test_window_any_shares_equal_one_process(ranks, name):
    assert max(ranks(2).run(any_sizes, name, {})) <= EXACT


@pytest.mark.parametrize("name", SIZES)
def test_window_any_shares_clipped_equal_one_process(ranks, name):
    assert max(ranks(2).run(any_sizes, name, {"clip_norm": 0.01, "clip_value": 0.001})) <= EXACT


def called_with_none() -> tuple[list[Any], bool]:
    model = layers()
    reference = full_batch_gradient(model, mean_square, rows(5))
    optimizer = SGD(model.parameters(), lr=0.0)
    seen = gradient_seen(model, optimizer)
    step = mb.TrainStep(model, optimizer, mean_square, micro_batch=2, sync=ReplicatedSync(bucket_bytes=SMALL))
    found: list[Any] = []
    for turn in range(4):
        result = step(rows(5) if turn % 2 == dist.get_rank() else None)
        found.append((result.weight, result.num_samples, relative_error(seen, reference) <= EXACT))
    return found, same_everywhere(bits(model))


def test_step_none_on_one_rank_is_a_share_of_no_samples(ranks):
    first, second = ranks(2).run(called_with_none)
    assert first == ([(5, 5, True), (5, 0, True)] * 2, True)
    assert second == ([(5, 0, True), (5, 5, True)] * 2, True)


def weightless(policy: Any, nonfinite: str) -> list[Any]:
    """A window without weight on any rank, then one with: what became of each, and whether anything moved."""
    model = layers()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def loss_fn(model: Any, batch: Any) -> mb.Loss:
        x, weight = batch
        return mb.Loss(model(x).square().sum() * weight[0], len(x) * float(weight[0]))

    step = mb.TrainStep(
        model,
        optimizer,
        loss_fn,
        micro_batch=2,
        scheduler=scheduler,
        normalize=policy,
        nonfinite=nonfinite,  # pyright: ignore[reportArgumentType]
        sync=ReplicatedSync(),
    )
    found: list[Any] = []
    for weight in (1.0, 0.0, 1.0):
        before, epoch = bits(model), scheduler.last_epoch
        result = step((rows(4, seed=dist.get_rank()), torch.full((4,), weight)))
        found.append((result.skipped, result.weight, bits(model) == before, scheduler.last_epoch - epoch))
    return found


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("policy", ["exact", "uniform"])
def test_window_zero_weight_on_all_ranks_is_skipped_on_all(ranks, policy, nonfinite):
    for found in ranks(2).run(weightless, policy, nonfinite):
        assert found == [(None, 8, False, 1), ("no weight", 0, True, 0), (None, 8, False, 1)]


def nobody_has_samples() -> list[Any]:
    model = layers()
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=ReplicatedSync())
    found: list[Any] = []
    for batch in (None, rows(2), None):
        result = step(batch)
        found.append((result.skipped, result.weight, result.loss == 0.0, "StepResult" in repr(result)))
    return found


def test_step_none_on_all_ranks_is_skipped_and_can_be_read(ranks):
    nothing = ("no weight", 0, True, True)
    for found in ranks(2).run(nobody_has_samples):
        assert found == [nothing, (None, 4, False, True), nothing]


# --- what a loss may be ---


def two_terms(model: Any, x: Tensor) -> dict[str, mb.Loss]:
    y = model(x)
    weight = float(x[0, 0] > 0) + len(x)  # the terms do not share a weight
    return {"tokens": mb.Loss(y.square().sum(), weight), "aux": mb.Loss(y.sum(), 3 * len(x))}


def count_two_terms(x: Tensor) -> dict[str, float]:
    return {"tokens": float(x[0, 0] > 0) + len(x), "aux": 3 * len(x)}


TERM_SIZES: Sizes = [[[3, 3], [2, 1, 4]], [[1], [2, 2]], [[4], [4, 4, 4, 4]]]


def several_terms(sizes: Sizes, policy: Any) -> float:
    count = count_two_terms if policy == "exact" else None
    return off_from_alone(layers(), two_terms, data(sizes), count=count, normalize=policy)


def test_window_several_terms_with_count_equals_one_process(ranks):
    assert max(ranks(2).run(several_terms, TERM_SIZES, "exact")) <= EXACT


def test_window_several_terms_constant_equals_one_process(ranks):
    assert max(ranks(2).run(several_terms, TERM_SIZES, mb.Constant(5))) <= EXACT


def test_window_several_terms_uniform_is_refused(ranks):
    """Each term would need the number of micro-batches of all ranks before the first backward."""
    assert ranks(2).run(caught, "several_terms", TERM_SIZES, "uniform") == [(False, "LossError")] * 2


def losses_by_term() -> list[tuple[float, float]]:
    model = layers()
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.0), two_terms, micro_batch=2, count=count_all, sync=ReplicatedSync()
    )
    result = step(rows(4, seed=dist.get_rank()))
    (alone,) = run(
        layers(),
        two_terms,
        [[m for r in (0, 1) for m in rows(4, seed=r).split(2)]],
        sync="local",
        expected=[{name: sum(count_all(rows(4, seed=r))[name] for r in (0, 1)) for name in ("tokens", "aux")}],
    )
    return [(result.loss, alone.loss), (result.weights["aux"], 24.0), (sum(result.losses.values()), result.loss)]


def count_all(x: Tensor) -> dict[str, float]:
    counts = [count_two_terms(part) for part in x.split(2)]
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def test_step_several_terms_result_has_the_sums_over_ranks(ranks):
    for pairs in ranks(2).run(losses_by_term):
        for found, expected in pairs:
            assert found == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("policy", ["uniform", mb.Constant(5), mb.Constant(1)], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_window_other_policies_equal_one_process(ranks, name, policy):
    assert max(ranks(2).run(any_sizes, name, {"normalize": policy})) <= EXACT


def weights_with_fractions(dtype: torch.dtype, counts: bool, on_device: bool) -> float:
    def weight(x: Tensor) -> Any:
        number = x.abs().sum(dtype=F64) / 3  # class weights, for one: not an integer, not exact in float32
        return number if on_device else float(number)

    def loss_fn(model: Any, x: Tensor) -> mb.Loss:
        return mb.Loss(model(x).square().sum(), weight(x))

    def count(x: Tensor) -> dict[str, float]:
        return {"loss": float(weight(x))}

    windows = [[[x.to(dtype) for x in share] for share in window] for window in data(TWO_WINDOWS)]
    return off_from_alone(layers(dtype=dtype), loss_fn, windows, count=count if counts else None)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "tensor"])
@pytest.mark.parametrize("counts", [False, True], ids=["", "counted"])
def test_window_fractional_weights_equal_one_process(ranks, counts, on_device):
    assert max(ranks(2).run(weights_with_fractions, F64, counts, on_device)) <= EXACT
    # Weights travel in the gradients' dtype: seven digits. Two updates of sums of some 30 numbers lose one more.
    assert max(ranks(2).run(weights_with_fractions, torch.float32, counts, on_device)) <= 1e-6


def many_tokens(counts: bool) -> tuple[str | None, float]:
    """More tokens than float32 can count one by one: 20,000,003 over two ranks."""
    model = layers(dtype=torch.float32)
    num_tokens = 10_000_001 + dist.get_rank()

    def loss_fn(model: Any, x: Tensor) -> mb.Loss:
        return mb.Loss(model(x).square().mean() * num_tokens, num_tokens)

    step = mb.TrainStep(
        model,
        SGD(model.parameters(), lr=0.1),
        loss_fn,
        micro_batch=4,
        count=(lambda _: num_tokens) if counts else None,
        sync=ReplicatedSync(),
    )
    try:
        result = step(rows(4, seed=dist.get_rank(), dtype=torch.float32))
    except mb.errors.LossError as error:
        return error.what, 0.0
    return None, result.weight


@pytest.mark.parametrize("counts", [False, True], ids=["", "counted"])
def test_window_of_more_tokens_than_float32_counts_works(ranks, counts):
    for error, weight in ranks(2).run(many_tokens, counts):
        assert error is None
        assert weight == pytest.approx(20_000_003, rel=1e-7)  # weights travel in the gradients' dtype, float32 here


# --- what a model may be ---


def mixed_dtypes() -> float:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wide = nn.Linear(8, 8).double()
            self.single = nn.Linear(8, 8)
            self.short = nn.Linear(8, 8).bfloat16()
            self.phase = nn.Linear(8, 8, dtype=torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.single(torch.tanh(self.wide(x)).float()))
            return self.phase(self.short(x.bfloat16()).to(torch.complex64))

    return off_from_alone(Mixed(), mean_square, data(TWO_WINDOWS))


def test_window_model_of_four_dtypes_equals_one_process(ranks):
    # The scales of the two differ, and so does how bf16 rounds the gradients of single micro-batches: 2^-9 each.
    assert max(ranks(2).run(mixed_dtypes)) <= 2**-8


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_window_complex_model_equals_one_process(ranks, dtype):
    tolerance = 1e-6 if dtype == torch.complex64 else EXACT
    assert max(ranks(2).run(complex_model, dtype)) <= tolerance


def complex_model(dtype: torch.dtype) -> float:
    windows = [[[x.to(dtype) for x in share] for share in window] for window in data(TWO_WINDOWS)]
    return off_from_alone(layers(dtype=dtype), mean_square, windows)


def sparse_made_dense() -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 4, sparse=True), nn.Linear(4, 3)).double()
    windows = [[[torch.randint(0, 20, (num, 3)) for num in share] for share in shares] for shares in TWO_WINDOWS]
    return off_from_alone(model, mean_square, windows, sparse_grad="densify")


def test_window_sparse_gradients_made_dense_equals_one_process(ranks):
    assert max(ranks(2).run(sparse_made_dense)) <= EXACT


def parameters_without_elements() -> float:
    model = layers()
    model.register_parameter("none", nn.Parameter(torch.zeros(3, 0, dtype=F64)))
    return off_from_alone(model, mean_square, data(TWO_WINDOWS))


def test_window_parameter_without_elements_equals_one_process(ranks):
    assert max(ranks(2).run(parameters_without_elements)) <= EXACT


def bare_tensor() -> tuple[bool, float]:
    """A tensor that is in no module."""
    scale = torch.full((8,), 1.0 + dist.get_rank(), dtype=F64, requires_grad=True)

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        return (x * scale).square().mean()

    step = mb.TrainStep(nn.Identity(), SGD([scale], lr=0.1), loss_fn, micro_batch=2, sync=ReplicatedSync())
    for window in range(3):
        step(rows(4 + dist.get_rank(), seed=2 * window + dist.get_rank()))
    expected = torch.ones(8, dtype=F64)
    for window in range(3):
        whole = torch.cat([rows(4 + rank, seed=2 * window + rank) for rank in range(2)])
        expected = expected - 0.1 * 2 * expected * whole.square().mean(0) / 8
    return same_everywhere(scale.tolist()), float((scale - expected).norm() / expected.norm())


def test_window_bare_tensor_in_an_optimizer_is_trained_alike(ranks):
    for same, off in ranks(2).run(bare_tensor):
        assert same
        assert off <= EXACT


def gan(leaks: bool) -> tuple[float, bool]:
    """Two models, each with its optimizer, its step and its own micro-batches; the discriminator's loss goes through
    the generator, which thereby gets gradients that are none of its business."""

    def train(sync: Callable[[], Any], shares: Callable[[list[list[Tensor]]], list[Tensor]]) -> nn.ModuleDict:
        models = nn.ModuleDict({"g": layers(2), "d": layers(2)})
        generator, discriminator = models["g"], models["d"]

        def d_loss(model: Any, z: Tensor) -> Tensor:
            fake = generator(z) if leaks else generator(z).detach()
            return F.softplus(model(fake)).mean() + F.softplus(-model(z)).mean()

        def g_loss(model: Any, z: Tensor) -> Tensor:
            return F.softplus(-discriminator(model(z))).mean()

        d_step = mb.TrainStep(discriminator, AdamW(discriminator.parameters()), d_loss, micro_batch=1, sync=sync())
        g_step = mb.TrainStep(generator, AdamW(generator.parameters()), g_loss, micro_batch=1, sync=sync())
        for d_window, g_window in zip(data([[[2, 1], [3]]] * 3), data([[[5], [1, 1, 1]]] * 3), strict=True):
            d_step.window(shares(d_window))
            g_step.window(shares(g_window))
        return models

    alone = train(lambda: "local", lambda window: [x for share in window for x in share])
    together = train(lambda: ReplicatedSync(bucket_bytes=SMALL), lambda window: window[dist.get_rank()])
    off = relative_error(dict(together.named_parameters()), dict(alone.named_parameters()))
    return off, same_everywhere(bits(together))


@pytest.mark.parametrize("leaks", [False, True], ids=["detached", "leaking"])
def test_windows_of_a_gan_equal_one_process(ranks, leaks):
    for off, same in ranks(2).run(gan, leaks):
        # AdamW divides by the root of a mean square; three of its updates multiply rounding by some hundreds.
        assert off <= 1e-10
        assert same


def one_sync_for_two_steps() -> bool:
    models = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).double() for _ in range(2)]
    sync = ReplicatedSync()
    steps = [mb.TrainStep(m, SGD(m.parameters(), lr=0.1), mean_square, micro_batch=2, sync=sync) for m in models]
    for window in range(4):
        steps[window % 2](rows(4, seed=10 * window + dist.get_rank()))
    steps[0](rows(4, seed=dist.get_rank()))
    return same_everywhere([bits(model) for model in models])


def test_two_steps_with_one_sync_object_keep_replicas_equal_or_are_refused(ranks):
    for ok, value in ranks(2).run(caught, "one_sync_for_two_steps"):
        assert value if ok else "ArgumentError" in value


def caught(name: str, *args: Any) -> tuple[bool, Any]:
    """A job's result, or the name of what it raised."""
    try:
        return True, globals()[name](*args)
    except Exception as error:
        return False, type(error).__name__


# --- module buffers ---


def batch_norm(sizes: list[list[int]]) -> tuple[bool, bool, float]:
    """Are buffers the same after each window; those of rank 0 from its own samples?"""
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    torch.manual_seed(0)
    nn.init.normal_(model[0].weight)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.0), mean_square, micro_batch=3, sync=ReplicatedSync())
    same = True
    expected = [buffer.clone() for buffer in model.buffers()]
    for window, nums in enumerate(sizes):
        samples = rows(nums[rank], seed=10 * window + rank) if nums[rank] else None
        step(samples)
        same &= same_everywhere(bits(model))
    if rank == 0:
        alone = nn.BatchNorm1d(8).double()
        for window, nums in enumerate(sizes):
            for part in rows(nums[0], seed=10 * window).split(3) if nums[0] else ():
                alone(model[0](part))
        expected = list(alone.buffers())
        own = all(torch.equal(a, b) for a, b in zip(model[1].buffers(), expected, strict=True))
        return same, own, float(model[1].num_batches_tracked)  # pyright: ignore[reportArgumentType]
    return same, True, float(model[1].num_batches_tracked)  # pyright: ignore[reportArgumentType]


def test_close_batch_norm_statistics_are_those_of_rank_0(ranks):
    for same, own, num_tracked in ranks(2).run(batch_norm, [[6, 9], [3, 3], [9, 0], [0, 3]]):
        assert same
        assert own
        assert num_tracked == 6


def unusual_buffers() -> bool:
    model = layers()
    model.register_buffer("mask", torch.ones(3, 3).tril().bool())
    model.register_buffer("positions", torch.arange(4).expand(3, 4))  # rows that share their memory
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=ReplicatedSync())
    step(rows(4, seed=dist.get_rank()))
    step(rows(4, seed=dist.get_rank()))
    return same_everywhere(bits(model))


def test_close_expanded_buffer_is_no_obstacle(ranks):
    assert all(ranks(2).run(unusual_buffers))


# --- staying together ---


def many_updates(options: dict[str, Any], num_updates: int) -> tuple[bool, float]:
    """Are replicas, optimizer states included, equal bit by bit; how far did they move?"""
    rank = dist.get_rank()
    model = layers(3, width=32, dtype=torch.float32)
    first = torch.cat([param.detach().clone().flatten() for param in model.parameters()])
    optimizer = AdamW(model.parameters(), lr=1e-2)
    step = mb.TrainStep(
        model, optimizer, mean_square, micro_batch=2, clip_norm=0.1, sync=ReplicatedSync(bucket_bytes=2048, **options)
    )
    for update in range(num_updates):
        step(rows(3 + (update + rank) % 4, 32, seed=100 * update + rank, dtype=torch.float32))
    moments = [state[name].tolist() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    last = torch.cat([param.detach().flatten() for param in model.parameters()])
    return same_everywhere((bits(model), moments)), float((last - first).norm() / first.norm())


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_after_20_updates_of_adamw_are_equal_bit_by_bit(ranks, world_size):
    for same, moved in ranks(world_size).run(many_updates, {}, 20):
        assert same
        assert moved > 0.01


@pytest.mark.parametrize("world_size", [2, 4])
def test_wire_dtype_bf16_replicas_never_drift(ranks, world_size):
    for same, moved in ranks(world_size).run(many_updates, {"wire_dtype": torch.bfloat16}, 20):
        assert same
        assert moved > 0.01


def wire_error(dtype: torch.dtype) -> float:
    """Relative error that sending in bf16 makes."""
    model = layers(3, width=32, dtype=dtype)
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    shares = [rows(6, 32, seed=rank, dtype=real).to(dtype) for rank in range(dist.get_world_size())]
    wide = torch.promote_types(dtype, F64)
    reference = full_batch_gradient(model, mean_square, torch.cat(shares).to(wide), dtype=wide)
    sync = ReplicatedSync(bucket_bytes=2048, wire_dtype=torch.bfloat16)
    (seen,) = run(model, mean_square, [pieces(shares[dist.get_rank()], 2)], sync=sync)
    found = {
        name: None if grad is None else torch.view_as_real(grad) if grad.is_complex() else grad
        for name, grad in seen.gradients.items()
    }
    wanted = {
        name: None if grad is None else torch.view_as_real(grad) if grad.is_complex() else grad
        for name, grad in reference.items()
    }
    return relative_error(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_wire_dtype_bf16_is_off_by_the_rounding_of_bf16(ranks, world_size, dtype):
    for error in ranks(world_size).run(wire_error, dtype):
        # bf16 rounds each share, and each sum of two, by at most 2^-9; shares of the same size as their sum, and one
        # rounding more per rank, make 2^-6 for four. The lower bound shows that bf16 travelled at all.
        assert 2**-14 < error < 2**-6


def results(options: dict[str, Any]) -> tuple[bool, bool]:
    """Are the result's numbers the same on all ranks, and those of one process?"""
    model, alone = layers(), layers()
    step = mb.TrainStep(
        model, SGD(model.parameters(), lr=0.1), mean_square, micro_batch=2, sync=ReplicatedSync(), **options
    )
    one = mb.TrainStep(alone, SGD(alone.parameters(), lr=0.1), mean_square, micro_batch=2, sync="local", **options)
    same, equal = True, True
    for update in range(3):
        shares = [rows(3 + 2 * rank, seed=2 * update + rank) for rank in range(2)]
        found, expected = step(shares[dist.get_rank()]), one(torch.cat(shares))
        numbers = (found.loss, found.weight, found.grad_norm, found.skipped)
        same &= same_everywhere(numbers)
        wanted = (expected.loss, expected.weight, expected.grad_norm)
        equal &= torch.allclose(
            torch.tensor(numbers[:3], dtype=F64), torch.tensor(wanted, dtype=F64), rtol=EXACT, atol=0
        )
    return same, equal


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.01}, {"nonfinite": "ignore"}], ids=str)
def test_step_result_is_the_same_on_all_ranks_and_that_of_one_process(ranks, options):
    assert ranks(2).run(results, options) == [(True, True)] * 2


def lbfgs(sizes: Sizes) -> tuple[float, bool]:
    make = partial(_lbfgs)
    windows = data(sizes)
    alone, together = layers(), layers()
    run(
        alone,
        mean_square,
        [[x for share in window for x in share] for window in windows],
        make_optimizer=make,
        sync="local",
    )
    run(
        together,
        mean_square,
        [window[dist.get_rank()] for window in windows],
        make_optimizer=make,
        sync=ReplicatedSync(),
    )
    off = relative_error(dict(together.named_parameters()), dict(alone.named_parameters()))
    return off, same_everywhere(bits(together))


def _lbfgs(parameters: Any, lr: float) -> LBFGS:
    return LBFGS(parameters, lr=lr, max_iter=4, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("sizes", [TWO_WINDOWS, [[[3], []], [[2], [1, 1]]]], ids=["", "an empty share"])
def test_lbfgs_over_ranks_equals_one_process(ranks, sizes):
    for off, same in ranks(2).run(lbfgs, sizes):
        # The curvature that LBFGS estimates, differences over differences, multiplies rounding by some thousands.
        assert off <= 1e-9
        assert same


# --- some of the ranks ---


def two_of_four() -> tuple[bool, float]:
    """Ranks 0 and 1 train one model, ranks 2 and 3 another."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, member = divmod(dist.get_rank(), 2)
    group = groups[number]
    model = layers()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(member)  # gone when the group's first rank has broadcast its own
    alone = layers()
    windows = data([[[3, 1], [2], [1], [4, 4]], [[1], [1, 1], [], [2]]])
    pairs = [window[2 * number : 2 * number + 2] for window in windows]
    run(alone, mean_square, [[x for share in pair for x in share] for pair in pairs], sync="local")
    sync = ReplicatedSync(group=group, bucket_bytes=SMALL)
    run(model, mean_square, [pair[member] for pair in pairs], sync=sync)
    off = relative_error(dict(model.named_parameters()), dict(alone.named_parameters()))
    same = same_everywhere(bits(model), group)
    dist.barrier()
    for each in groups:
        dist.destroy_process_group(each) if each is group else None
    return same, off


def test_group_two_of_four_ranks_train_by_themselves(ranks):
    for same, off in ranks(4).run(two_of_four):
        assert same
        assert off <= EXACT


def local_over_ranks() -> tuple[dict[str, int], float]:
    """`sync="local"` and `accumulate` stay with their process, whatever there is around it."""
    case = build("mlp")
    share = contiguous(case.batch, 2)[dist.get_rank()]
    reference = full_batch_gradient(case.model, case.loss_fn, share)
    with Collectives() as collectives:
        mb.accumulate(case.model, case.loss_fn, share, micro_batch=3)
        off = relative_error({name: param.grad for name, param in case.model.named_parameters()}, reference)
        (seen,) = run(case.model, case.loss_fn, [pieces(share, 3)], sync="local")
    return dict(collectives.count), max(off, relative_error(seen.gradients, reference))


def test_local_and_accumulate_under_torch_distributed_keep_to_their_process(ranks):
    for collectives, off in ranks(2).run(local_over_ranks):
        assert collectives == {}
        assert off <= EXACT


# --- checks ---


def changed(weight: Tensor) -> None:
    weight[0, 0] += 0.01


def permuted_rows(weight: Tensor) -> None:
    weight.copy_(weight.flip(0))


def turned(weight: Tensor) -> None:
    weight[0].neg_()


def of_the_least(weight: Tensor) -> None:
    """A thousandth of what is small beside the other parameters."""
    weight[0, 0] += 1e-3 * weight.abs().sum()


def tampered(change: str, cross_check: bool) -> str:
    """The first window changes a parameter on rank 1 alone, which is the smallest of all by far."""
    model = layers()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            with torch.no_grad():
                TAMPERING[change](model[2].weight)
        return mean_square(model, x)

    sync = ReplicatedSync(cross_check=cross_check)
    step = mb.TrainStep(model, SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=4, sync=sync)
    try:
        step(rows(4))
    except mb.errors.PeerError as error:
        return error.what
    return "passed"


TAMPERING = {change.__name__: change for change in (changed, permuted_rows, turned, of_the_least)}


@pytest.mark.parametrize("change", TAMPERING)
def test_cross_check_parameter_changed_on_one_rank_is_refused_on_all(ranks, change):
    assert ranks(2).run(tampered, change, True) == ["the parameters of the first window"] * 2


@pytest.mark.parametrize("change", TAMPERING)
def test_cross_check_off_lets_it_pass(ranks, change):
    assert ranks(2).run(tampered, change, False) == ["passed"] * 2


def no_false_alarm() -> str | None:
    """Every kind of model passes the check."""
    for kind in CASES:
        case = build(kind, torch.float32)
        model, sync = case.model, ReplicatedSync()
        window = unequal(case.batch, dist.get_world_size())[dist.get_rank()]
        run(model, case.loss_fn, [window], sync=sync)
    return None


@pytest.mark.parametrize("world_size", [2, 4])
def test_cross_check_raises_no_false_alarm(ranks, world_size):
    ranks(world_size).run(no_false_alarm)


def bad_argument(name: str, value: Any) -> str:
    with pytest.raises(mb.errors.ArgumentError) as raised:
        ReplicatedSync(**{name: value})
    return str(raised.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "25MB", None])
def test_bucket_bytes_not_a_positive_integer_is_refused(value):
    assert "bucket_bytes" in bad_argument("bucket_bytes", value)


@pytest.mark.parametrize("value", [torch.int32, torch.complex64, "bf16"])
def test_wire_dtype_not_a_floating_dtype_is_refused(value):
    assert "wire_dtype" in bad_argument("wire_dtype", value)
