"""The accumulation of the accelerate door: every way of using it that goes wrong in the original, with the original
itself as the control, and what is right."""

from __future__ import annotations

import copy
import gc
import importlib
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import macrobatch as mb
from tests.accelerate.doors import BOTH, ORIGINAL, OURS


def accelerator(package: str, num_steps: int = 4, **options: Any) -> Any:
    return importlib.import_module(package).Accelerator(gradient_accumulation_steps=num_steps, cpu=True, **options)


class Recorder:
    """A one-weight model whose gradient is the mean of its inputs, and the gradients its optimizer saw."""

    def __init__(self, accelerator: Any, inputs: list[float], batch_size: int = 1, shuffle: bool = False) -> None:
        self.accelerator = accelerator
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=1.0)
        data = torch.tensor(inputs).view(-1, 1)
        self.loader: Any = DataLoader(TensorDataset(data), batch_size=batch_size, shuffle=shuffle)
        self.seen: list[tuple[int, float]] = []
        self.optimizer.register_step_post_hook(self.record)
        self.index = -1
        weight = self.model.weight
        self.model, self.optimizer, self.loader = accelerator.prepare(self.model, self.optimizer, self.loader)
        self.weight = weight

    def record(self, *_: Any) -> None:
        self.seen.append((self.index, round(self.weight.grad.item(), 4)))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).mean()

    def micro_step(self, x: torch.Tensor) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.loss(x))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def epoch(self) -> list[tuple[int, float]]:
        for x in self.batches():
            self.micro_step(x)
        return self.seen

    def batches(self) -> Iterator[torch.Tensor]:
        """The loader's batches, noting which one is at hand."""
        for index, (x,) in enumerate(self.loader):
            self.index = index
            yield x


# --- the window's gradient ---


@pytest.mark.better("W1")
@pytest.mark.parametrize(("package", "last"), [(ORIGINAL, -2.0), (OURS, -4.0)])
def test_short_window_is_divided_by_what_it_has(package, last):
    run = Recorder(accelerator(package), [-4.0] * 10)
    assert run.epoch() == [(3, -4.0), (7, -4.0), (9, last)]


@pytest.mark.better("W1")
@pytest.mark.parametrize(
    ("package", "expected"), [(ORIGINAL, (1 + 3 + 100) / 4), (OURS, (1 * 4 + 3 * 4 + 100 * 2) / 10)]
)
def test_ragged_batch_weighs_what_it_has(package, expected):
    run = Recorder(accelerator(package), [1.0] * 4 + [3.0] * 4 + [100.0] * 2, batch_size=4)
    assert run.epoch() == [(2, pytest.approx(expected))]


def test_constant_gives_the_originals_number_back():
    plugin = importlib.import_module(OURS).GradientAccumulationPlugin(num_steps=4, normalize="constant")
    run = Recorder(importlib.import_module(OURS).Accelerator(gradient_accumulation_plugin=plugin), [-4.0] * 10)
    assert run.epoch() == [(3, -4.0), (7, -4.0), (9, -2.0)]


def test_environment_gives_the_originals_number_back(monkeypatch):
    monkeypatch.setenv("MACROBATCH_NORMALIZE", "constant")
    assert Recorder(accelerator(OURS), [-4.0] * 6).epoch() == [(3, -4.0), (5, -2.0)]


def token_gradient(package: str, backward: Callable[..., None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a guide-shaped loop over sentences of very different lengths, and the full batch's in fp64."""
    torch.manual_seed(0)
    lengths = [3, 50, 7, 120]
    ids = [torch.randint(0, 20, (length,)) for length in lengths]
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    reference = [p.detach().double().requires_grad_() for p in model.parameters()]
    hidden = F.linear(F.embedding(torch.cat(ids), reference[0]), reference[1], reference[2])
    F.cross_entropy(hidden, torch.cat(ids)).backward()
    door = accelerator(package)
    model = door.prepare(model)
    for sentence in ids:
        with door.accumulate(model):
            backward(door, model(sentence), sentence)
    return (
        torch.cat([p.grad.flatten().double() for p in model.parameters()]),
        torch.cat([p.grad.flatten() for p in reference]),
    )


def error(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float((pair[0] - pair[1]).norm() / pair[1].norm())


@pytest.mark.better("W2")
@pytest.mark.parametrize("package", BOTH)
def test_mean_of_token_means_is_not_the_mean_over_tokens(package):
    # The control: what both do with a mean over tokens and no weight.
    assert error(token_gradient(package, lambda a, out, ids: a.backward(F.cross_entropy(out, ids)))) > 0.05


@pytest.mark.better("W2")
@pytest.mark.parametrize("on_device", [False, True])
def test_weight_makes_tokens_count_equally(on_device):
    def backward(door: Any, out: torch.Tensor, ids: torch.Tensor) -> None:
        weight = torch.tensor(len(ids)) if on_device else len(ids)
        door.backward(F.cross_entropy(out, ids, reduction="sum"), weight=weight)

    assert error(token_gradient(OURS, backward)) < 1e-6  # float32: a few hundred roundings of 6e-8


@pytest.mark.parametrize("on_device", [False, True])
def test_window_without_a_token_makes_no_update(on_device):
    """One process does as several do: no decay, no momentum, no step of the schedule."""
    door = importlib.import_module(OURS).Accelerator(gradient_accumulation_steps=2)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, schedule = door.prepare(model, optimizer, schedule)
    moved, rates = [], []
    for num_tokens in (3, 0, 0, 0):  # a window with some, and one without
        before = model.weight.detach().clone()
        with door.accumulate(model):
            weight = torch.tensor(num_tokens) if on_device else num_tokens
            door.backward(model(torch.ones(num_tokens, 3)).sum(), weight=weight)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        moved.append(not torch.equal(model.weight, before))
        rates.append(schedule.get_last_lr()[0])
    assert moved == [False, True, False, False]
    assert rates == [0.1, 0.05, 0.05, 0.05]
    assert optimizer.step_was_skipped


# --- around the window ---


@pytest.mark.better("W3")
@pytest.mark.parametrize(("package", "gradient"), [(ORIGINAL, -1.0), (OURS, -4.0)])
def test_accumulate_forgotten_steps_on_whole_gradients(package, gradient):
    run = Recorder(accelerator(package), [-4.0] * 3)
    told = pytest.warns(UserWarning, match="accumulate") if package == OURS else nullcontext()
    with told:
        for x in run.batches():
            run.accelerator.backward(run.loss(x))
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert run.seen == [(i, gradient) for i in range(3)]


def test_constant_restores_the_original_s_numbers_of_accumulate_forgotten():
    plugin = importlib.import_module(OURS).GradientAccumulationPlugin(num_steps=4, normalize="constant")
    run = Recorder(accelerator(OURS, 1, gradient_accumulation_plugin=plugin), [-4.0] * 3)
    for x in run.batches():
        run.accelerator.backward(run.loss(x))
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.seen == [(i, -1.0) for i in range(3)]


@pytest.mark.parametrize("package", BOTH)
def test_windows_accumulated_by_hand_undo_the_division_by_n(package):
    # The original's recipe for token means: losses over the window's tokens times N, and no `accumulate`.
    run = Recorder(accelerator(package), [1.0, 2.0, 3.0, 6.0, 5.0])
    batches = list(run.batches())
    for index, window in enumerate([batches[:4], batches[4:]]):
        run.index = index
        for x in window:
            run.accelerator.backward(run.loss(x) / len(window) * 4)
        run.accelerator.clip_grad_norm_(run.model.parameters(), 100.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.seen == [(0, 3.0), (1, 5.0)]


@pytest.mark.better("W3")
@pytest.mark.parametrize("package", BOTH)
def test_plain_backward_in_a_window(package):
    run = Recorder(accelerator(package, 2), [-4.0] * 2)

    def loop() -> None:
        for (x,) in run.loader:
            with run.accelerator.accumulate(run.model):
                run.loss(x).backward()
                run.optimizer.step()

    if package == ORIGINAL:
        loop()
        assert run.seen == [(-1, -8.0)]  # twice too large, in silence
    else:
        with pytest.raises(mb.errors.LossError, match="nobody counted"):
            loop()


@pytest.mark.better("W3")
@pytest.mark.parametrize(("package", "steps"), [(ORIGINAL, [4, 8, 9, 10, 11]), (OURS, [4, 8, 11])])
def test_batches_cut_up_by_the_loop(package, steps):
    # Each loader batch of 4 (the last of 3) is cut into micro-batches of 1; windows of 4.
    run = Recorder(accelerator(package), [-4.0] * 11, batch_size=4)
    run.index = 0
    for (x,) in run.loader:
        for piece in x.split(1):
            run.index += 1
            run.micro_step(piece)
    assert [index for index, _ in run.seen] == steps


@pytest.mark.better("W5")
@pytest.mark.parametrize("num_eval", [2, 4])
@pytest.mark.parametrize("package", BOTH)
def test_evaluation_left_by_break_inside_training(package, num_eval):
    run = Recorder(accelerator(package), [-4.0] * 14)
    evaluation = run.accelerator.prepare(DataLoader(TensorDataset(torch.ones(4, 1))))
    for x in run.batches():
        run.micro_step(x)
        if run.index == 4:
            for index, _ in enumerate(evaluation, start=1):
                if index == num_eval:
                    break
    steps = [index for index, _ in run.seen]
    assert (steps == [3, 7, 11, 13]) == (package == OURS)


@pytest.mark.better("W5")
@pytest.mark.parametrize("package", BOTH)
def test_first_batch_taken_before_training(package):
    run = Recorder(accelerator(package), [-4.0] * 8)
    other = run.accelerator.prepare(DataLoader(TensorDataset(torch.ones(1, 1))))
    next(iter(other))
    for run.index in range(8):  # batches of the script's own, from no loader
        run.micro_step(torch.full((1, 1), -4.0))
    steps = [index for index, _ in run.seen]
    assert (steps == [3, 7]) == (package == OURS)


@pytest.mark.better("W6")
@pytest.mark.parametrize("package", BOTH)
def test_break_in_a_window_then_zero_grad(package):
    run = Recorder(accelerator(package), [-4.0] * 8)
    for x in run.batches():
        run.micro_step(x)
        if run.index == 5:
            break
    run.optimizer.zero_grad()
    run.seen.clear()
    steps = [index for index, _ in run.epoch()]
    assert (steps == [3, 7]) == (package == OURS)


@pytest.mark.better("W16")
@pytest.mark.parametrize("package", BOTH)
def test_zip_of_a_short_and_a_long_loader(package):
    run = Recorder(accelerator(package), [-4.0] * 10)
    longer = run.accelerator.prepare(DataLoader(TensorDataset(torch.ones(20, 1))))
    for index, ((x,), _) in enumerate(zip(run.loader, longer, strict=False)):
        run.index = index
        run.micro_step(x)
    steps = [index for index, _ in run.seen]
    assert (steps == [3, 7, 9]) == (package == OURS)


@pytest.mark.better("W18")
@pytest.mark.parametrize(("package", "second"), [(ORIGINAL, -8.0), (OURS, -4.0)])
def test_continue_on_the_last_micro_batch(package, second):
    run = Recorder(accelerator(package), [-4.0] * 12)
    for x in run.batches():
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(run.loss(x))
            if run.index == 3:
                continue
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert run.seen == [(7, second), (11, -4.0)]


@pytest.mark.better("W-N")
@pytest.mark.parametrize("package", BOTH)
def test_number_of_steps_changed_while_training(package):
    run = Recorder(accelerator(package), [-4.0] * 20)
    for x in run.batches():
        if run.index in (6, 12):
            run.accelerator.gradient_accumulation_steps = 3 if run.index == 6 else 5
        run.micro_step(x)
    exact = all(gradient == -4.0 for _, gradient in run.seen)
    assert exact == (package == OURS)
    assert run.accelerator.gradient_accumulation_steps == 5


@pytest.mark.better("W19")
@pytest.mark.parametrize("package", BOTH)
def test_clip_without_asking_for_sync_gradients(package):
    door = accelerator(package, 2)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = door.prepare(model, optimizer)
    direction = torch.zeros(2)
    for x in (torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 3.0]])):
        with door.accumulate(model):
            door.backward(model(x).mean())
            door.clip_grad_norm_(model.parameters(), 1.0)
            if door.sync_gradients:
                direction = F.normalize(next(iter(model.parameters())).grad.flatten(), dim=0)
    exact = torch.allclose(direction, F.normalize(torch.tensor([10.0, 3.0]), dim=0), atol=1e-5)
    assert exact == (package == OURS)


@pytest.mark.parametrize("package", BOTH)
def test_guide_shapes_of_the_loop_agree(package):
    """The guide's own first step: accumulation by hand, with the accelerator's backward."""
    run = Recorder(accelerator(package, 1), [-1.0, -3.0, -5.0, -7.0])
    for x in run.batches():
        run.accelerator.backward(run.loss(x) / 2)
        if (run.index + 1) % 2 == 0:
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert run.seen == [(1, -2.0), (3, -6.0)]


SHAPES = {
    "zero first": ("zero", "backward", "step"),
    "zero last": ("backward", "step", "zero"),
    "step outside": ("backward", "out", "step", "zero"),
    "zero before the block": ("before", "backward", "step"),
    "if sync, outside": ("backward", "out", "if", "step", "zero"),
    "if sync, inside": ("backward", "if", "step", "zero"),
    "no zero": ("backward", "step"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_order_of_step_and_zero_grad_is_the_same_training(shape):
    run = Recorder(accelerator(OURS), [-1.0, -3.0, -5.0, -7.0, -2.0, -4.0])
    order = SHAPES[shape]

    def act(actions: tuple[str, ...], x: torch.Tensor) -> None:
        for action in actions:
            if action == "if" and not run.accelerator.sync_gradients:
                return
            if action == "backward":
                run.accelerator.backward(run.loss(x))
            elif action == "step":
                run.optimizer.step()
            elif action == "zero":
                run.optimizer.zero_grad()

    for x in run.batches():
        if order[0] == "before":
            run.optimizer.zero_grad()
        cut = order.index("out") if "out" in order else len(order)
        with run.accelerator.accumulate(run.model):
            act(order[:cut], x)
        act(order[cut:], x)
    assert run.seen == [(3, -4.0), (5, -3.0)]


def test_two_steps_in_one_block_are_refused_in_a_window_and_legal_alone():
    run = Recorder(accelerator(OURS, 1), [-4.0])
    for (x,) in run.loader:
        for _ in range(2):
            run.micro_step(x)
    assert len(run.seen) == 2
    run.accelerator.gradient_accumulation_steps = 2
    run.micro_step(torch.ones(1, 1))

    def twice() -> None:
        with run.accelerator.accumulate(run.model):
            for _ in range(2):
                run.accelerator.backward(run.loss(torch.ones(1, 1)))
                run.optimizer.step()

    with pytest.raises(mb.errors.WindowError, match="one accumulate block for each step"):
        twice()


# --- several models, several accelerators ---


@pytest.mark.better("W17")
@pytest.mark.parametrize("package", BOTH)
def test_generator_and_discriminator_have_windows_of_their_own(package):
    door = accelerator(package, 2)
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    optimizers: list[Any] = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    seen: list[list[float]] = [[], []]
    for model, optimizer, into in zip(models, optimizers, seen, strict=True):
        optimizer.register_step_post_hook(lambda *_, m=model, into=into: into.append(m.weight.grad.item()))
    loader = DataLoader(TensorDataset(torch.full((10, 1), -4.0)))
    *models, optimizers[0], optimizers[1], loader = door.prepare(*models, *optimizers, loader)
    for (x,) in loader:
        for model, optimizer in zip(models, optimizers, strict=True):
            with door.accumulate(model):
                door.backward(model(x).mean())
                optimizer.step()
                optimizer.zero_grad()
    assert (seen == [[-4.0] * 5] * 2) == (package == OURS)


def test_gradient_of_one_window_does_not_leak_into_another():
    door = accelerator(OURS, 2)
    generator, critic = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for model in (generator, critic):
        nn.init.ones_(model.weight)
    weights = generator.weight, critic.weight
    first, second = (torch.optim.SGD(model.parameters(), lr=0.0) for model in (generator, critic))
    generator, critic, first, second = door.prepare(generator, critic, first, second)
    for _ in range(2):
        x = torch.ones(1, 1)
        with door.accumulate(critic):
            door.backward(critic(generator(x).detach()).mean())
            second.step()
        with door.accumulate(generator):
            door.backward(-7 * critic(generator(x)).mean())  # goes through the critic, whose window is under way
            first.step()
    assert [weight.grad.item() for weight in weights] == [-7.0, 1.0]


def test_gan_without_accumulate_is_plain_pytorch():
    """The tutorial's loop: two optimizers, each zeroed before its own backward."""
    results = []
    for package in (None, OURS):
        torch.manual_seed(0)
        generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
        first, second = (torch.optim.Adam(model.parameters(), lr=0.1) for model in (generator, critic))
        backward = torch.Tensor.backward
        if package is not None:
            door = accelerator(package, 1)
            generator, critic, first, second = door.prepare(generator, critic, first, second)
            backward = door.backward
        for _ in range(3):
            x = torch.randn(4, 2)
            second.zero_grad()
            backward(critic(generator(x).detach()).mean() - critic(x).mean())
            second.step()
            first.zero_grad()
            backward(-critic(generator(x)).mean())
            first.step()
        results.append(torch.cat([p.detach().flatten() for m in (generator, critic) for p in m.parameters()]))
    assert torch.equal(*results)


@pytest.mark.better("W15")
@pytest.mark.parametrize("package", BOTH)
def test_second_accelerator_leaves_the_first_alone(package):
    run = Recorder(accelerator(package), [-4.0] * 8)
    importlib.import_module(package).Accelerator(cpu=True)
    steps = [index for index, _ in run.epoch()]
    assert (steps == [3, 7]) == (package == OURS)


# --- what it is given ---


@pytest.mark.better("W25")
@pytest.mark.parametrize("num_steps", [0, -3, 2.5, "4", None, True, math.nan], ids=str)
def test_number_of_steps_that_is_none_is_refused(num_steps):
    with pytest.raises((ValueError, TypeError), match="given"):
        accelerator(OURS, num_steps)
    door = accelerator(OURS)
    with pytest.raises((ValueError, TypeError), match="given"):
        door.gradient_accumulation_steps = num_steps
    assert door.gradient_accumulation_steps == 4


@pytest.mark.better("W25")
@pytest.mark.parametrize("num_steps", [0, -3])
def test_original_takes_any_number(num_steps):
    accelerator(ORIGINAL, num_steps)  # the control: nothing is said


@pytest.mark.better("W13")
def test_plugin_snippet_of_the_guide():
    steps = {}
    for package in BOTH:
        plugin = importlib.import_module(f"{package}.utils").GradientAccumulationPlugin(sync_with_dataloader=False)
        if package == OURS:
            door = accelerator(package, 4, gradient_accumulation_plugin=plugin)
        else:
            with pytest.raises(ValueError, match="one of"):
                accelerator(package, 4, gradient_accumulation_plugin=plugin)
            door = importlib.import_module(package).Accelerator(gradient_accumulation_plugin=plugin, cpu=True)
        steps[package] = door.gradient_accumulation_steps
        assert door.gradient_state.sync_with_dataloader is False
    assert steps == {ORIGINAL: 1, OURS: 4}


@pytest.mark.better("W25")
def test_explicit_argument_beats_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert accelerator(ORIGINAL, 8).gradient_accumulation_steps == 2
    assert accelerator(OURS, 8).gradient_accumulation_steps == 8
    assert accelerator(OURS, 1).gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    "options",
    [{"mixed_precision": "fp13"}, {"mixed_precision": "fp8"}, {"deepspeed_plugin": 1}, {"megatron_lm_plugin": 1}],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        accelerator(OURS, **options)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="even_batches"):
        accelerator(OURS, even_batches=True)


# --- wrappers ---


def test_wrappers_keep_what_they_wrap():
    door = accelerator(OURS, 1)
    model = nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, T_max=7)
    inner.mine = "kept"
    module, optimizer, scheduler = door.prepare(model, inner, schedule)
    assert module is model
    assert door.unwrap_model(module) is model
    assert isinstance(optimizer, torch.optim.SGD)
    assert isinstance(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR)
    assert (optimizer.mine, scheduler.T_max, scheduler.base_lrs, scheduler.last_epoch) == ("kept", 7, [0.1], 0)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(torch.ones(1, 1)).square().mean()
        door.backward(loss)
        return loss

    assert optimizer.step(closure) is not None
    assert calls == [1]
    assert door.prepare(optimizer) is optimizer
    assert door.prepare(model) is model


@pytest.fixture
def lbfgs() -> Callable[[bool], torch.Tensor]:
    def train(ours: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        x, y = torch.randn(16, 3), torch.randn(16, 1)
        optimizer: Any = torch.optim.LBFGS(model.parameters(), max_iter=5)
        backward = torch.Tensor.backward
        if ours:
            door = accelerator(OURS, 1)
            model, optimizer = door.prepare(model, optimizer)
            backward = door.backward

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            backward(loss)
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    return train


def test_lbfgs_with_its_closure_is_plain_pytorch(lbfgs):
    assert torch.equal(lbfgs(True), lbfgs(False))


def test_schedulers_move_with_updates():
    door = accelerator(OURS, 2)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    model, optimizer, scheduler = door.prepare(model, optimizer, scheduler)
    rates = []
    for _ in range(4):
        with door.accumulate(model):
            door.backward(model(torch.ones(1, 1)).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates.append(scheduler.get_last_lr()[0])
    assert rates == [1.0, 0.5, 0.5, 0.25]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the point of the option
@pytest.mark.parametrize("adjusts", [True, False])
def test_adjust_scheduler_moves_with_micro_batches(adjusts):
    plugin = importlib.import_module(OURS).GradientAccumulationPlugin(num_steps=2, adjust_scheduler=adjusts)
    door = importlib.import_module(OURS).Accelerator(gradient_accumulation_plugin=plugin)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    model, optimizer, scheduler = door.prepare(model, optimizer, scheduler)
    for _ in range(4):
        with door.accumulate(model):
            door.backward(model(torch.ones(1, 1)).mean())
            optimizer.step()
            scheduler.step()
    assert scheduler.get_last_lr()[0] == (0.5**4 if adjusts else 0.5**2)
    assert door.gradient_state.adjust_scheduler is adjusts


def test_prepare_keeps_order_and_passes_on_what_it_does_not_know():
    door = accelerator(OURS)
    tensor, function = torch.ones(2), len
    model = nn.Linear(1, 1)
    assert door.prepare(tensor) is tensor
    assert [type(obj).__name__ for obj in door.prepare(function, model, tensor)] == [
        "builtin_function_or_method",
        "Linear",
        "Tensor",
    ]
    with pytest.raises(ValueError, match="device_placement"):
        door.prepare(model, tensor, device_placement=[True])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precision_of_outputs(precision):
    door = accelerator(OURS, mixed_precision=precision)
    model = door.prepare(nn.Linear(4, 4))
    output = model(torch.ones(1, 4))
    assert output.dtype == torch.float32
    with door.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_wrappers_can_be_copied_and_pickled(duplicate):
    run = Recorder(accelerator(OURS, 2), [-4.0] * 4)
    scheduler = run.accelerator.prepare(torch.optim.lr_scheduler.StepLR(run.optimizer.optimizer, 1))
    run.optimizer.optimizer._optimizer_step_post_hooks.clear()
    optimizer, moved = duplicate(run.optimizer), duplicate(scheduler)
    assert type(optimizer) is type(run.optimizer)
    assert type(moved) is type(scheduler)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert moved.get_last_lr() == scheduler.get_last_lr()
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()  # it is in no window
    assert optimizer.param_groups[0]["params"][0].item() == -1.0
    assert run.weight.item() == 0.0


def test_an_accelerator_that_is_let_go_of_is_gone():
    run = accelerator(OURS, 2)
    model = nn.Linear(1, 1)
    model, optimizer, loader = run.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader([torch.ones(1)] * 4)
    )
    gc.disable()
    try:
        for x in loader:
            with run.accumulate(model):
                run.backward(model(x).sum())
                optimizer.step()
                optimizer.zero_grad()
        gone = weakref.ref(run)
        del run, model, optimizer, loader
        assert gone() is None
    finally:
        gc.enable()


class Bare(torch.optim.SGD):
    def zero_grad(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        super().zero_grad()


def test_an_optimizer_whose_zero_grad_takes_nothing():
    run = accelerator(OURS)
    model = nn.Linear(1, 1)
    model, optimizer = run.prepare(model, Bare(model.parameters(), lr=0.1))
    run.gradient_accumulation_steps = 1
    run.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    optimizer.zero_grad()
    assert model.weight.grad is None
