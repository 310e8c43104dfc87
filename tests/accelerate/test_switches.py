"""Where macrobatch.accelerate gives other numbers than the original, one change gives the original's back.

The page "Compatibility" names these changes; each is made here, and the gradients are compared with the original's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ORIGINAL, OURS = "accelerate", "macrobatch.accelerate"


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    reset()


def reset() -> None:
    for package in (ORIGINAL, OURS):
        state = importlib.import_module(f"{package}.state")
        for kind in (state.AcceleratorState, state.PartialState, state.GradientState):
            kind._reset_state()


class Training:
    """A model of one weight; `seen` are the gradients that its updates saw, and when."""

    def __init__(self, package: str, **settings: Any) -> None:
        door = importlib.import_module(package)
        plugin = door.utils.GradientAccumulationPlugin(**{"num_steps": 4, **settings})
        self.accelerator: Any = door.Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        self.seen: list[tuple[int, float]] = []
        self.index = 0
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        self.weight = model.weight
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_post_hook(self.record)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def record(self, *_: Any) -> None:
        assert self.weight.grad is not None
        self.seen.append((self.index, round(self.weight.grad.item(), 4)))

    def loader(self, inputs: list[float]) -> Any:
        return self.accelerator.prepare(DataLoader(TensorDataset(torch.tensor(inputs).view(-1, 1))))

    def micro_step(self, x: Tensor) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(x).mean())
            self.optimizer.step()
            self.optimizer.zero_grad()


def zipped(training: Training) -> None:
    """The shorter loader ends before the longer, in two epochs."""
    short, long = training.loader([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), training.loader([0.0] * 9)
    for _ in range(2):
        for (x,), _ in zip(short, long, strict=False):
            training.index += 1
            training.micro_step(x)


def test_the_end_of_a_shorter_loader_ends_no_window():
    original, ours, switched = Training(ORIGINAL), Training(OURS), Training(OURS, sync_with_dataloader=False)
    for training in (original, ours, switched):
        zipped(training)
    assert switched.seen == original.seen
    assert ours.seen != original.seen


@pytest.mark.parametrize("package", [ORIGINAL, OURS])
def test_torch_s_own_clipping_clips_a_part_of_a_sum(package: str):
    training = Training(package, num_steps=2)
    for x in torch.tensor([[[8.0]], [[4.0]]]):
        with training.accelerator.accumulate(training.model):
            training.accelerator.backward(training.model(x).mean())
            if not training.accelerator.sync_gradients:
                clip = training.accelerator.clip_grad_norm_ if package == ORIGINAL else nn.utils.clip_grad_norm_
                clip(training.model.parameters(), 1.0)
            training.optimizer.step()
    assert training.seen == [(0, 3.0)]  # 8 / 2 clipped to 1, and 4 / 2


def test_a_second_accelerator_may_overwrite_the_first_one_s_steps():
    def train(training: Training) -> None:
        for (x,) in training.loader([1.0, 2.0, 3.0]):
            training.index += 1
            training.micro_step(x)

    original = Training(ORIGINAL)
    Training(ORIGINAL, num_steps=2)
    train(original)
    switched = Training(OURS, normalize="constant")
    Training(OURS, num_steps=2)
    switched.accelerator.gradient_accumulation_steps = 2
    train(switched)
    assert switched.seen == original.seen


def test_a_loader_prepared_after_loading_has_another_order(tmp_path: Path):
    def train(package: str, late: bool) -> tuple[list[int], list[int]]:
        seen: list[list[int]] = []
        torch.manual_seed(1)
        for is_second in (False, True):
            training = Training(package)
            accelerator = training.accelerator
            loader: Any = DataLoader(torch.arange(12.0).view(12, 1), batch_size=2, shuffle=True)
            if not (late and is_second):
                loader = accelerator.prepare(loader)
            if is_second:
                accelerator.load_state(str(tmp_path / package))
                loader = accelerator.skip_first_batches(accelerator.prepare(loader), 3)
            seen.append([])
            for index, batch in enumerate(loader):
                seen[-1] += [int(x) for x in batch.flatten()]
                if not is_second and index == 2:
                    accelerator.save_state(str(tmp_path / package))
                    break
            reset()
        return seen[0], seen[1]

    original, switched, ours = train(ORIGINAL, False), train(OURS, True), train(OURS, False)
    assert original == switched
    assert sorted(original[0] + original[1]) != list(range(12))
    assert sorted(ours[0] + ours[1]) == list(range(12))
