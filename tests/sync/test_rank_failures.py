"""A rank that fails under `ReplicatedSync`: the others hear of it, nothing has changed anywhere, and training goes on.
Under the other strategies, whose collectives are in the forward and backward, the others end by the group's timeout.

Every job ends in bounded time: a rank that waits for one that does not come makes the collective, and the test, fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import macrobatch as mb
from macrobatch.sync import ReplicatedSync
from macrobatch.testing.reference import relative_error
from tests.sync.windows import EXACT, bits, same_everywhere

pytestmark = pytest.mark.xdist_group("ranks")

F64 = torch.float64
SMALL = 128  # bytes: several buckets, so that some have left when a backward fails


def rows(num: int, *, seed: int) -> Tensor:
    return torch.randn(num, 6, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Fuse(torch.autograd.Function):
    """The identity, whose backward asks `blow` before it goes on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blow: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.blow = blow
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.blow(grads[0]), None


class Net(nn.Module):
    """Has all that a window may leave changed: statistics, random numbers, and a backward that may fail halfway."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 3)
        self.double()
        self.blow: Callable[[Tensor], Tensor] = lambda grad: grad

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.first(x)))
        return self.last(Fuse.apply(hidden, lambda grad: self.blow(grad)))  # pyright: ignore[reportArgumentType]


class Boom(RuntimeError):
    """What the failing rank raises."""


class Saboteur:
    """A run on one rank, which goes wrong at a given place while `armed`."""

    def __init__(self, where: str, *, counts: bool = False, **options: Any) -> None:
        self.where, self.armed, self.num_seen = where, False, 0
        self.net = Net()
        self.net.blow = self.in_backward
        self.optimizer = AdamW(self.net.parameters(), lr=1e-2)
        self.step = mb.TrainStep(
            self.net,
            self.optimizer,
            self.loss_fn,
            micro_batch=3,
            listeners=[self.listen],
            count=self.count if counts else None,
            sync=ReplicatedSync(bucket_bytes=SMALL),
            **options,
        )

    def fails(self, where: str) -> bool:
        return self.armed and self.where == where

    def loss_fn(self, net: Any, x: Tensor) -> Any:
        self.num_seen += 1
        if self.fails("first forward") or (self.fails("last forward") and self.num_seen == 3):
            raise Boom
        if self.fails("call from its own window"):
            self.step(x)
        if self.fails("zero_grad"):
            net.zero_grad()
        loss = mb.Loss(net(x).square().sum(), len(x))
        return "a string" if self.fails("loss") else loss

    def in_backward(self, grad: Tensor) -> Tensor:
        if self.fails("first backward") or (self.fails("last backward") and self.num_seen == 3):
            raise Boom
        return grad

    def listen(self, event: mb.Event) -> None:
        if self.fails("listener") and isinstance(event, mb.MicroBatchDone):
            raise Boom

    def count(self, x: Tensor) -> Any:
        if self.fails("count"):
            raise Boom
        return {"count is negative": -1, "count is None": None, "count is a string": "many"}.get(
            self.where if self.armed else "", len(x)
        )

    def batch(self, seed: int) -> Any:
        x = rows(9, seed=2 * seed + dist.get_rank())
        return {"x": x, "y": x[:4]} if self.fails("split") else x

    def stream(self, seed: int) -> Iterator[Any]:
        yield from rows(9, seed=2 * seed + dist.get_rank()).split(3)
        if self.fails("iterator"):
            raise Boom
        if self.fails("ragged micro-batch"):
            yield {"x": rows(2, seed=0), "y": rows(3, seed=0)}

    def window(self, seed: int) -> str | None:
        """One window; the name of what it raised."""
        self.num_seen = 0
        try:
            with torch.inference_mode(self.fails("inference mode") or self.fails("window in inference mode")):
                if self.where in ("iterator", "ragged micro-batch"):
                    self.step.window(self.stream(seed))
                elif self.fails("no micro-batches"):
                    self.step.window(3)  # pyright: ignore[reportArgumentType]
                elif self.where in ("window in inference mode", "no micro-batches"):
                    self.step.window(list(self.stream(seed)))
                else:
                    self.step(self.batch(seed))
        except Exception as error:
            return type(error).__name__
        return None

    def state(self) -> Any:
        """All that a window may change, for comparison."""
        moments = [value.tolist() for state in self.optimizer.state.values() for value in state.values()]
        return bits(self.net), moments, torch.get_rng_state().tolist(), self.step.num_updates


def failure(where: str, culprit: int, num_before: int, counts: bool) -> tuple[str | None, bool, float, bool]:
    """Some windows, one that fails on one rank, and two more.

    Returns:
        What the failing window raised; whether it left everything as it was; how far the end is from a run without the
        failure; whether replicas are equal.
    """
    ends: list[dict[str, Tensor]] = []
    error, unchanged = None, False
    for fails in (False, True):
        torch.manual_seed(dist.get_rank())
        run = Saboteur(where, counts=counts)
        for seed in range(num_before):
            assert run.window(seed) is None
        if fails:
            before = run.state()
            run.armed = dist.get_rank() == culprit
            error = run.window(100)
            run.armed = False
            unchanged = run.state() == before
        for seed in (200, 201):
            assert run.window(seed) is None
        ends.append({name: param.detach().clone() for name, param in run.net.named_parameters()})
    return error, unchanged, relative_error(ends[1], ends[0]), same_everywhere(bits(run.net))


def check(found: list[Any], culprit: int, expected: str) -> None:
    for rank, (error, unchanged, off, same) in enumerate(found):
        assert error == (expected if rank == culprit else "PeerError")
        assert unchanged
        # The failed window can leave another guess of the scale behind; AdamW's root multiplies its rounding.
        assert off <= 100 * EXACT
        assert same


RAISES = {
    "first forward": "Boom",
    "last forward": "Boom",
    "first backward": "Boom",
    "last backward": "Boom",
    "loss": "LossError",
    "listener": "Boom",
    "call from its own window": "WindowError",
    "split": "BatchError",
    "inference mode": "LossError",
    "window in inference mode": "LossError",
    "no micro-batches": "BatchError",
}


@pytest.mark.parametrize("num_before", [0, 2], ids=["first window", "later window"])
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("where", RAISES)
def test_error_on_one_rank_is_a_peer_error_on_the_other_and_the_next_window_works(ranks, where, culprit, num_before):
    check(ranks(2).run(failure, where, culprit, num_before, False), culprit, RAISES[where])


@pytest.mark.parametrize("where", ["last backward", "split"])
def test_error_on_one_of_four_ranks_is_a_peer_error_on_the_others(ranks, where):
    check(ranks(4).run(failure, where, 2, 0, False), 2, RAISES[where])


@pytest.mark.parametrize("num_before", [0, 2], ids=["first window", "later window"])
@pytest.mark.parametrize("where", ["first forward", "split", "count"])
def test_error_on_one_rank_with_weights_counted_ahead_is_a_peer_error_on_the_other(ranks, where, num_before):
    expected = "Boom" if where == "count" else RAISES[where]
    check(ranks(2).run(failure, where, 1, num_before, True), 1, expected)


@pytest.mark.parametrize("num_before", [0, 2], ids=["first window", "later window"])
@pytest.mark.parametrize("where", ["count is negative", "count is a string", "count is None"])
def test_count_of_no_weight_on_one_rank_is_a_peer_error_on_the_other(ranks, where, num_before):
    check(ranks(2).run(failure, where, 1, num_before, True), 1, "LossError")


@pytest.mark.parametrize("num_before", [0, 2], ids=["first window", "later window"])
@pytest.mark.parametrize(("where", "expected"), [("iterator", "Boom"), ("ragged micro-batch", "BatchError")])
def test_error_in_the_micro_batches_of_one_rank_is_a_peer_error_on_the_other(ranks, where, expected, num_before):
    check(ranks(2).run(failure, where, 1, num_before, False), 1, expected)


@pytest.mark.parametrize("num_before", [0, 2], ids=["first window", "later window"])
def test_zero_grad_in_loss_fn_on_one_rank_is_a_peer_error_on_the_other(ranks, num_before):
    check(ranks(2).run(failure, "zero_grad", 1, num_before, False), 1, "GradientError")


def all_fail(where: str) -> tuple[list[str | None], bool]:
    run = Saboteur(where, counts=True)
    run.armed = True
    errors = [run.window(0)]
    run.armed = False
    errors += [run.window(1), run.window(2)]
    return errors, same_everywhere(bits(run.net))


@pytest.mark.parametrize("where", ["first forward", "last backward", "split", "count", "zero_grad"])
def test_error_on_all_ranks_in_the_first_window_is_their_own_and_the_next_window_works(ranks, where):
    names = {"split": "BatchError", "zero_grad": "GradientError"}
    for errors, same in ranks(2).run(all_fail, where):
        assert errors == [names.get(where, "Boom"), None, None]
        assert same


def gradient_replaced() -> tuple[list[str | None], float, bool]:
    """A hook of the user's replaces a gradient of the bucket that leaves last, when others are under way; the end is
    compared with a run without that window."""
    ends: list[dict[str, Tensor]] = []
    errors: list[str | None] = []
    run = Saboteur("nowhere")
    for replaces in (False, True):
        torch.manual_seed(dist.get_rank())
        run = Saboteur("nowhere")
        run.window(0)
        if replaces:
            hook = run.net.first.weight.register_post_accumulate_grad_hook(_double)
            errors.append(run.window(1))
            hook.remove()
        errors += [run.window(2), run.window(3)]
        ends.append({name: param.detach().clone() for name, param in run.net.named_parameters()})
    return errors, relative_error(ends[1], ends[0]), same_everywhere(bits(run.net))


def _double(param: Tensor) -> None:
    param.grad = None if param.grad is None else 2 * param.grad


def test_gradient_replaced_in_a_window_is_refused_and_the_next_window_is_right(ranks):
    for errors, off, same in ranks(2).run(gradient_replaced):
        assert errors == [None, None, "GradientError", None, None]
        assert off <= 100 * EXACT  # AdamW's root multiplies rounding
        assert same


def gradient_replaced_in_an_early_bucket(how: str) -> list[str | None]:
    """As the bucket leaves, or when it has left; then the window after it."""
    run = Saboteur("nowhere")
    last = run.net.last.weight

    def replace(grad: Tensor) -> Tensor:
        last.grad = torch.ones_like(last)
        return grad

    if how == "before":
        hook = last.register_post_accumulate_grad_hook(_double)
        said = [run.window(0)]
        hook.remove()
    else:
        run.net.blow = replace  # a layer below
        said = [run.window(0)]
        run.net.blow = run.in_backward
    return [*said, run.window(1)]


@pytest.mark.parametrize("how", ["before", "after"])
def test_gradient_replaced_whose_bucket_leaves_early_is_refused(ranks, how):
    assert ranks(2).run(gradient_replaced_in_an_early_bucket, how) == [["GradientError", None]] * 2


def interrupted() -> tuple[list[str], float, bool]:
    """Ctrl-C, which reaches all ranks, after some buckets have left; the window after it is compared with one
    process."""
    run = Saboteur("nowhere")
    run.window(0)
    run.net.blow = _interrupt
    seen: list[str] = []
    try:
        run.step(rows(6, seed=dist.get_rank()))
    except KeyboardInterrupt:
        seen.append("KeyboardInterrupt")
    run.net.blow = lambda grad: grad
    run.net.eval()  # so that the split changes nothing
    batch = rows(10, seed=7)
    expected = torch.autograd.grad(run.net(batch).square().sum() / 10, list(run.net.parameters()))
    run.step(batch[:4] if dist.get_rank() else batch[4:])
    found = {name: param.grad for name, param in run.net.named_parameters()}
    off = relative_error(found, dict(zip(found, expected, strict=True)))
    return seen, off, same_everywhere(bits(run.net))


def _interrupt(grad: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_interrupt_on_all_ranks_with_buckets_under_way_leaves_the_next_window_right(ranks):
    for seen, off, same in ranks(2).run(interrupted):
        assert seen == ["KeyboardInterrupt"]
        assert off <= EXACT
        assert same


def listener_after_the_update() -> tuple[list[str | None], bool]:
    run = Saboteur("nowhere")

    def listen(event: mb.Event) -> None:
        if dist.get_rank() == 1 and isinstance(event, mb.Updated) and event.num_updates == 1:
            raise Boom

    run.step.listeners.append(listen)
    return [run.window(0), run.window(1), run.window(2)], same_everywhere(bits(run.net))


def test_listener_failing_after_the_update_on_one_rank_leaves_replicas_equal(ranks):
    first, second = ranks(2).run(listener_after_the_update)
    assert first == ([None, None, None], True)
    assert second == (["Boom", None, None], True)


# --- numbers that are not finite ---


def not_finite(number: float, place: str, nonfinite: Any, num_before: int) -> tuple[Any, bool, bool, bool]:
    """Rank 1 has a bad number in one micro-batch.

    Returns:
        The error or the reason to skip; whether all is as it was, but for the generators that a skipped window has
        moved; whether replicas are equal; whether the next window makes an update.
    """
    run = Saboteur("nowhere", nonfinite=nonfinite)
    for seed in range(num_before):
        run.window(seed)
    batch = rows(9, seed=dist.get_rank())
    if dist.get_rank() == 1 and place == "loss":
        batch[4] = number
    if dist.get_rank() == 1 and place == "gradient":
        run.net.blow = lambda grad: grad * number
    before = run.state()
    try:
        outcome = run.step(batch).skipped
    except mb.errors.NonFiniteError as error:
        outcome = type(error).__name__
    run.net.blow = lambda grad: grad
    after = run.state()
    unchanged = after[:2] == before[:2] and after[3] == before[3]
    same = same_everywhere(bits(run.net))
    return outcome, unchanged, same, run.window(50) is None


@pytest.mark.parametrize("num_before", [0, 2], ids=["first window", "later window"])
@pytest.mark.parametrize(("nonfinite", "outcome"), [("raise", "NonFiniteError"), ("skip", "not finite")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_number_not_finite_on_one_rank_is_treated_alike_on_all(ranks, number, place, nonfinite, outcome, num_before):
    for found in ranks(2).run(not_finite, number, place, nonfinite, num_before):
        assert found == (outcome, True, True, True)


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_nan_ignored_reaches_all_ranks_alike(ranks, place):
    for outcome, unchanged, same, _ in ranks(2).run(not_finite, float("nan"), place, "ignore", 1):
        assert outcome is None
        assert not unchanged
        assert same


def overflow(num_empty: int) -> list[tuple[str | None, float]]:
    """An fp16 run that overflows on rank 1 alone, in its second window; by window, why it was skipped and the scale.

    Args:
        num_empty: rank 1 has no samples in so many windows at the start.
    """
    precision = mb.Fp16("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3))
    run = Net().float()
    bad = [False]
    run.blow = lambda grad: grad * float("inf") if bad[0] else grad
    step = mb.TrainStep(
        run,
        SGD(run.parameters(), lr=0.01),
        lambda net, x: net(x).float().square().mean(),
        micro_batch=3,
        precision=precision,
        sync=ReplicatedSync(bucket_bytes=SMALL),
    )
    found: list[tuple[str | None, float]] = []
    for window in range(6):
        bad[0] = window == 1 and dist.get_rank() == 1
        batch = rows(6, seed=2 * window + dist.get_rank()).float()
        result = step(None if window < num_empty and dist.get_rank() == 1 else batch)
        found.append((result.skipped, precision.scaler.get_scale()))
        assert same_everywhere((bits(run), found))
    return found


def test_fp16_overflow_on_one_rank_is_skipped_on_all_and_the_scale_agrees(ranks):
    expected = [(None, 256.0), ("overflow", 128.0), (None, 128.0), (None, 128.0), (None, 256.0), (None, 256.0)]
    assert ranks(2).run(overflow, 0) == [expected] * 2


def test_fp16_rank_without_samples_in_the_first_window_agrees_on_the_scale(ranks):
    expected = [(None, 256.0), ("overflow", 128.0), (None, 128.0), (None, 128.0), (None, 256.0), (None, 256.0)]
    assert ranks(2).run(overflow, 1) == [expected] * 2


# --- ranks that do not fit together ---


def terms_on_an_empty_rank(kind: str) -> tuple[str | None, float]:
    """The first window's error, or else its weight; rank 1 has no samples."""
    net = Net()
    names = {"one named": ["nll"], "one named, counted": ["nll"]}.get(kind, ["tokens", "aux"])

    def loss_fn(net: Any, x: Tensor) -> dict[str, mb.Loss]:
        return {name: mb.Loss(net(x).square().sum(), len(x)) for name in names}

    counts: Any = {
        "one named, counted": len,
        "two, counted": lambda x: dict.fromkeys(names, len(x)),
    }.get(kind)
    step = mb.TrainStep(
        net,
        SGD(net.parameters(), lr=0.1),
        loss_fn,
        micro_batch=3,
        count=counts,
        normalize="uniform" if kind == "two, uniform" else "exact",
        sync=ReplicatedSync(),
    )
    try:
        result = step(rows(6, seed=0) if dist.get_rank() == 0 else None)
    except mb.errors.MacrobatchError as error:
        return type(error).__name__, 0.0
    assert same_everywhere(bits(net))
    return None, result.weight


@pytest.mark.parametrize("kind", ["one named", "one named, counted", "two, counted"])
def test_terms_of_a_loss_that_an_empty_rank_has_not_seen_are_no_obstacle(ranks, kind):
    assert ranks(2).run(terms_on_an_empty_rank, kind) == [(None, 6.0)] * 2


def terms_differ(names: list[list[str]]) -> list[str | None]:
    net = Net()
    mine = names[dist.get_rank()]

    def loss_fn(net: Any, x: Tensor) -> dict[str, mb.Loss]:
        return {name: mb.Loss(net(x).square().sum(), len(x)) for name in mine}

    step = mb.TrainStep(
        net, SGD(net.parameters(), lr=0.1), loss_fn, micro_batch=3, normalize="uniform", sync=ReplicatedSync()
    )
    errors: list[str | None] = []
    for _ in range(2):
        try:
            step(rows(6, seed=0))
            errors.append(None)
        except mb.errors.MacrobatchError as error:  # noqa: PERF203
            errors.append(type(error).__name__)
    return errors


@pytest.mark.parametrize("names", [[["a"], ["b"]], [["a"], ["a", "b"]]], ids=str)
def test_terms_of_a_loss_that_differ_over_ranks_are_refused_on_all(ranks, names):
    assert ranks(2).run(terms_differ, names) == [["LossError"] * 2] * 2


def counts_disagree(kind: str) -> list[str | None]:
    """`count` and `loss_fn` disagree on rank 1; `count` gives other names there."""
    net, rank = Net(), dist.get_rank()

    def loss_fn(net: Any, x: Tensor) -> mb.Loss:
        return mb.Loss(net(x).square().sum(), len(x))

    def count(x: Tensor) -> Any:
        if kind == "names":
            return {"b" if rank else "a": len(x)}
        return len(x) + rank

    step = mb.TrainStep(net, SGD(net.parameters(), lr=0.1), loss_fn, micro_batch=3, count=count, sync=ReplicatedSync())
    errors: list[str | None] = []
    for _ in range(2):
        try:
            step(rows(6, seed=rank))
            errors.append(None)
        except mb.errors.LossError as error:  # noqa: PERF203
            errors.append(type(error).__name__)
    return errors


@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_counts_that_do_not_fit_the_loss_on_one_rank_are_refused_on_all(ranks, kind):
    assert ranks(2).run(counts_disagree, kind) == [["LossError"] * 2] * 2


# --- strategies that cannot tell ---


def left_alone(strategy: str, where: str) -> None:
    """Rank 1 fails in its second micro-batch, and lives on without a word."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    if strategy == "sharded":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    elif strategy == "DDP":
        model = DistributedDataParallel(model)
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    fails = dist.get_rank() == 1
    num_seen = [0]

    def blow(grad: Tensor) -> Tensor:
        if fails and num_seen[0] == 2:
            raise Boom
        return grad

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        num_seen[0] += 1
        if where == "forward":
            blow(x)
        return Fuse.apply(model(x), blow).square().mean()  # pyright: ignore[reportOptionalMemberAccess]

    mb.TrainStep(model, SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=2)(rows(4, seed=dist.get_rank()))


@pytest.mark.parametrize(("strategy", "where"), [("sharded", "forward"), ("FSDP1", "backward"), ("DDP", "backward")])
def test_error_on_one_rank_ends_the_other_by_the_group_s_timeout(ranks, strategy, where):
    (ok_0, text_0), (ok_1, text_1) = ranks(2, 16.0).outcomes(left_alone, strategy, where)  # a group's is half of it
    assert not ok_0
    assert not ok_1
    assert "Boom" in text_1
    assert "Traceback" in text_0  # it did not hang
    assert "Timed out" in text_0
