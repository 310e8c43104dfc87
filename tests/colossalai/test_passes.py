"""Passes over the loader: of several engines, for evaluation, resumed; and over ranks, with their tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import macrobatch.colossalai as colossalai
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.engine.gradient_accumulation import GradAccumDataloader
from macrobatch.colossalai.utils import get_dataloader, load_checkpoint, save_checkpoint
from macrobatch.testing.reference import gradients_of, relative_error

pytestmark = pytest.mark.xdist_group("ranks")

EXACT = 1e-12  # float64: a few hundred roundings of 1e-16


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    gpc.destroy()


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def dataset(num: int) -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(num, 4, dtype=torch.float64), torch.randint(0, 3, (num,)))


def started(batches: Any, model: nn.Module, lr: float = 0.0, **config: Any) -> tuple[Any, Any, list[Any]]:
    """Engine, loader, and the gradients of its updates."""
    gpc.load_config(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(gradients_of(model)))
    engine, batches, *_ = colossalai.initialize(model, optimizer, nn.CrossEntropyLoss(), batches, verbose=False)
    return engine, batches, seen


def iterate(engine: Any, x: Tensor, y: Tensor) -> None:
    engine.zero_grad()
    engine.backward(engine.criterion(engine(x), y))
    engine.step()


def gradient(model: nn.Module, data: TensorDataset, rows: Any) -> dict[str, Tensor]:
    x, y = data[rows]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    return dict(zip(names, gradients, strict=True))


def same(found: Any, wanted: dict[str, Tensor]) -> bool:
    return relative_error(found, wanted) <= EXACT


# --- one loader, several engines ---


@pytest.mark.parametrize("num_steps", [1, 2])
def test_engines_that_share_a_loader_have_exact_windows_each(num_steps):
    """As a GAN's two: the loader goes through both calls of initialize. One of them may step more often per batch."""
    data = dataset(11)
    first, second = network(), network()
    one, batches, seen_by_one = started(DataLoader(data, batch_size=2), first, gradient_accumulation=4)
    other, batches, seen_by_other = started(batches, second, gradient_accumulation=4)
    assert not isinstance(batches.dataloader, GradAccumDataloader)
    for x, y in batches:
        for _ in range(num_steps):
            iterate(one, x, y)
        iterate(other, x, y)
    assert (other.num_iterations, other.num_updates) == (6, 2)
    assert same(seen_by_other[0], gradient(second, data, slice(0, 8)))
    assert same(seen_by_other[1], gradient(second, data, slice(8, 11)))
    assert one.num_iterations == 6 * num_steps
    assert one.optimizer.accumulate_step == 0  # nothing is left behind
    assert one.optimizer.window.num_dropped == 0
    assert same(seen_by_one[0], gradient(first, data, slice(0, 8 // num_steps)))


# --- evaluation within a window ---


def evaluating_by_eval(engine: Any, batches: Any) -> None:
    engine.eval()
    assert sum(len(y) for _, y in batches) == 16  # all of them, also with a tail that is dropped
    engine(torch.ones(5, 4, dtype=torch.float64))
    engine.train()


def evaluating_without_gradients(engine: Any, batches: Any) -> None:
    with torch.no_grad():
        engine(torch.ones(5, 4, dtype=torch.float64))


def scheduling_forwards(engine: Any, batches: Any) -> None:
    pair = torch.ones(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    output, _, loss = engine.execute_schedule(iter([pair]), forward_only=True)
    assert not loss.requires_grad
    assert output.shape == (5, 3)


@pytest.mark.parametrize("evaluate", [evaluating_by_eval, evaluating_without_gradients, scheduling_forwards])
def test_evaluation_within_a_window_leaves_it_alone(evaluate: Callable[..., None]):
    data, model = dataset(16), network()
    engine, batches, seen = started(DataLoader(data, batch_size=2), model, gradient_accumulation=4)
    for index, (x, y) in enumerate(batches):
        if index in (0, 2, 5):
            evaluate(engine, batches)
        iterate(engine, x, y)
    assert engine.num_iterations == 8
    assert len(seen) == 2
    for number in range(2):
        assert same(seen[number], gradient(model, data, slice(8 * number, 8 * number + 8)))


def test_evaluation_is_not_counted_as_a_batch():
    """Without the loader, the first forward of a micro-iteration tells how many samples it has."""
    data, model = dataset(8), network()
    engine, _, seen = started(None, model, gradient_accumulation=2)
    for rows in (slice(0, 6), slice(6, 8)):
        evaluating_without_gradients(engine, None)
        iterate(engine, *data[rows])
    evaluating_without_gradients(engine, None)
    assert engine.optimizer.accumulate_step == 0
    assert same(seen[0], gradient(model, data, slice(0, 8)))


# --- batches in other forms ---


class Endless(IterableDataset):
    """Has no length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(dataset(10)))


def test_a_stream_without_a_length_ends_its_last_window():
    data, model = dataset(10), network()
    engine, batches, seen = started(DataLoader(Endless(), batch_size=2), model, gradient_accumulation=4)
    for x, y in batches:
        iterate(engine, x, y)
    assert len(seen) == 2
    assert same(seen[1], gradient(model, data, slice(8, 10)))


def test_the_loader_has_the_attributes_of_its_own():
    _, batches, _ = started(DataLoader(dataset(10), batch_size=2), network(), gradient_accumulation=4)
    assert (batches.batch_size, len(batches), batches.steps_per_epoch) == (2, 5, 5)
    assert batches.sampler is batches.dataloader.sampler


# --- resume within a window, through a checkpoint and the loader ---


def trained(folder: Path, stop: int | None) -> list[Tensor]:
    """Weights after an epoch of 11 micro-batches in windows of 4; if `stop`, begun anew after that many of them."""

    def build() -> tuple[Any, Any, nn.Module, Any]:
        gpc.load_config({"gradient_accumulation": 4, "clip_grad_norm": 0.05})
        model = network().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        batches = get_dataloader([(x.float(), y) for x, y in dataset(44)], shuffle=False, batch_size=2)
        engine, batches, _, schedule = colossalai.initialize(
            model, optimizer, nn.CrossEntropyLoss(), batches, None, schedule, verbose=False
        )
        return engine, batches, model, schedule

    engine, batches, model, schedule = build()
    for index, (x, y) in enumerate(batches):
        if index == stop:
            save_checkpoint(folder / "a.pt", 0, model, engine.optimizer, schedule, engine)
            break
        iterate(engine, x, y)
        schedule.step()
    if stop is not None:
        engine, batches, model, schedule = build()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        load_checkpoint(folder / "a.pt", model, engine.optimizer, schedule, engine=engine)
        for index, (x, y) in enumerate(batches):
            if index >= stop:
                iterate(engine, x, y)
                schedule.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stop", [3, 4, 9])
def test_resume_through_the_loader_gives_the_same_bits(tmp_path, stop):
    assert equal(trained(tmp_path, None), trained(tmp_path, stop))


def test_resume_of_two_ranks_gives_the_same_bits(ranks, tmp_path):
    straight = ranks(2).run(trained, tmp_path, None)
    resumed = ranks(2).run(trained, tmp_path, 6)
    assert equal(straight[0], straight[1])
    for rank in range(2):
        assert equal(straight[rank], resumed[rank])


# --- two ranks, a loader, a tail, clipping and a schedule ---


def epoch_on_rank(limit: float) -> tuple[list[Any], list[float], int, bool]:
    gpc.load_config({"gradient_accumulation": 4, "clip_grad_norm": limit})
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(gradients_of(model)))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0)  # the weights move once
    batches = get_dataloader(dataset(23), batch_size=2)
    engine, batches, _, schedule = colossalai.initialize(
        model, optimizer, nn.CrossEntropyLoss(), batches, None, schedule, verbose=False
    )
    rates: list[float] = []
    for x, y in batches:
        iterate(engine, x, y)
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    whole = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, whole)
    return seen, rates, engine.num_updates, all(torch.equal(whole, other) for other in others)


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_two_ranks_share_a_loader_with_a_tail(ranks, limit):
    """12 samples each (one twice) in 6 micro-batches: a window of 4, and one of 2."""
    results = ranks(2).run(epoch_on_rank, limit)
    data = dataset(23)
    of_ranks = [list(range(0, 23, 2)), [*range(1, 23, 2), 0]]
    for seen, rates, num_updates, is_equal in results:
        assert (num_updates, is_equal) == (2, True)
        assert rates == [0.1, 0.1, 0.1, 0.0, 0.0, 0.0]
        model = network()
        for found, part in zip(seen, (slice(0, 8), slice(8, 12)), strict=True):
            wanted = gradient(model, data, [row for rows in of_ranks for row in rows[part]])
            norm = torch.stack([each.norm() for each in wanted.values()]).norm()
            if limit:
                assert norm > limit
                wanted = {name: each * (limit / (norm + 1e-6)) for name, each in wanted.items()}
            assert same(found, wanted)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= 0.1 * wanted[name]
