"""Methods of the accelerator that few scripts call, beside the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.accelerate.doors import BOTH, OURS, entered, of_both

pytestmark = pytest.mark.xdist_group("ranks")


def gradients_of(package: str, method: str) -> list[list[float]]:
    """The gradients that the optimizer sees in two windows of two, after a method that needs them complete."""
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=2)
        module = nn.Linear(2, 1, bias=False)
        own = torch.optim.SGD(module.parameters(), lr=0.1)
        seen: list[list[float]] = []
        own.register_step_pre_hook(lambda *_: seen.append(module.weight.grad.flatten().tolist()))
        model, optimizer = accelerator.prepare(module, own)
        x = torch.tensor([[8.0, -1.0]]) * (1 + accelerator.process_index)
        for index in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(x * index).sum())
                if accelerator.sync_gradients and method == "value":
                    accelerator.clip_grad_value_(model.parameters(), 2.0)
                elif accelerator.sync_gradients:
                    accelerator.unscale_gradients(None if method == "all" else optimizer)
                optimizer.step()
                optimizer.zero_grad()
        assert accelerator.optimizer_step_was_skipped is False
        return seen


@pytest.mark.parametrize("method", ["value", "all", "one"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_methods_of_the_whole_gradient(ranks: Any, num_ranks: int, method: str):
    theirs, ours = of_both(ranks, num_ranks, gradients_of, method)
    assert ours == theirs
    scale = 1.5 if num_ranks == 2 else 1.0
    whole = [[8.0 * scale * mean, -1.0 * scale * mean] for mean in (0.5, 2.5)]
    clipped = [[min(max(g, -2.0), 2.0) for g in gradient] for gradient in whole]
    assert ours[0] == (clipped if method == "value" else whole)


def test_elements_of_a_part_of_a_sum_are_not_clipped(build: Any):
    accelerator = build(gradient_accumulation_steps=2)
    module = nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.0))
    for x in (8.0, -8.0):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), x)).sum())
            accelerator.clip_grad_value_(model.parameters(), 1.0)
            optimizer.step()
    assert module.weight.grad.item() == 0.0  # and not 1 - 4, clipped


def rates(package: str, follows: bool) -> list[float]:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=follows)
        module = nn.Linear(1, 1)
        own = torch.optim.SGD(module.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(own, 1, gamma=0.5)
        model, optimizer, scheduler = accelerator.prepare(module, own, schedule)
        seen: list[float] = []
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(1, 1)).sum())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen.append(scheduler.get_last_lr()[0])
        return seen


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the point of the option
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("follows", [True, False])
def test_schedulers_that_do_not_follow_their_optimizer(ranks: Any, num_ranks: int, follows: bool):
    theirs, ours = of_both(ranks, num_ranks, rates, follows)
    assert ours == theirs
    if not follows:
        assert ours[0] == [0.5, 0.25, 0.125, 0.0625]


def triggered(package: str, is_wrapped: bool) -> list[float]:
    """A gradient whose forwards were all under `no_sync`, and whose last backward reduces nevertheless."""
    with entered(package) as door:
        handlers = [door.DistributedDataParallelKwargs()] if is_wrapped else None
        accelerator = door.Accelerator(cpu=True, kwargs_handlers=handlers)
        module = nn.Linear(1, 1, bias=False)
        model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
        x = torch.full((1, 1), 1.0 + accelerator.process_index)
        with accelerator.no_sync(model):
            losses = [model(x * turn).sum() for turn in (1, 2)]
            accelerator.backward(losses[0])
        with accelerator.trigger_sync_in_backward(model):
            accelerator.backward(losses[1])
        seen: list[float] = []
        hook = optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(module.weight.grad.item()))
        optimizer.step()
        hook.remove()
        return seen


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_backward_may_reduce_what_its_forward_did_not(ranks: Any, is_wrapped: bool):
    theirs, ours = of_both(ranks, 2, triggered, is_wrapped)
    assert ours == theirs == [[4.5], [4.5]]  # 1 + 2 on one rank, 2 + 4 on the other


def reduced(package: str) -> list[float]:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        mine = torch.tensor(1.0 + accelerator.process_index)
        return [
            accelerator.reduce(mine).item(),
            accelerator.reduce(mine, "mean").item(),
            door.utils.reduce(mine).item(),
        ]


def test_what_reduce_does_by_default(ranks: Any):
    theirs, ours = of_both(ranks, 2, reduced)
    assert ours == theirs == [[3.0, 1.5, 1.5]] * 2


def called_on(package: str) -> list[str]:
    with entered(package) as door:
        accelerator, seen = door.Accelerator(cpu=True), []

        def note(name: str) -> Any:
            return lambda: seen.append(name)

        for name in ("on_main_process", "on_local_main_process", "on_last_process"):
            getattr(accelerator, name)(note(name))()
        for name, options in (("on_process", {"process_index": 1}), ("on_local_process", {"local_process_index": 1})):
            getattr(accelerator, name)(**options)(note(name))()
        return seen


def test_decorators_choose_ranks(ranks: Any):
    theirs, ours = of_both(ranks, 2, called_on)
    assert ours == theirs
    assert ours[0] == ["on_main_process", "on_local_main_process"]


def test_a_window_without_weight_is_skipped_and_says_so(build: Any):
    accelerator = build()
    module = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    skipped: list[bool] = []
    for weight in (0, 2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum() * weight, weight=weight)
            optimizer.step()
        skipped.append(accelerator.optimizer_step_was_skipped)
    assert skipped == [True, False]


def test_a_profile_is_written_for_each_rank(tmp_path: Path):
    with entered(OURS) as door:
        accelerator = door.Accelerator(cpu=True)
        handler = door.ProfileKwargs(activities=["cpu"], output_trace_dir=str(tmp_path))
        with accelerator.profile(handler) as profiler:
            torch.ones(8).sum()
        assert any("sum" in event.key for event in profiler.key_averages())
        assert [path.name for path in tmp_path.iterdir()] == ["profile_0.json"]


@pytest.mark.parametrize("method", ["clear", "free_memory"])
@pytest.mark.parametrize("package", BOTH)
def test_whatever_was_prepared_is_let_go_of(build: Any, package: str, method: str):
    accelerator = build(package, gradient_accumulation_steps=2)
    module = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with accelerator.accumulate(model):  # a window is under way
        accelerator.backward(model(torch.ones(1, 1)).sum())
    assert list(getattr(accelerator, method)(model, optimizer)) == [None, None]
    assert accelerator._models == accelerator._optimizers == []
    assert accelerator.step == 0
    again = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(again, torch.optim.SGD(again.parameters(), lr=0.1))
    flags = []
    for _ in range(2):
        with accelerator.accumulate(model):
            flags.append(accelerator.sync_gradients)
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
    assert flags == [False, True]
