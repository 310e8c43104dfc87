"""Memory that runs out on one of several ranks: it runs its window again, alone or, if gradients had left, with all."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.plan.memory import HostMemory
from macrobatch.sync import ReplicatedSync

pytestmark = pytest.mark.xdist_group("ranks")

WIDTH = 16


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4))


def batches(sizes: list[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(sum(sizes), WIDTH, generator=generator)
    y = torch.randint(0, 4, (sum(sizes),), generator=generator)
    return [*zip(x.split(sizes), y.split(sizes), strict=True)]


class Run:
    """A step over all ranks, in memory that runs out when it is told to.

    Its loss function allocates nothing that is out of the ordinary: the limit is lowered around it, for one micro-batch
    of more than 16 samples, in the forward or in the backward.
    """

    def __init__(self, micro_batch: Any, *, victims: tuple[int, ...], where: str | None, overlap: bool) -> None:
        self.memory = HostMemory(2**40)
        self.calls: list[int] = []
        self.is_victim = dist.get_rank() in victims
        self.where = where
        self.model = network()
        torch.manual_seed(100 + dist.get_rank())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        sync = ReplicatedSync(bucket_bytes=1024, overlap=overlap)
        auto = mb.Auto(memory=self.memory) if micro_batch == "auto" else micro_batch
        self.step = mb.TrainStep(self.model, self.optimizer, self.loss_fn, micro_batch=auto, sync=sync)

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        self.memory.limit_bytes = 2**40
        self.calls.append(len(batch[0]))
        too_large = self.is_victim and len(batch[0]) > 16
        if too_large and self.where == "forward":
            self.memory.limit_bytes = self.memory.num_bytes + 4000
        first: Any = model[0]
        hook = first.register_forward_hook(self.late if too_large and self.where == "late" else unchanged)
        hidden = model(batch[0])
        hook.remove()
        if too_large and self.where == "early":
            hidden.register_hook(self.runs_out)
        return F.cross_entropy(hidden, batch[1])

    def late(self, _module: Any, _given: Any, output: Tensor) -> None:
        output.register_hook(self.runs_out)  # when the gradients of all later layers are there

    def runs_out(self, gradient: Tensor) -> Tensor:
        self.memory.limit_bytes = self.memory.num_bytes
        return gradient + 0.0

    def window(self, sizes: list[int]) -> None:
        with self.memory:
            self.step.window(batches(sizes))

    def state(self) -> list[Any]:
        tensors = [*self.model.state_dict().values(), torch.get_rng_state()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [v for s in self.optimizer.state_dict()["state"].values() for v in s.values()]
        return [t.numpy().tobytes() for t in tensors] + [self.step.state_dict()]


def unchanged(*_: object) -> None:
    pass


def compare(
    where: str, given: list[list[int]], parts: list[list[int]], victims: tuple[int, ...], overlap: bool
) -> tuple[bool, bool, list[int]]:
    """Whether the run that ran out equals the one that was smaller from the start, and another split does not."""
    rank = dist.get_rank()
    auto = Run("auto", victims=victims, where=where, overlap=overlap)
    for _ in range(2):
        auto.window(given[rank])
    direct = Run(1, victims=(), where=None, overlap=overlap)
    for _ in range(2):
        direct.window(parts[rank])
    other = Run(1, victims=(), where=None, overlap=overlap)
    for _ in range(2):
        other.window(given[rank])
    return auto.state() == direct.state(), other.state() == direct.state(), auto.calls


GIVEN = [[8, 32], [12, 20, 8]]
PARTS = {
    (0,): [[8, 16, 16], [12, 20, 8]],
    (1,): [[8, 32], [10, 2, 10, 10, 8]],
    (0, 1): [[8, 16, 16], [10, 2, 10, 10, 8]],
}


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "after"])
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=["rank 0", "rank 1", "both"])
@pytest.mark.parametrize("where", ["forward", "early", "late"])
def test_the_bits_are_those_of_a_window_that_was_smaller_from_the_start(ranks, where, victims, overlap):
    outcomes = ranks(2, timeout_s=30.0).run(compare, where, GIVEN, PARTS[victims], victims, overlap)
    assert [same for same, _, _ in outcomes] == [True, True]
    assert [other for _, other, _ in outcomes] == [False, False], "the control: another split has other bits"


def test_nobody_else_runs_again_as_long_as_no_gradient_has_left(ranks):
    outcomes = ranks(2, timeout_s=30.0).run(compare, "late", GIVEN, PARTS[1,], (1,), True)
    assert outcomes[0][2] == GIVEN[0] * 2  # rank 1 ran out in its second micro-batch of three


def test_all_run_again_once_gradients_have_left(ranks):
    outcomes = ranks(2, timeout_s=30.0).run(compare, "late", GIVEN, PARTS[0,], (0,), True)
    assert outcomes[0][2] == [8, 32, 8, 16, 16, 8, 16, 16]
    assert outcomes[1][2] == GIVEN[1] * 3  # the first window twice


def failing(where: str) -> str:
    """Rank 0 runs out of memory, and rank 1 fails for a reason of its own."""
    run = Run("auto", victims=(0,), where=where, overlap=True)
    if dist.get_rank() == 1:
        run.step._step.loss_fn = broken
    before = run.state()
    try:
        run.window(GIVEN[dist.get_rank()])
    except Exception as error:
        same = [a == b for a, b in zip(run.state()[:-1], before, strict=False)]
        return f"{type(error).__name__}, {'as before' if all(same) else 'changed'}"
    return "nothing"


def broken(*_: object) -> Tensor:
    raise KeyError("mine")


@pytest.mark.parametrize("where", ["forward", "late"])
def test_an_error_elsewhere_is_heard_of_all_the_same(ranks, where):
    assert ranks(2, timeout_s=30.0).run(failing, where) == ["PeerError, as before", "KeyError, as before"]


def hopeless() -> str:
    run = Run("auto", victims=(0,), where="forward", overlap=True)
    run.loss_fn = None
    memory = run.memory

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if run.is_victim:
            memory.limit_bytes = memory.num_bytes
        return F.cross_entropy(model(batch[0]), batch[1])

    run.step._step.loss_fn = loss_fn
    try:
        run.window([8, 8])
    except Exception as error:
        return type(error).__name__
    return "nothing"


def test_one_sample_that_does_not_fit_is_told_to_all(ranks):
    assert ranks(2, timeout_s=30.0).run(hopeless) == ["NoMemoryError", "PeerError"]


def planned() -> tuple[int, Any, bool]:
    run = Run("auto", victims=(), where=None, overlap=True)
    with run.memory:
        run.memory.limit_bytes = 150_000 if dist.get_rank() else 2**40
        (batch,) = batches([200])
        step = mb.TrainStep(
            run.model,
            run.optimizer,
            lambda model, b: F.cross_entropy(model(b[0]), b[1]),
            micro_batch=mb.Auto(memory=run.memory, remembers=False),
        )
        step(batch)
    parameters = [p.detach().numpy().tobytes() for p in run.model.parameters()]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, parameters)
    return step.split.survey.largest, step.split.size, all(other == parameters for other in everywhere)


def test_every_rank_finds_a_size_of_its_own(ranks, caplog):
    with caplog.at_level(logging.INFO):
        outcomes = ranks(2).run(planned)
    assert outcomes[0][0] == 200
    assert outcomes[1][0] < 200
    assert all(same for *_, same in outcomes)
