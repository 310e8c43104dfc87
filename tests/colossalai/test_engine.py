"""The engine: exact windows behind the calls of a training loop, and the bugs of the original that it is rid of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb
import macrobatch.colossalai as colossalai
from macrobatch.colossalai.amp import AMP_TYPE
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.engine import BaseGradientHandler, Engine
from macrobatch.colossalai.engine.gradient_accumulation import (
    GradAccumDataloader,
    GradAccumGradientHandler,
    GradAccumLrSchedulerByStep,
    GradAccumOptimizer,
    accumulate_gradient,
)
from macrobatch.colossalai.engine.schedule import NonPipelineSchedule
from macrobatch.colossalai.registry import GRADIENT_HANDLER
from macrobatch.errors import ArgumentError
from macrobatch.testing.reference import gradients_of, relative_error

pytestmark = pytest.mark.xdist_group("ranks")

EXACT = 1e-12  # float64: a few hundred roundings of 1e-16


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    gpc.destroy()


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(num: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(num, 4, dtype=torch.float64), torch.randint(0, 3, (num,))


def loader(num: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(num)), batch_size=batch_size)


def started(config: dict[str, Any], batches: Any, **options: Any) -> tuple[Engine, Any, Any, nn.Module, list[Any]]:
    """An engine, loader and scheduler; its model; and the gradients that its optimizer saw."""
    if not dist.is_initialized():
        gpc.load_config(config)
    model = options.pop("model", None) or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.0))
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(gradients_of(model)))
    schedule = options.pop("scheduler", lambda _: None)(optimizer)
    engine, batches, _, schedule = colossalai.initialize(
        model, optimizer, nn.CrossEntropyLoss(), batches, None, schedule, verbose=False, **options
    )
    return engine, batches, schedule, model, seen


def iterate(engine: Engine, x: Tensor, y: Tensor) -> Any:
    engine.zero_grad()
    engine.backward(engine.criterion(engine(x), y))
    return engine.step()


def expected(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    model = copy.deepcopy(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return gradients_of(model)


@pytest.mark.parametrize(("num", "batch_size"), [(16, 2), (18, 2), (15, 2), (3, 2)])
def test_windows_are_exact_with_short_tail_and_ragged_batch(num, batch_size):
    engine, batches, _, model, seen = started({"gradient_accumulation": 4}, loader(num, batch_size))
    for x, y in batches:
        iterate(engine, x, y)
    x, y = data(num)
    windows = list(zip(x.split(4 * batch_size), y.split(4 * batch_size), strict=True))
    assert len(seen) == len(windows) == engine.num_updates
    assert engine.num_iterations == len(batches)
    for gradient, window in zip(seen, windows, strict=True):
        assert relative_error(gradient, expected(model, *window)) <= EXACT


def test_compiled_windows_are_exact():
    num_runs = 0

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal num_runs
            num_runs += 1
            return graph.forward(*args)

        return run

    x, y = data(15)
    full = expected(network(), x, y)
    config = {"gradient_accumulation": 8, "torch_compile": {"backend": backend}}
    engine, batches, _, _, seen = started(config, loader(15, 2))
    for part in batches:
        iterate(engine, *part)
    assert num_runs == 8
    assert relative_error(seen[0], full) <= EXACT


def test_mean_of_means_is_not_exact():
    # The control: ragged micro-batches weighted equally, as in the original.
    x, y = data(8)
    model = network()
    parts = [expected(model, x[:6], y[:6]), expected(model, x[6:], y[6:])]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert relative_error(mean, expected(model, x, y)) > 0.01


def test_tail_is_dropped_on_request():
    engine, batches, _, _, seen = started({"gradient_accumulation": 4}, loader(20, 2), tail="drop")
    assert len(batches) == 8
    for x, y in batches:
        iterate(engine, x, y)
    assert (len(seen), engine.num_iterations, engine.optimizer.accumulate_step) == (2, 8, 0)


def test_weights_move_only_with_updates_and_in_place():
    engine, batches, _, model, _ = started({"gradient_accumulation": 2}, loader(8, 2), lr=0.1)
    before, moved = model[0].weight.clone(), []
    for x, y in batches:
        iterate(engine, x, y)
        moved.append(not torch.equal(before, model[0].weight))
        before = model[0].weight.clone()
    assert moved == [False, True, False, True]
    assert engine.model is model


def test_several_backwards_per_iteration_count_once():
    engine, batches, _, model, seen = started({"gradient_accumulation": 2}, loader(8, 2))
    for x, y in batches:
        engine.zero_grad()
        output = engine(x)
        engine.backward(F.cross_entropy(output, y) / 2)
        engine.backward(F.cross_entropy(engine(x), y) / 2)
        engine.step()
    x, y = data(8)
    assert len(seen) == 2
    assert relative_error(seen[1], expected(model, x[4:], y[4:])) <= EXACT


def test_backward_by_grad_is_the_backward_of_that_loss():
    engine, batches, _, model, seen = started({"gradient_accumulation": 2}, loader(4, 2))
    for x, y in batches:
        engine.zero_grad()
        output = engine(x)
        cut = output.detach().requires_grad_()
        F.cross_entropy(cut, y).backward()
        engine.backward_by_grad(output, cut.grad)
        engine.step()
    assert relative_error(seen[0], expected(model, *data(4))) <= EXACT


@pytest.mark.parametrize(("limit", "clips"), [(0.01, True), (0.0, False), (None, False)])
def test_clipping_once_per_window_and_zero_is_off(limit, clips):
    engine, batches, _, model, seen = started({"gradient_accumulation": 4, "clip_grad_norm": limit}, loader(8, 2))
    for x, y in batches:
        iterate(engine, x, y)
    gradient = expected(model, *data(8))
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    if clips:
        assert float(engine.grad_norm) == pytest.approx(float(norm))
        gradient = {name: g * (limit / (norm + 1e-6)) for name, g in gradient.items()}
    assert relative_error(seen[0], gradient) <= EXACT


def test_break_leaves_no_stale_window():
    engine, batches, _, model, seen = started({"gradient_accumulation": 4}, loader(16, 2))
    for index, (x, y) in enumerate(batches):
        iterate(engine, x, y)
        if index == 5:
            break
    seen.clear()
    for x, y in batches:
        iterate(engine, x, y)
    x, y = data(16)
    assert len(seen) == 2
    assert relative_error(seen[0], expected(model, x[:8], y[:8])) <= EXACT


def test_break_between_backward_and_step_leaves_no_stale_window():
    engine, batches, _, model, seen = started({"gradient_accumulation": 2}, loader(8, 2))
    for x, y in batches:
        engine.zero_grad()
        engine.backward(engine.criterion(engine(x), y))
        break
    for x, y in batches:
        iterate(engine, x, y)
    x, y = data(8)
    assert relative_error(seen[0], expected(model, x[:4], y[:4])) <= EXACT


def test_numbers_of_numpy_are_numbers():
    config = {"gradient_accumulation": np.int64(2), "clip_grad_norm": np.float32(0.5)}
    engine, batches, _, _, seen = started(config, loader(8, 2))
    for x, y in batches:
        iterate(engine, x, y)
    assert len(seen) == 2
    assert engine.grad_norm is not None


def test_own_loader_and_no_loader_count_windows():
    engine, none, _, model, seen = started({"gradient_accumulation": 3}, None)
    assert none is None
    x, y = data(12)
    for part in zip(x.split(2), y.split(2), strict=True):
        iterate(engine, *part)
    assert len(seen) == 2
    assert relative_error(seen[0], expected(model, x[:6], y[:6])) <= EXACT


def test_builders_and_classes_are_accepted():
    gpc.load_config({})
    engine, *_ = colossalai.initialize(network, lambda params: torch.optim.SGD(params, lr=0.1), verbose=False)
    assert isinstance(engine.model, nn.Sequential)
    assert (
        iterate(Engine(engine.model, torch.optim.SGD(engine.model.parameters(), 0.1), nn.CrossEntropyLoss()), *data(2))
        is None
    )


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", True], ids=str)
def test_accumulation_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="gradient_accumulation"):
        started({"gradient_accumulation": value}, None)
    with pytest.raises(ValueError, match="integer >= 1"):
        GradAccumOptimizer(torch.optim.SGD(network().parameters(), lr=0.1), value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1"], ids=str)
def test_clipping_that_is_none_is_refused(value):
    model = network()
    with pytest.raises(ValueError, match="clip_grad_norm"):
        Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), clip_grad_norm=value)


# --- errors that a loop goes on after ---


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise torch.OutOfMemoryError("no memory in the backward")


def test_a_backward_that_fails_takes_its_windows_part_with_it():
    engine, batches, _, model, seen = started({"gradient_accumulation": 4}, loader(16, 2))
    for index, (x, y) in enumerate(batches):
        engine.zero_grad()
        first = (
            model[0](x) if index != 1 else Failing.apply(model[0](x))
        )  # the last layer's gradients are there by then
        loss = engine.criterion(model[2](model[1](first)), y)
        try:
            engine.backward(loss)
        except torch.OutOfMemoryError:
            continue
        engine.step()
    x, y = data(16)
    assert len(seen) == 2
    for gradient, rows in zip(seen, (slice(4, 8), slice(8, 16)), strict=True):
        assert relative_error(gradient, expected(model, x[rows], y[rows])) <= EXACT


def test_a_forward_that_fails_counts_as_none():
    engine, _, _, model, seen = started({"gradient_accumulation": 2}, None)
    x, y = data(8)
    for rows in (slice(0, 6), slice(6, 8)):
        engine.zero_grad()
        with pytest.raises(RuntimeError, match="shapes"):
            engine(torch.ones(5, 7, dtype=torch.float64))
        iterate(engine, x[rows], y[rows])
    assert relative_error(seen[0], expected(model, x, y)) <= EXACT


def test_a_loss_that_is_refused_leaves_the_window_as_it_is():
    engine, batches, _, model, seen = started({"gradient_accumulation": 4}, loader(8, 2))
    for x, y in batches:
        engine.zero_grad()
        output = engine(x)
        with pytest.raises(mb.errors.MacrobatchError):
            engine.backward(F.cross_entropy(output, y, reduction="none"))
        engine.backward(F.cross_entropy(output, y))
        engine.step()
    assert relative_error(seen[0], expected(model, *data(8))) <= EXACT


def test_a_handler_that_fails_gives_the_window_up():
    model = network()
    engine = Engine(model, GradAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), 2, model), F.cross_entropy)
    engine._gradient_handlers = [FailingOnce(model, engine.optimizer)]
    x, y = data(12)
    iterate(engine, x[:2], y[:2])
    with pytest.raises(ArithmeticError):
        iterate(engine, x[2:4], y[2:4])
    iterate(engine, x[4:8], y[4:8])
    iterate(engine, x[8:], y[8:])
    assert engine.num_updates == 1
    assert relative_error(gradients_of(model), expected(model, x[4:], y[4:])) <= EXACT


class FailingOnce(BaseGradientHandler):
    has_failed = False

    def handle_gradient(self) -> None:
        if not self.has_failed:
            self.has_failed = True
            raise ArithmeticError


# --- schedulers ---


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


@pytest.mark.parametrize("num_batches", [1, 4, 6])
def test_scheduler_stepped_per_epoch_reaches_the_right_rate(num_batches):
    engine, batches, schedule, _, _ = started(
        {"gradient_accumulation": 4}, loader(2 * num_batches, 2), lr=0.1, scheduler=halving
    )
    for _ in range(3):
        for x, y in batches:
            iterate(engine, x, y)
        schedule.step()
    assert schedule.get_last_lr() == [0.0125]
    assert engine.optimizer.param_groups[0]["lr"] == 0.0125


def test_scheduler_stepped_per_iteration_moves_with_updates():
    engine, batches, schedule, _, seen = started({"gradient_accumulation": 4}, loader(20, 2), scheduler=halving)
    moves = []
    for x, y in batches:
        iterate(engine, x, y)
        schedule.step()
        moves.append(schedule.last_epoch)
    assert moves == [0, 0, 0, 1, 1, 1, 1, 2, 2, 3]
    assert len(seen) == 3
    assert GradAccumLrSchedulerByStep.compute_effective_steps_per_epoch(batches, 4) == 3


# --- precision, handlers, DDP ---


def test_fp16_scales_once_and_skips_an_overflowing_window():
    config = {"gradient_accumulation": 2, "fp16": {"mode": AMP_TYPE.TORCH, "init_scale": 2.0**10}}
    model = nn.Linear(4, 3)
    engine, _, _, _, seen = started(config, None, model=model, lr=0.1)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    reference = expected(model, x[:4], y[:4])
    for part in zip(x.split(2), y.split(2), strict=True):
        iterate(engine, *part)
    assert len(seen) == 2
    assert relative_error(seen[0], reference) <= 5e-3  # float16 has 11 bits: some roundings of 5e-4
    before = model.weight.clone()
    for index in range(2):
        iterate(engine, torch.full((2, 4), 1e38 if index else 1.0), y[:2])
    assert torch.equal(before, model.weight)
    assert len(seen) == 2


def test_handler_is_called_once_per_window():
    calls: list[int] = []

    class DoublingOnce(BaseGradientHandler):
        def handle_gradient(self) -> None:
            calls.append(1)
            for param in self._model.parameters():
                param.grad.mul_(2)

    GRADIENT_HANDLER.register_module(DoublingOnce)
    config = {"gradient_accumulation": 4, "gradient_handler": [{"type": "DoublingOnce"}]}
    engine, batches, _, model, seen = started(config, loader(8, 2))
    for x, y in batches:
        iterate(engine, x, y)
    assert len(calls) == 1
    gradient = expected(model, *data(8))
    assert relative_error(seen[0], {name: 2 * g for name, g in gradient.items()}) <= EXACT


class Counting(BaseGradientHandler):
    calls = 0

    def handle_gradient(self) -> None:
        self.calls += 1


def test_a_loop_without_an_engine_calls_everything_in_every_iteration():
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[Any] = []
    plain.register_step_post_hook(lambda *_: seen.append(gradients_of(model)))
    counting = Counting(model, plain)
    optimizer, batches, handlers, _ = accumulate_gradient(model, plain, loader(14, 2), 4, [counting])
    assert handlers is not None
    norms = []
    for x, y in batches:
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y))
        handlers[0].handle_gradient()
        norms.append(optimizer.clip_grad_norm(model, 0.01))
        optimizer.step()
    x, y = data(14)
    assert [norm is not None for norm in norms] == [False, False, False, True, False, False, True]
    assert (counting.calls, len(seen)) == (2, 2)
    for gradient, rows in zip(seen, (slice(0, 8), slice(8, 14)), strict=True):
        wanted = expected(model, x[rows], y[rows])
        norm = torch.stack([each.norm() for each in wanted.values()]).norm()
        assert relative_error(gradient, {name: each * (0.01 / (norm + 1e-6)) for name, each in wanted.items()}) <= EXACT


def test_views_without_an_optimizer_count_by_themselves():
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule, counting = GradAccumLrSchedulerByStep(halving(plain), 4), Counting(model, plain)
    handler = GradAccumGradientHandler(counting, 4)
    plain.step()  # as torch wants it before its schedule's first step
    for _ in range(8):
        handler.handle_gradient()
        schedule.step()
    assert (counting.calls, schedule.last_epoch) == (2, 2)
    assert len(list(GradAccumDataloader(loader(10, 2), 4, tail="drop"))) == 4


def test_accumulate_gradient_makes_views_of_one_window():
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, batches, handlers, schedule = accumulate_gradient(model, plain, loader(8, 2), 2, [], halving(plain))
    steps = []
    for x, y in batches:
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y))
        steps.append(optimizer.accumulate_step)
        optimizer.step()
        schedule.step()
    assert steps == [1, 2, 1, 2]
    assert (optimizer.accumulate_step, optimizer.window.num_updates) == (0, 2)
    assert (handlers, schedule.last_epoch) == ([], 2)
    assert optimizer.param_groups is optimizer.optim.param_groups


# --- saving ---


def test_resume_in_a_window_gives_the_same_bits():
    def run(stop: int | None) -> list[Tensor]:
        gpc.load_config({"gradient_accumulation": 4})
        x, y = data(16)
        parts = list(zip(x.float().split(2), y.split(2), strict=True))
        model = network().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        engine, *_ = colossalai.initialize(model, optimizer, nn.CrossEntropyLoss(), verbose=False)
        for index, part in enumerate(parts):
            if index == stop:
                saved = copy.deepcopy((engine.state_dict(), model.state_dict(), optimizer.state_dict()))
                model = network().float()
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
                engine, *_ = colossalai.initialize(model, optimizer, nn.CrossEntropyLoss(), verbose=False)
                model.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
                engine.load_state_dict(saved[0])
            iterate(engine, *part)
        return [param.detach().clone() for param in model.parameters()]

    straight = run(None)
    for stop in (1, 6):
        assert all(torch.equal(a, b) for a, b in zip(straight, run(stop), strict=True))


# --- ranks ---


def on_rank(config: dict[str, Any], sizes: list[list[int]]) -> tuple[Any, int, bool]:
    gpc.load_config(config)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(gradients_of(getattr(model, "module", model))))
    engine, *_ = colossalai.initialize(model, optimizer, nn.CrossEntropyLoss(), verbose=False)
    x, y = data(40)
    start = 20 * dist.get_rank()
    for size in sizes[dist.get_rank()]:
        iterate(engine, x[start : start + size], y[start : start + size])
        start += size
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, whole)
    return seen[0], len(seen), all(torch.equal(whole, other) for other in everyone)


@pytest.mark.parametrize("ddp", [False, True], ids=["replicated", "torch_ddp"])
@pytest.mark.parametrize("handler", [False, True], ids=["", "handler"])
def test_two_ranks_equal_the_full_batch(ranks, ddp, handler):
    config: dict[str, Any] = {"gradient_accumulation": 2}
    if ddp:
        config["torch_ddp"] = {}
    if handler:
        config["gradient_handler"] = [{"type": "DataParallelGradientHandler"}]
    results = ranks(2).run(on_rank, config, [[2, 2, 2, 2]] * 2)
    x, y = data(40)
    rows = torch.cat([torch.arange(0, 4), torch.arange(20, 24)])
    for gradient, num_updates, equal in results:
        assert relative_error(gradient, expected(network(), x[rows], y[rows])) <= EXACT
        assert (num_updates, equal) == (2, True)


def test_unequal_batches_over_ranks_are_weighted(ranks):
    results = ranks(2).run(on_rank, {"gradient_accumulation": 2}, [[5, 1], [1, 2]])
    x, y = data(40)
    rows = torch.cat([torch.arange(0, 6), torch.arange(20, 23)])
    for gradient, _, equal in results:
        assert relative_error(gradient, expected(network(), x[rows], y[rows])) <= EXACT
        assert equal


def counted_reductions(config: dict[str, Any]) -> list[int]:
    gpc.load_config({"gradient_accumulation": 4, "clip_grad_norm": 1.0, **config})
    model = network()
    engine, *_ = colossalai.initialize(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), verbose=False
    )
    x, y = data(16)
    iterate(engine, x[:2], y[:2])  # the first window also agrees on sizes and compares checksums
    for _ in range(3):
        iterate(engine, x[:2], y[:2])
    counts = []
    for _ in range(8):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            iterate(engine, x[:2], y[:2])
        counts.append(sum(event.count for event in profiler.key_averages() if event.key == "c10d::allreduce_"))
    return counts


HANDLED = {"gradient_handler": [{"type": "DataParallelGradientHandler"}]}


@pytest.mark.parametrize("config", [{}, HANDLED], ids=["", "handler"])
def test_one_reduction_per_window(ranks, config):
    assert ranks(2).run(counted_reductions, config) == [[0, 0, 0, 1] * 2] * 2


def test_ddp_reduces_in_the_last_micro_iteration_alone(ranks):
    for counts in ranks(2).run(counted_reductions, {"torch_ddp": {}}):
        assert [count > 0 for count in counts] == [False, False, False, True] * 2


def test_package_exports_errors_of_its_own():
    assert issubclass(colossalai.LaunchError, mb.errors.MacrobatchError)


# --- the schedule ---


def process(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {"input": batch["x"]}, batch["y"]


@pytest.mark.parametrize("function", [None, process])
def test_the_schedule_runs_a_window_of_batches_of_any_form(function):
    x, y = data(7)
    rows = [slice(0, 4), slice(4, 7)]
    batches = [({"input": x[part]}, (y[part],)) if function is None else {"x": x[part], "y": y[part]} for part in rows]
    engine, batches, _, model, seen = started({"gradient_accumulation": 2}, batches)
    engine = Engine(model, engine.optimizer, engine.criterion, schedule=NonPipelineSchedule(function))
    data_iter = iter(batches)
    for size in (4, 3):
        engine.zero_grad()
        output, _, loss = engine.execute_schedule(data_iter)
        assert (output.shape, loss.ndim, engine.schedule.batch_size) == ((size, 3), 0, size)
        engine.step()
    assert relative_error(seen[0], expected(model, x, y)) <= EXACT


def test_the_schedule_returns_what_is_asked_for():
    engine, *_ = started({}, None)
    x, y = data(2)
    output, label, loss = engine.execute_schedule(iter([(x, y)]), forward_only=True, return_loss=False)
    assert (output.shape, loss) == ((2, 3), None)
    assert torch.equal(label, y)
    assert engine.execute_schedule(iter([(x, y)]), forward_only=True, return_output_label=False)[:2] == (None, None)


@pytest.mark.parametrize(
    ("batch", "options", "said"),
    [
        (data(2), {"return_loss": False}, "a loss to train on"),
        ((*data(2), 1), {}, "a pair of data and label"),
        (None, {}, "a criterion"),
    ],
    ids=["no loss", "a triple", "no criterion"],
)
def test_what_the_schedule_cannot_run_is_refused(batch, options, said):
    engine, *_ = started({}, None)
    if batch is None:
        engine, batch = Engine(engine.model, engine.optimizer), data(2)
    with pytest.raises(ValueError, match=said):
        engine.execute_schedule(iter([batch]), **options)
    assert engine.optimizer.accumulate_step == 0


def test_gradients_can_be_read_after_an_update():
    """As the original's own test does."""
    engine, batches, _, model, _ = started({"gradient_accumulation": 4, "clip_grad_norm": 1.0}, loader(8, 2), lr=0.1)
    gradients, weights = [], []
    for x, y in batches:
        iterate(engine, x, y)
        gradients.append(model[0].weight.grad.clone())
        weights.append(model[0].weight.detach().clone())
    assert not torch.equal(gradients[0], gradients[3])
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])


def test_initialize_before_launch_is_refused(monkeypatch: pytest.MonkeyPatch):
    """It would train without accumulation, and without all else that the config says."""
    monkeypatch.setattr(gpc, "_config", None)
    model = network()
    with pytest.raises(colossalai.LaunchError, match="initialize: given a call before launch"):
        colossalai.initialize(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), verbose=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("optimizer", None),
        ("optimizer", "sgd"),
        ("criterion", 3),
        ("train_dataloader", 3),
        ("lr_scheduler", 3),
    ],
)
def test_initialize_of_what_is_none_of_its_kind_is_refused(name: str, value: object):
    gpc.load_config({})
    model = network()
    given: Any = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "criterion": nn.MSELoss()}
    with pytest.raises(ArgumentError, match=f"{name}: given {value!r}; expected "):
        colossalai.initialize(**{**given, name: value}, verbose=False)


def test_initialize_with_an_optimizer_of_another_model_is_refused():
    gpc.load_config({})
    with pytest.raises(ArgumentError, match="without any of the model's parameters"):
        colossalai.initialize(network(), torch.optim.SGD(network().parameters()), nn.MSELoss(), verbose=False)
