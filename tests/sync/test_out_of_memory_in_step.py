"""Memory that runs out under FSDP2, anywhere in a micro-batch, on one rank or on all: all run the window again.

A dispatch mode fails as an allocator would: at an operator that makes a new tensor, whichever it is told.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb
from macrobatch.core.microstep import LossFn, MicroStep
from macrobatch.core.tally import Tally
from macrobatch.errors import ArgumentError
from macrobatch.plan.memory import HostMemory
from macrobatch.sync import Policy, ShardedSync, WrappedSync
from macrobatch.sync.realign import Realigned, _Comm, groups_in  # pyright: ignore[reportPrivateUsage]
from tests.sync.windows import Collectives

pytestmark = pytest.mark.xdist_group("ranks")

WIDTH = 16
IMPATIENT_S = 30.0
POLICIES = {
    f"{'keep' if keep else 'reshard'}-{'last' if last else 'each'}": Policy(keep_parameters=keep, reduce_last=last)
    for keep in (False, True)
    for last in (False, True)
}


class Allocator(TorchDispatchMode):
    """Runs out of memory at the n-th operator that makes a new tensor; -1: never. Counts them."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.num = 0

    def __enter__(self) -> Allocator:
        self.num = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("aten", "fsdp") and all(result.alias_info is None for result in func._schema.returns):
            self.num += 1
            if self.num == self.fails_at:
                raise torch.OutOfMemoryError(f"no room for the result of {func}")
        return func(*args, **(kwargs or {}))


def batches(sizes: list[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(sum(sizes), WIDTH, generator=generator)
    y = torch.randint(0, 4, (sum(sizes),), generator=generator)
    return [*zip(x.split(sizes), y.split(sizes), strict=True)]


class Failing(MicroStep):
    """Every micro-batch of more than so many samples runs out of memory, each at its n-th allocation, in turn."""

    def __init__(self, fails_at: tuple[int, ...], most: int) -> None:
        self.allocator = Allocator(0)
        self.most: float = most
        self.places = cycle(fails_at)
        self.is_early = False

    def window(self) -> AbstractContextManager[Any]:
        if self.is_early:
            self.is_early = False
            raise torch.OutOfMemoryError("before anything has run")
        return super().window()

    def __call__(self, loss_fn: LossFn, micro_batch: Any, num_rows: int, tally: Tally) -> None:
        is_on = num_rows > self.most
        if is_on:
            self.allocator.fails_at = next(self.places)
        with self.allocator if is_on else nullcontext():
            super().__call__(loss_fn, micro_batch, num_rows, tally)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Run:
    """Windows of a step over all ranks. Memory runs out in the last two, or not before the last."""

    def __init__(
        self,
        micro_batch: Any,
        windows: list[list[int]],
        prepare: Callable[[Any], Any],
        *,
        fails_at: tuple[int, ...] = (-1,),
        most: int = 16,
    ) -> None:
        torch.manual_seed(1)
        layers = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2))]
        self.model, sync = prepare(nn.Sequential(*layers, nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4)))
        torch.manual_seed(100 + dist.get_rank())
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.failing = Failing(fails_at, most)
        self.step = mb.TrainStep(
            self.model, optimizer, loss_fn, micro_batch=micro_batch, sync=sync, capture=self.failing
        )
        self.num_run: list[int] = []
        for sizes, is_on in zip(windows, [len(windows) < 3] * 2 + [True], strict=False):
            self.failing.most = most if is_on else math.inf
            self.num_run.append(self.step.window(batches(sizes)).num_micro_batches)

    def state(self) -> list[bytes]:
        tensors = [*self.model.state_dict().values(), torch.get_rng_state()]
        return [(t.to_local() if isinstance(t, DTensor) else t).numpy().tobytes() for t in tensors]


@cache
def mesh_of(kind: str) -> DeviceMesh:
    if kind == "hybrid":
        return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(policy: str | None, mesh: str, model: Any) -> tuple[Any, Any]:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh_of(mesh))
    return fully_shard(model, mesh=mesh_of(mesh)), ShardedSync(policy=POLICIES[policy]) if policy else "auto"


def wrapped(options: dict[str, Any], model: Any) -> tuple[Any, WrappedSync]:
    return DistributedDataParallel(model, **options), WrappedSync()


def lone(options: dict[str, Any], model: Any) -> tuple[Any, str]:
    return DistributedDataParallel(model, **options), "auto"


GIVEN = [[8, 32], [12, 20, 8], [16], [4, 4]]
PARTS = {(0,): 16, (1,): 10, (0, 1): 10}  # the least of the victims' halves


def cut(sizes: list[int], size: int) -> list[int]:
    return [part for each in sizes for part in [size] * (each // size) + [each % size] * bool(each % size)]


def anywhere(prepare: partial[Any], victims: tuple[int, ...], stride: int) -> tuple[int, list[str]]:
    """Fail at one allocation after the other. Returns how many there were, and what went wrong."""
    rank, given = dist.get_rank(), GIVEN[dist.get_rank()]
    alone = {0: 16, 1: 10}.get(rank, 0) if rank in victims else max(given)
    parts = cut(given, PARTS[victims] if prepare.func.__name__ == "sharded" else alone)
    uncut = (
        1 if prepare.func.__name__ == "sharded" else mb.Auto()
    )  # under DDP, its last micro-batch draws random numbers, too
    direct, other = Run(uncut, [parts] * 2, prepare), Run(uncut, [given] * 2, prepare)
    counting = Run(mb.Auto(), [given] * 2, prepare, fails_at=(0,))
    (num,) = most([counting.failing.allocator.num])
    problems = [] if other.state() != direct.state() else ["the control: another split has the same bits"]
    for place in range(1, num + 1, stride):
        run = Run(mb.Auto(), [given] * 2, prepare, fails_at=(place if rank in victims else -1,))
        problems += [f"at {place}: {problem}" for problem in differences(run, direct)]
    return num, problems


def again_and_again(prepare: partial[Any], victims: tuple[int, ...], first: int, stride: int) -> tuple[int, list[str]]:
    """Fail three times in the third window, whose policy may be one that was chosen: in the first or in the last of the
    micro-batches that are too large, each time at another place. Returns how many there were, and what went wrong.
    """
    is_victim = dist.get_rank() in victims
    given = [4, 32] if is_victim else [12, 8]
    direct, other = Run(1, [given, given, cut(given, 4)], prepare), Run(1, [given] * 3, prepare)
    counting = Run(mb.Auto(), [given] * 3, prepare, fails_at=(0,), most=16)
    (num,) = most([counting.failing.allocator.num])
    problems = [] if other.state() != direct.state() else ["the control: another split has the same bits"]
    for place in range(first, num + 1, stride):
        one, two, three = (1 + (place - 1 + turn * num // 3) % num for turn in range(3))
        for places in ((one, two, three), (one, 0, two, 0, 0, 0, three)):
            fails_at = places if is_victim else (0,)
            run = Run(mb.Auto(), [given] * 3, prepare, fails_at=fails_at, most=4 if is_victim else 16)
            problems += [f"at {places}: {problem}" for problem in differences(run, direct)]
    return num, problems


def differences(run: Run, direct: Run) -> list[str]:
    problems: list[str] = []
    if run.num_run != direct.num_run:
        problems.append(f"{run.num_run} micro-batches instead of {direct.num_run}")
    if run.state() != direct.state():
        problems.append("other bits")
    return problems


def most(numbers: list[int]) -> list[int]:
    tensor = torch.tensor(numbers)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


CASES = [((0,), policy) for policy in (*POLICIES, None)] + [((1,), "reshard-each"), ((0, 1), "keep-last")]


@pytest.mark.parametrize(("victims", "policy"), CASES)
def test_all_ranks_run_a_window_again_wherever_one_ran_out(ranks, victims, policy):
    outcomes = ranks(2).run(anywhere, partial(sharded, policy, "plain"), victims, 17)
    assert all(num > 20 for num, _ in outcomes), "a micro-batch was gone through from its beginning to its end"
    assert [problems for _, problems in outcomes] == [[], []]


AGAIN = [*product([(0,), (1,), (0, 1), "alone"], [*POLICIES, None])]


@pytest.mark.parametrize(("victims", "policy", "first"), [(*c, 1 + i) for i, c in enumerate(AGAIN)], ids=str)
def test_memory_may_run_out_again_and_again_in_one_window(ranks, victims, policy, first):
    """Each case begins at another place, so that a policy's cases together come by half of them or more."""
    pool, victims = (ranks(1), (0,)) if victims == "alone" else (ranks(2), victims)
    for num, problems in pool.run(again_and_again, partial(sharded, policy, "plain"), victims, first, 21):
        assert num > 20, "all begin within it"
        assert problems == []


class Anew(ShardedSync):
    """Stands in front of FSDP2's collectives again for every step, whoever stands there already."""

    def _be_ready(self) -> None:
        self._line = self._line or Realigned(self._modules)
        super()._be_ready()


def taking_turns(policy: str, fails_at: int, strategy: type[ShardedSync]) -> tuple[list[bytes], int, set[int]]:
    """Three steps with one model run two windows each, in turn. Returns the state, how many windows were run again, and
    how many stand in front of FSDP2's collectives."""
    is_cut, size = fails_at < 0, 16
    torch.manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4)]
    model, _ = sharded(policy, "plain", nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps: list[mb.TrainStep] = []
    for _ in range(3):
        options: Any = {"micro_batch": 1} if is_cut else {"micro_batch": mb.Auto()}
        capture, sync = Failing((fails_at,), size), strategy(policy=POLICIES[policy])
        steps.append(mb.TrainStep(model, optimizer, loss_fn, sync=sync, capture=capture, **options))
    is_victim = dist.get_rank() == 0
    given = [8, 2 * size] if is_victim else [4, 12]
    num_again = 0
    for step in steps * 2:
        num_run = step.window(batches(cut(given, size) if is_cut else given)).num_micro_batches
        num_again += num_run > len(given)
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    state = [(t.to_local() if isinstance(t, DTensor) else t).numpy().tobytes() for t in tensors]
    groups = groups_in(module for module in model.modules() if isinstance(module, FSDPModule))
    comms = [comm for group in groups for comm in (group._all_gather_comm, group._reduce_scatter_comm)]
    return state, num_again, {depth(comm) for comm in comms}


def depth(comm: Any) -> int:
    return 1 + depth(comm.inner) if isinstance(comm, _Comm) else 0


@pytest.mark.parametrize("policy", ["reshard-each", "keep-last"])
def test_steps_that_share_a_model_share_what_stands_before_its_collectives(ranks, policy):
    pool = ranks(2, timeout_s=IMPATIENT_S)
    expected = pool.run(taking_turns, policy, -1, ShardedSync)
    assert [deep for *_, deep in expected] == [{0}, {0}], "without room for a second run, nobody stands there"
    for fails_at in (1, 12, 25):
        outcomes = pool.run(taking_turns, policy, fails_at, ShardedSync)
        assert [state for state, *_ in outcomes] == [state for state, *_ in expected]
        assert [num_again for _, num_again, _ in outcomes] == [6, 0]
        assert [deep for *_, deep in outcomes] == [{1}, {1}]
    control = pool.run(taking_turns, policy, 12, Anew)
    assert [deep for *_, deep in control] == [{3}, {3}]


def after_an_error(policy: str) -> list[str]:
    """Every rank runs out of memory in the first or the second micro-batch of a window whose size is given; the next
    window counts. Returns where it counted something else."""

    def run(places: tuple[int, ...]) -> tuple[list[bytes], bool]:
        run = Run(1, [[8, 8]] * 2, partial(sharded, policy, "plain"))
        run.failing.most, run.failing.places = 0, cycle(places)
        try:
            run.step.window(batches([8, 8]))
        except torch.OutOfMemoryError:
            run.failing.most = math.inf
            run.step.window(batches([8, 8]))
            return run.state(), True
        return run.state(), False

    expected, _ = run((0,))
    turns = [places for place in range(1, 30, 7) for places in ((place,), (0, place))]
    return [f"at {places}" for places in turns if run(places) != (expected, True)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num", [1, 2])
def test_nothing_of_a_window_that_failed_is_in_the_next(ranks, num, policy):
    """Not the gradients that FSDP2 has not reduced yet, either."""
    assert ranks(num, timeout_s=IMPATIENT_S).run(after_an_error, policy) == [[]] * num


@pytest.mark.parametrize("policy", ["reshard-each", "keep-last"])
def test_a_hybrid_mesh_runs_a_window_again(ranks, policy):
    outcomes = ranks(4).run(anywhere, partial(sharded, policy, "hybrid"), (0,), 17)
    assert [problems for _, problems in outcomes] == [[]] * 4


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("victims", PARTS, ids=["rank 0", "rank 1", "both"])
def test_a_rank_under_ddp_runs_its_window_again_by_itself(ranks, options, victims):
    outcomes = ranks(2).run(anywhere, partial(wrapped, options), victims, 17)
    assert [problems for _, problems in outcomes] == [[], []]


def empty_later() -> list[list[Any]]:
    """Samples of each window, and parameters, where rank 1 has nothing in some windows, and memory never runs out."""
    found: list[list[Any]] = []
    for micro_batch in (mb.Auto(), 1):
        torch.manual_seed(1)
        model, sync = wrapped({}, nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=micro_batch, sync=sync)
        windows = [[8, 8], [], [8], [], []] if dist.get_rank() else [[12, 4], [8], [8, 8], [8], [4]]
        nums = [step.window(batches(sizes)).num_samples for sizes in windows]
        found.append([nums, [t.numpy().tobytes() for t in model.state_dict().values()]])
    return found


def test_a_rank_under_ddp_may_have_nothing_in_a_later_window(ranks):
    """What it runs for the others' sake is kept from its last window, with a size or without."""
    outcomes = ranks(2, timeout_s=IMPATIENT_S).run(empty_later)
    for auto, given in outcomes:
        assert auto == given
    assert [auto[0] for auto, _ in outcomes] == [[16, 8, 16, 8, 4], [16, 0, 8, 0, 0]]


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_ddp_on_a_single_rank_runs_its_window_again(ranks, options):
    ((num, problems),) = ranks(1).run(again_and_again, partial(lone, options), (0,), 1, 5)
    assert num > 20
    assert problems == []


def failing(kind: str) -> str:
    """Rank 0 fails in a way that no smaller micro-batch helps."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if dist.get_rank() == 0 and kind == "changes":
            batch[0].mul_(0.5)
        if dist.get_rank() == 0 and (kind != "changes" or len(batch[0]) > 16):
            raise torch.OutOfMemoryError("at the beginning")
        return loss_fn(model, batch)

    model, sync = sharded("reshard-each", "plain", nn.Sequential(nn.Linear(WIDTH, 4)))
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, sync=sync)
    before = [p.to_local().clone() for p in model.parameters()]
    try:
        step.window(batches([1 if kind == "single" else 20, 1]))
    except Exception as error:
        same = all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
        return f"{type(error).__name__}, {'as before' if same else 'changed'}"
    return "nothing"


def test_what_cannot_run_again_is_told_to_all(ranks):
    """The loss function raises before FSDP2 sends a thing, and again when the rank catches up: after that, all end."""
    pool = ranks(2, timeout_s=IMPATIENT_S)
    assert pool.run(failing, "changes") == ["LossError, as before", "PeerError, as before"]


def single(fails_at: int) -> tuple[str, bool, list[bytes]]:
    """Rank 0 has no room for a single sample, in the second of three windows."""
    torch.manual_seed(1)
    model, sync = sharded(None, "plain", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)))
    failing = Failing((fails_at,), 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=mb.Auto(), sync=sync, capture=failing)
    step.window(batches([4, 1]))
    before, outcome = [p.to_local().clone() for p in model.parameters()], "nothing"
    failing.most = 16 if dist.get_rank() else 0
    if fails_at:
        try:
            step.window(batches([4, 1]))
        except Exception as error:
            outcome = type(error).__name__
    failing.most = 16
    same = all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
    step.window(batches([1] * 5))
    return outcome, same, [p.to_local().detach().numpy().tobytes() for p in model.parameters()]


@pytest.mark.parametrize("fails_at", [1, 8, 16])
def test_a_single_sample_without_room_ends_the_window_on_all_ranks(ranks, fails_at):
    """And that window alone."""
    pool = ranks(2, timeout_s=IMPATIENT_S)
    outcomes, expected = pool.run(single, fails_at), pool.run(single, 0)
    assert [outcome for outcome, *_ in outcomes] == ["NoMemoryError", "PeerError"]
    assert all(same for _, same, _ in outcomes)
    assert [after for *_, after in outcomes] == [after for *_, after in expected]


def early(micro_batch: Any, sizes: list[int]) -> tuple[int, list[bytes]]:
    run = Run(micro_batch, [[8, 8]] * 2, partial(sharded, "reshard-each", "plain"))
    run.failing.is_early = dist.get_rank() == 0 and sizes == [8, 8]
    return run.step.window(batches(sizes)).num_micro_batches, run.state()


def test_memory_may_run_out_in_front_of_the_first_micro_batch(ranks):
    """When nothing of the window has been sent; what the last window has sent does not count."""
    pool = ranks(2, timeout_s=IMPATIENT_S)
    assert pool.run(early, mb.Auto(), [8, 8]) == pool.run(early, 1, [4] * 4)


def lent(micro_batch: Any, sizes: list[int], fails_at: int) -> tuple[list[bytes], list[int]]:
    """Memory runs out on rank 1 in the first window, in which rank 0 has nothing but what it was lent."""
    windows = [sizes, [8, 8]] if dist.get_rank() else [[], [4]]
    run = Run(micro_batch, windows, partial(sharded, "reshard-each", "plain"), fails_at=(fails_at,))
    return run.state(), run.num_run


def test_a_rank_that_has_nothing_yet_runs_again_what_it_was_lent(ranks):
    pool = ranks(2, timeout_s=IMPATIENT_S)
    expected, other = pool.run(lent, 1, [16, 16, 8], -1), pool.run(lent, 1, [32, 8], -1)
    assert all(a[0] != b[0] for a, b in zip(expected, other, strict=True)), "the control: another split"
    for place in (1, 12, 20):
        assert pool.run(lent, mb.Auto(), [32, 8], place) == expected


def planned(prepare: Callable[[Any], Any], limits: list[int | None]) -> Any:
    limit = limits[dist.get_rank()]
    torch.manual_seed(1)
    with HostMemory() as memory:
        model, sync = prepare(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)))
        memory.limit_bytes = limit
        auto = mb.Auto(memory=memory, remembers=False)
        step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=auto, sync=sync)
        results = [step(batches([200 + 10 * dist.get_rank()])[0]) for _ in range(2)]
        survey: Any = step.split.survey
        everywhere: list[Any] = [None] * dist.get_world_size()
        parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        dist.all_gather_object(everywhere, [p.detach().numpy().tobytes() for p in parameters])
        assert all(other == everywhere[0] for other in everywhere), "the ranks have other parameters"
    return survey.as_dict(), step.split.size, results[1].num_micro_batches


def test_ranks_in_step_find_one_size(ranks):
    """What one of them has room for decides; the one with more rows tries as many as the other has."""
    outcomes = ranks(2, timeout_s=IMPATIENT_S).run(planned, partial(sharded, "reshard-each", "plain"), [None, 60_000])
    (one, size, _), (other, *_) = outcomes
    assert one == other
    assert one["total"] == 200
    assert one["largest"] < 200, "the control: without a limit, all of it fits"
    assert size == one["size"] <= one["largest"]
    free = ranks(2).run(planned, partial(sharded, "reshard-each", "plain"), [None, None])
    assert [survey["largest"] for survey, *_ in free] == [200, 200]


def test_ranks_under_ddp_find_sizes_of_their_own(ranks):
    outcomes = ranks(2, timeout_s=IMPATIENT_S).run(planned, partial(wrapped, {}), [None, 60_000])
    assert outcomes[0][0]["largest"] == 200
    assert outcomes[1][0]["largest"] < 210


def failing_first() -> list[str]:
    """Rank 0 has a batch of which nobody can tell how many rows it has, then a good one."""
    model, sync = sharded("reshard-each", "plain", nn.Sequential(nn.Linear(WIDTH, 4)))
    auto = mb.Auto(remembers=False)
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=auto, sync=sync)
    (good,) = batches([20])
    first = (good[0], good[1][:3]) if dist.get_rank() == 0 else good
    return [num_samples_or_error(step, batch) for batch in (first, good, None if dist.get_rank() else good)]


def num_samples_or_error(step: mb.TrainStep, batch: Any) -> str:
    try:
        return str(step(batch).num_samples)
    except Exception as error:
        return type(error).__name__


def test_an_error_before_the_plan_is_told_to_all(ranks):
    outcomes = ranks(2, timeout_s=IMPATIENT_S).run(failing_first)
    assert outcomes == [["BatchError", "20", "20"], ["PeerError", "20", "0"]]


def refused(kind: str) -> str:
    model: Any = nn.Sequential(nn.Linear(WIDTH, 4))
    if kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif kind == "static graph":
        model = DistributedDataParallel(model, static_graph=True)
    else:
        fully_shard(model, mesh=mesh_of("plain"))
    sync = "auto" if kind in ("fsdp1", "static graph") else "local"
    try:
        mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch="auto", sync=sync)
    except ArgumentError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("kind", ["fsdp1", "static graph"])
def test_wrappers_that_synchronise_in_the_middle_are_refused(ranks, kind):
    for message in ranks(2, timeout_s=IMPATIENT_S).run(refused, kind):
        assert "WrappedSync" in message
        assert "micro_batch=16" in message


@pytest.mark.parametrize("num", [1, 2])
def test_a_sharded_model_cannot_stay_with_its_process(ranks, num):
    for message in ranks(num).run(refused, "fsdp2, local"):
        assert "fully_shard" in message
        assert 'leave it at "auto"' in message


def remembering(folders: list[str]) -> list[int]:
    """How many micro-batches are tried by three steps; before the last, rank 1 loses what it has remembered."""
    tried: list[int] = []
    before, rank = os.environ.get("MACROBATCH_CACHE", ""), dist.get_rank()
    os.environ["MACROBATCH_CACHE"] = folders[rank]
    for turn in range(3):
        if turn == 2 and rank == 1:
            shutil.rmtree(folders[rank])
        calls: list[int] = []

        def counted(model: nn.Module, batch: Any, calls: list[int] = calls) -> Tensor:
            calls.append(len(batch[0]))
            return loss_fn(model, batch)

        model, sync = sharded("reshard-each", "plain", nn.Sequential(nn.Linear(WIDTH, 4)))
        step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), counted, sync=sync)
        result = step(batches([20])[0])
        tried.append(len(calls) - result.num_micro_batches)
    os.environ["MACROBATCH_CACHE"] = before
    return tried


def test_what_is_remembered_counts_if_all_ranks_remember_it(ranks, tmp_path):
    first, second = ranks(2).run(remembering, [str(tmp_path / name) for name in "ab"])
    assert first == second
    assert first[0] > 0
    assert first[1] == 0
    assert first[2] > 0


def collectives_of_a_window(micro_batch: Any) -> dict[str, int]:
    model, sync = sharded("reshard-each", "plain", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=micro_batch, sync=sync)
    step.window(batches([8, 8]))
    with Collectives() as seen:
        step.window(batches([8, 8]))
    return dict(seen.count)


def test_a_window_in_which_nothing_happens_has_no_collective_more(ranks):
    given = ranks(2).run(collectives_of_a_window, 1)
    assert ranks(2).run(collectives_of_a_window, mb.Auto()) == given
    assert given[0]["reduce_scatter_base"] == 4  # two layers, two micro-batches
