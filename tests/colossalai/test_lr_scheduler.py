"""Schedules: every learning rate of a run against its formula, and going on from a saved one."""

from __future__ import annotations

import math

import pytest
import torch

from macrobatch.colossalai.nn import lr_scheduler as schedules
from macrobatch.colossalai.nn.lr_scheduler.delayed import DelayerScheduler, WarmupDelayerScheduler, WarmupScheduler

BASES = (0.1, 0.02)
TOTAL = 20


def new_optimizer(bases=BASES):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in bases]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def trajectory(scheduler, num_steps):
    """The learning rates of all groups, before each step, and after the last one."""
    rates = [scheduler.get_last_lr()]
    for _ in range(num_steps):
        scheduler.optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr())
        assert rates[-1] == [group["lr"] for group in scheduler.optimizer.param_groups]
    return rates


def cosine(t, total, base, end=0.0):
    return end + (base - end) * (1 + math.cos(math.pi * t / total)) / 2


def warm(t, warmup, base, after):
    return (t + 1) / warmup * base if t < warmup else after(t - warmup)


def halve(t):
    return 0.5**t


def damp(t):
    return 0.9


CASES = {
    "cosine": (lambda o: schedules.CosineAnnealingLR(o, TOTAL, eta_min=0.01), lambda t, b: cosine(t, TOTAL, b, 0.01)),
    "cosine, warm-up": (
        lambda o: schedules.CosineAnnealingWarmupLR(o, TOTAL, warmup_steps=5, eta_min=0.001),
        lambda t, b: warm(t, 5, b, lambda s: cosine(s, 15, b, 0.001)),
    ),
    "cosine, no warm-up": (lambda o: schedules.CosineAnnealingWarmupLR(o, TOTAL), lambda t, b: cosine(t, TOTAL, b)),
    "flat": (
        lambda o: schedules.FlatAnnealingLR(o, TOTAL, pct_start=0.5),
        lambda t, b: b if t < 10 else cosine(t - 10, 10, b),
    ),
    "flat, warm-up": (
        lambda o: schedules.FlatAnnealingWarmupLR(o, TOTAL, warmup_steps=4, pct_start=0.5, eta_min=0.002),
        lambda t, b: warm(t, 4, b, lambda s: b if s < 8 else cosine(s - 8, 8, b, 0.002)),
    ),
    "linear": (
        lambda o: schedules.LinearWarmupLR(o, TOTAL, warmup_steps=4),
        lambda t, b: (t + 1) / 5 * b if t < 4 else (TOTAL - t) / 16 * b,
    ),
    "multi-step": (
        lambda o: schedules.MultiStepLR(o, TOTAL, milestones=[3, 10], gamma=0.1),
        lambda t, b: b * 0.1 ** ((t >= 3) + (t >= 10)),
    ),
    "multi-step, warm-up": (
        lambda o: schedules.MultiStepWarmupLR(o, TOTAL, warmup_steps=4, milestones=[2, 4, 10], gamma=0.5),
        lambda t, b: warm(t, 4, b, lambda s: b * 0.5 ** (1 + (s >= 6))),  # a milestone in the warm-up is left out
    ),
    "polynomial": (
        lambda o: schedules.PolynomialLR(o, TOTAL, end_lr=0.001, power=2.0),
        lambda t, b: (b - 0.001) * (1 - t / TOTAL) ** 2 + 0.001,
    ),
    "polynomial, warm-up": (
        lambda o: schedules.PolynomialWarmupLR(o, TOTAL, warmup_steps=5),
        lambda t, b: warm(t, 5, b, lambda s: (b - 0.0001) * (1 - s / 15) + 0.0001),
    ),
    "lambda": (lambda o: schedules.LambdaLR(o, TOTAL, lr_lambda=halve), lambda t, b: b * 0.5**t),
    "multiplicative": (lambda o: schedules.MultiplicativeLR(o, TOTAL, lr_lambda=damp), lambda t, b: b * 0.9**t),
    "step": (lambda o: schedules.StepLR(o, TOTAL, step_size=3, gamma=0.5), lambda t, b: b * 0.5 ** (t // 3)),
    "exponential": (lambda o: schedules.ExponentialLR(o, TOTAL, gamma=0.9), lambda t, b: b * 0.9**t),
    "one cycle": (lambda o: schedules.OneCycleLR(o, TOTAL), None),
}


@pytest.mark.parametrize("name", [name for name, (_, formula) in CASES.items() if formula])
def test_every_rate_is_that_of_the_formula(name):
    build, formula = CASES[name]
    rates = trajectory(build(new_optimizer()), TOTAL)
    expected = [[formula(t, base) for base in BASES] for t in range(TOTAL + 1)]
    # torch computes the cosine step by step; the rounding of 20 steps adds up to less than this.
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=1e-9, atol=1e-15)


def test_one_cycle_is_torchs_up_to_the_optimizers_own_rate():
    ours = trajectory(schedules.OneCycleLR(new_optimizer(), TOTAL, 0.4), TOTAL - 1)
    peer = torch.optim.lr_scheduler.OneCycleLR(new_optimizer(), list(BASES), total_steps=TOTAL, pct_start=0.4)
    assert ours == trajectory(peer, TOTAL - 1)
    assert max(rate[0] for rate in ours) == BASES[0]


@pytest.mark.parametrize("saved_at", [0, 2, 4, 5, 12])
@pytest.mark.parametrize("name", list(CASES))
def test_going_on_from_a_saved_state(name, saved_at, tmp_path):
    build, _ = CASES[name]
    whole = trajectory(build(new_optimizer()), TOTAL - 1)

    first = build(new_optimizer())
    trajectory(first, saved_at)
    torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")

    second = build(new_optimizer())
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    second.optimizer.load_state_dict(states[1])
    second.load_state_dict(states[0])
    assert [second.get_last_lr(), *trajectory(second, TOTAL - 1 - saved_at)[1:]] == whole[saved_at:]


@pytest.mark.parametrize("done", [2, 3, 4, 9])
@pytest.mark.parametrize("name", ["cosine, warm-up", "flat, warm-up", "multi-step, warm-up", "polynomial, warm-up"])
def test_going_on_by_last_epoch(name, done):
    build, formula = CASES[name]
    first = build(new_optimizer())
    trajectory(first, done)
    optimizer = new_optimizer()
    optimizer.load_state_dict(first.optimizer.state_dict())
    by_name = {
        "cosine, warm-up": lambda: schedules.CosineAnnealingWarmupLR(optimizer, TOTAL, 5, 0.001, last_epoch=done - 1),
        "flat, warm-up": lambda: schedules.FlatAnnealingWarmupLR(optimizer, TOTAL, 4, 0.5, 0.002, last_epoch=done - 1),
        "multi-step, warm-up": lambda: schedules.MultiStepWarmupLR(
            optimizer, TOTAL, 4, [2, 4, 10], 0.5, last_epoch=done - 1
        ),
        "polynomial, warm-up": lambda: schedules.PolynomialWarmupLR(optimizer, TOTAL, 5, last_epoch=done - 1),
    }
    rates = trajectory(by_name[name](), TOTAL - done)
    expected = [[formula(t, base) for base in BASES] for t in range(done, TOTAL + 1)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", [WarmupScheduler, DelayerScheduler])
def test_any_schedule_may_come_after(kind):
    optimizer = new_optimizer((1.0,))
    scheduler = kind(optimizer, 2, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    rates = [rate for (rate,) in trajectory(scheduler, 4)]
    assert rates == ([0.5, 1.0, 1.0, 0.5, 0.25] if kind is WarmupScheduler else [1.0, 1.0, 1.0, 0.5, 0.25])
    assert scheduler.finished
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)


def test_a_schedule_of_another_optimizer_does_not_come_after():
    after = torch.optim.lr_scheduler.StepLR(new_optimizer(), 1)
    with pytest.raises(ValueError, match="the same optimizer"):
        WarmupDelayerScheduler(new_optimizer(), 2, 1, after)


def test_a_state_of_another_kind_is_refused():
    scheduler = schedules.CosineAnnealingWarmupLR(new_optimizer(), TOTAL, 5)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match="CosineAnnealingWarmupLR"):
        scheduler.load_state_dict({"last_epoch": 3})
    assert scheduler.state_dict() == before


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("CosineAnnealingLR", {"total_steps": 0}),
        ("CosineAnnealingLR", {"total_steps": 2.5}),
        ("CosineAnnealingWarmupLR", {"total_steps": 4, "warmup_steps": 5}),
        ("CosineAnnealingWarmupLR", {"total_steps": 4, "warmup_steps": -1}),
        ("FlatAnnealingLR", {"total_steps": 4, "pct_start": 1.5}),
        ("FlatAnnealingWarmupLR", {"total_steps": 4, "pct_start": float("nan")}),
        ("LinearWarmupLR", {"total_steps": 4, "warmup_steps": 4}),
        ("MultiStepLR", {"total_steps": 4}),
        ("MultiStepWarmupLR", {"total_steps": 4, "milestones": []}),
        ("MultiStepWarmupLR", {"total_steps": 4, "milestones": [1.5]}),
        ("PolynomialLR", {"total_steps": 4, "end_lr": -1.0}),
        ("PolynomialWarmupLR", {"total_steps": 4, "warmup_steps": 4}),
        ("LambdaLR", {"total_steps": 4}),
        ("StepLR", {"total_steps": 4, "step_size": 0}),
        ("ExponentialLR", {"total_steps": True}),
        ("OneCycleLR", {"total_steps": "4"}),
    ],
    ids=str,
)
def test_bad_arguments_change_nothing(name, arguments):
    optimizer = new_optimizer()
    with pytest.raises(ValueError, match="expected"):
        getattr(schedules, name)(optimizer, **arguments)
    assert [group["lr"] for group in optimizer.param_groups] == list(BASES)
