"""Where macrobatch.accelerate gives other numbers than the original, one change gives the original's back.

The page "Compatibility" names these changes; each is made here, and the gradients are compared with the original's.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.accelerate.doors import ORIGINAL, OURS, entered, reset

pytestmark = pytest.mark.xdist_group("ranks")


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


def num_steps(package: str, **arguments: Any) -> int:
    """Micro-batches of a window, of an accelerator with the guide's plugin."""
    with entered(package) as door:
        plugin = door.utils.GradientAccumulationPlugin(sync_with_dataloader=False, **arguments.pop("plugin", {}))
        return door.Accelerator(cpu=True, gradient_accumulation_plugin=plugin, **arguments).gradient_accumulation_steps


def test_a_plugin_alone_means_one_step(monkeypatch: pytest.MonkeyPatch):
    assert num_steps(ORIGINAL) == num_steps(OURS) == 1
    assert num_steps(OURS, gradient_accumulation_steps=4) == 4
    with pytest.raises(ValueError, match="only pass one"):
        num_steps(ORIGINAL, gradient_accumulation_steps=4)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert num_steps(ORIGINAL) == num_steps(OURS, plugin={"num_steps": 1}) == 1
    assert num_steps(OURS) == 2


def test_the_environment_counts_without_an_argument(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    found = {}
    for package, arguments in ((ORIGINAL, {"gradient_accumulation_steps": 8}), (OURS, {})):
        with entered(package) as door:
            found[package] = door.Accelerator(cpu=True, **arguments).gradient_accumulation_steps
    assert found == {ORIGINAL: 2, OURS: 2}
    with entered(OURS) as door:
        assert door.Accelerator(cpu=True, gradient_accumulation_steps=8).gradient_accumulation_steps == 8


def test_a_negated_loss_climbs():
    seen = {}
    for package, steps, sign in ((ORIGINAL, -4, 1), (OURS, 4, -1)):
        training = Training(package, num_steps=steps)
        for x in torch.arange(8.0).view(8, 1, 1):
            training.index += 1
            with training.accelerator.accumulate(training.model):
                training.accelerator.backward(sign * training.model(x).mean())
                training.optimizer.step()
                training.optimizer.zero_grad()
        seen[package] = training.seen
    assert seen[OURS] == seen[ORIGINAL] == [(4, -1.5), (8, -5.5)]


def batches(package: str, **arguments: Any) -> list[list[int]]:
    with entered(package) as door:
        data = door.Accelerator(cpu=True, **arguments).prepare(DataLoader(list(range(16)), batch_size=4))
        return [batch.tolist() for batch in data]


def batches_in_the_original() -> list[list[int]]:
    return batches(ORIGINAL, split_batches=True)


def batches_without_the_argument() -> list[list[int]]:
    return batches(OURS)


def batches_that_are_split() -> list[list[int]]:
    return batches(OURS, split_batches=True)


def test_split_batches_is_ignored_if_it_is_left_out(ranks: Any):
    assert ranks(2).run(batches_in_the_original) == ranks(2).run(batches_without_the_argument)
    assert ranks(2).run(batches_that_are_split) != ranks(2).run(batches_in_the_original)


def gathered(package: str, how: str) -> list[list[float]]:
    """Of eleven samples, all but the first batch; then one value of each rank."""
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        data = accelerator.prepare(DataLoader(torch.arange(11.0), batch_size=2))
        skipping = accelerator.skip_first_batches(data, 1)
        rows = [getattr(accelerator, how)(batch).tolist() for batch in skipping]
        values = []
        for batch in accelerator.prepare(DataLoader(torch.arange(9.0), batch_size=2)):
            value = getattr(accelerator, how)(batch.mean())
            if how == "gather" and accelerator.gradient_state.end_of_dataloader:
                value = value[: accelerator.gradient_state.remainder]
            values.append(value.tolist())
        return [*rows, *values]


def test_gather_has_what_the_original_gathers_for_metrics(ranks: Any):
    theirs, switched = ranks(2).run(gathered, ORIGINAL, "gather_for_metrics"), ranks(2).run(gathered, OURS, "gather")
    assert theirs == switched
    assert ranks(2).run(gathered, OURS, "gather_for_metrics") != theirs


def reduced(package: str, reduction: str) -> float:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        return accelerator.reduce(torch.tensor([1.0 + accelerator.process_index]), reduction).item()


def test_a_sum_is_what_the_original_s_none_is(ranks: Any):
    assert ranks(2).run(reduced, ORIGINAL, "none") == ranks(2).run(reduced, OURS, "sum") == [3.0, 3.0]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_schedulers_are_not_adjusted_if_it_is_left_out():
    rates = {}
    for package, arguments in (
        (ORIGINAL, {"adjust_scheduler": True}),
        (OURS, {}),
        ("adjusted", {"adjust_scheduler": True}),
    ):
        training = Training(OURS if package == "adjusted" else package, **arguments)
        own = torch.optim.lr_scheduler.ExponentialLR(training.optimizer.optimizer, 0.5)
        training.optimizer.param_groups[0]["lr"] = 1.0
        scheduler = training.accelerator.prepare(own)
        for x in torch.ones(4, 1, 1):
            training.micro_step(x)
            scheduler.step()
        rates[package] = scheduler.get_last_lr()
        reset()
    assert rates[ORIGINAL] == rates[OURS] == [0.5]
    assert rates["adjusted"] == [0.0625]
