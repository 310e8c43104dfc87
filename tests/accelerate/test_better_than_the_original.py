"""Weaknesses of the original, each shown by running `accelerate` itself beside ours: here, and in the tests beside
this one that have the mark `better`. `pytest tests/accelerate -m better` runs them all."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from macrobatch.errors import WindowError
from tests.accelerate.doors import BOTH, ORIGINAL, OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")

WEAKNESSES = {
    "W1": "a short last window is divided by N, a ragged batch weighs as much as a whole one",
    "W2": "means over tokens are means of means",
    "W3": "accumulate forgotten, loss.backward() in it, two steps in it, batches cut up: other numbers, in silence",
    "W4": "two forwards, then two backwards: replicas come apart",
    "W5": "an evaluation that is left by break, or a batch taken before, changes when training steps",
    "W6": "a training loop that is left by break: its gradients leak into the next epoch",
    "W7": "a checkpoint in the middle of a window loses its gradients",
    "W8": "a shuffled epoch that is resumed repeats samples and leaves others out",
    "W9": "the same with use_seedable_sampler",
    "W10": "schedulers move num_processes times per update: kept, with split_batches as the switch",
    "W11": "gather_for_metrics returns duplicates after skip_first_batches",
    "W12": "gather_for_metrics cuts one value per rank short",
    "W13": "the guide's plugin means N = 1, and cannot be given together with N",
    "W14": "adjust_scheduler has no effect",
    "W15": "a second Accelerator changes the first one's N",
    "W16": "zip of a short and a long loader loses the last window",
    "W17": "a GAN's two accumulate blocks count into one window",
    "W18": "continue on the last micro-batch adds its gradients to the next window's",
    "W-N": "changing N while training gives wrong gradients",
    "W19": "clipping in every micro-batch clips parts of a sum",
    "W20": "torchrun on a machine without GPUs starts N independent runs",
    "W21": "a bare tensor is not synchronised",
    "W22": "automatic checkpoint names collide after a resume",
    "W23": "wrappers hide attributes, hooks and the closure's loss",
    "W24": "the first batch of a loader is held until the second is there",
    "W25": "FSDP on CPUs is ignored, reduce('none') sums, N = 0 and -3 are accepted, the environment beats arguments",
}
"""By the number in `@pytest.mark.better`."""


def test_every_weakness_is_shown_with_the_original_as_the_control():
    shown: dict[str, str] = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                text = ast.unparse(mark)
                if text.startswith("pytest.mark.better("):
                    number = ast.literal_eval(mark.args[0])  # pyright: ignore[reportAttributeAccessIssue]
                    shown[number] = shown.get(number, "") + ast.unparse(node)
    assert shown.keys() == WEAKNESSES.keys()
    for number, tests in shown.items():
        assert re.search(r"BOTH|ORIGINAL|original", tests), f"{number}: no control"
        assert re.search(r"BOTH|OURS|Run\(|interrupted", tests), f"{number}: only the control"


def stopped_in_a_window(package: str, folder: Path | None) -> Tensor:
    """Weights after 16 micro-batches in windows of 4; with a folder, saved and loaded after the 6th."""
    module: Any = None
    for part in (range(6), range(6, 16)) if folder else (range(16),):
        with entered(package) as door:
            accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=4)
            torch.manual_seed(0)
            module = nn.Linear(3, 1)
            model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
            if part.start:
                accelerator.load_state(str(folder))
            inputs = torch.randn(16, 2, 3, generator=torch.Generator().manual_seed(1))
            for index in part:
                with accelerator.accumulate(model):
                    accelerator.backward(model(inputs[index]).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
            if part.stop == 6:
                accelerator.save_state(str(folder))
    return torch.cat([param.detach().flatten() for param in module.parameters()])


@pytest.mark.better("W7")
def test_a_checkpoint_in_a_window_has_its_gradients(tmp_path: Path):
    whole = stopped_in_a_window(OURS, None)
    assert torch.equal(stopped_in_a_window(ORIGINAL, None), whole)
    assert (stopped_in_a_window(ORIGINAL, tmp_path / "theirs") - whole).abs().max() > 1e-3
    assert torch.equal(stopped_in_a_window(OURS, tmp_path / "ours"), whole)


@pytest.mark.better("W3")
@pytest.mark.parametrize("package", BOTH)
def test_two_steps_in_one_block(package: str):
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=2)
        module = nn.Linear(1, 1)
        steps: list[int] = []
        own = torch.optim.SGD(module.parameters(), lr=0.1)
        own.register_step_post_hook(lambda *_: steps.append(1))
        model, optimizer = accelerator.prepare(module, own)

        def loop() -> None:
            for _ in range(8):
                with accelerator.accumulate(model):
                    for _ in range(2):
                        accelerator.backward(model(torch.ones(1, 1)).sum())
                        optimizer.step()
                        optimizer.zero_grad()

        if package == ORIGINAL:
            loop()
            assert len(steps) == 8  # for 4 windows, each with a half of its gradient
        else:
            with pytest.raises(WindowError, match="one accumulate block for each step"):
                loop()


@pytest.mark.better("W14")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the point of the option
def test_adjust_scheduler_does_what_it_says():
    rates: dict[str, float] = {}
    for package in BOTH:
        with entered(package) as door:
            plugin = door.utils.GradientAccumulationPlugin(num_steps=2, adjust_scheduler=True)
            accelerator = door.Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
            module = nn.Linear(1, 1)
            own = torch.optim.SGD(module.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.StepLR(own, step_size=1, gamma=0.5)
            model, optimizer, scheduler = accelerator.prepare(module, own, schedule)
            for _ in range(4):
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(1, 1)).sum())
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            rates[package] = scheduler.get_last_lr()[0]
    assert rates == {ORIGINAL: 0.25, OURS: 0.0625}  # one step per window, and one per micro-batch


def two_forwards(package: str, *, then_two_backwards: bool) -> Tensor:
    """Weights of this rank after four steps on data of its own."""
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        data = torch.randn(4, 2, 6, 4, generator=torch.Generator().manual_seed(accelerator.process_index))
        for first, second in data:
            with accelerator.accumulate(model):
                if then_two_backwards:
                    losses = [model(first).pow(2).mean(), model(second).pow(2).mean()]
                    for loss in losses:
                        accelerator.backward(loss)
                else:
                    accelerator.backward(model(first).pow(2).mean() + model(second).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])


def forward_twice(package: str) -> Tensor:
    return two_forwards(package, then_two_backwards=True)


def forward_once(package: str) -> Tensor:
    return two_forwards(package, then_two_backwards=False)


@pytest.mark.better("W4")
def test_two_forwards_then_two_backwards_keep_replicas_equal(ranks: Any):
    theirs, ours = (ranks(2).run(forward_twice, package) for package in BOTH)
    summed = ranks(2).run(forward_once, OURS)[0]
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3  # in silence
    assert torch.equal(ours[0], ours[1])
    # The same gradient as of the sum of the losses; a few roundings of 6e-8 apart.
    torch.testing.assert_close(ours[0], summed, rtol=1e-5, atol=1e-6)


def bare_tensor(package: str) -> float:
    """The guide's self-contained example, of which the model is a tensor; over ranks, each has half of the batch."""
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=2)
        x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        weight = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.02)
        loader = DataLoader(TensorDataset(x, x + x), batch_size=2 // accelerator.num_processes)
        weight, optimizer, loader = accelerator.prepare(weight, optimizer, loader)
        for inputs, targets in loader:
            with accelerator.accumulate(weight):
                accelerator.backward(torch.nn.functional.mse_loss(inputs * weight, targets))
                optimizer.step()
                optimizer.zero_grad()
        return weight.item()


@pytest.mark.better("W21")
def test_a_bare_tensor_is_synchronised(ranks: Any):
    alone = bare_tensor(ORIGINAL)
    assert bare_tensor(OURS) == alone
    theirs, ours = (ranks(2).run(bare_tensor, package) for package in BOTH)
    assert abs(theirs[0] - theirs[1]) > 0.1
    assert ours == pytest.approx([alone] * 2, rel=1e-6)  # float32, eight additions


def learning_rates(package: str, split: bool) -> list[float]:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True, dataloader_config=door.DataLoaderConfiguration(split_batches=split))
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 8))
        model, optimizer, warmup = accelerator.prepare(model, optimizer, warmup)
        seen: list[float] = []
        for _ in range(4):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
            seen.append(warmup.get_last_lr()[0])
        return seen


@pytest.mark.better("W10")
@pytest.mark.parametrize("split", [False, True])
def test_a_scheduler_moves_as_in_the_original(ranks: Any, split: bool):  # a quirk that is kept, with its switch
    theirs, ours = (ranks(2).run(learning_rates, package, split)[0] for package in BOTH)
    assert theirs == ours == ([0.125, 0.25, 0.375, 0.5] if split else [0.25, 0.5, 0.75, 1.0])


def losses_of_ranks(package: str) -> list[int]:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        loader = accelerator.prepare(DataLoader(torch.arange(9.0), batch_size=2))
        return [accelerator.gather_for_metrics(batch.mean()).numel() for batch in loader]


@pytest.mark.better("W12")
def test_one_value_of_each_rank_is_gathered_whole(ranks: Any):
    theirs, ours = (ranks(2).run(losses_of_ranks, package)[0] for package in BOTH)
    assert theirs == [2, 2, 1]
    assert ours == [2, 2, 2]


def returns_the_loss(accelerator: Any, model: nn.Module, optimizer: Any) -> bool:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).sum()
        accelerator.backward(loss)
        return loss

    return isinstance(optimizer.step(closure), Tensor)


def takes_hooks(optimizer: Any) -> bool:
    try:
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return True


@pytest.mark.better("W23")
def test_wrappers_have_what_they_wrap():
    kept: dict[str, list[bool]] = {}
    for package in BOTH:
        with entered(package) as door:
            model = nn.Linear(1, 1)
            own = torch.optim.SGD(model.parameters(), lr=0.1)
            own.my_name = "mine"  # pyright: ignore[reportAttributeAccessIssue]
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(own, 7)
            accelerator = door.Accelerator(cpu=True)
            model, optimizer, scheduler = accelerator.prepare(model, own, cosine)
            kept[package] = [
                getattr(scheduler, "T_max", None) == 7,
                getattr(scheduler, "base_lrs", None) == [0.1],
                isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler),
                takes_hooks(optimizer),
                getattr(optimizer, "my_name", None) == "mine",
                isinstance(optimizer, torch.optim.SGD),
                returns_the_loss(accelerator, model, optimizer),
            ]
            optimizer.zero_grad()
    assert not any(kept[ORIGINAL])
    assert all(kept[OURS])


@pytest.mark.better("W24")
def test_nothing_is_read_ahead_where_the_length_is_known():
    read: dict[str, int] = {}
    for package in BOTH:
        with entered(package) as door:
            items: list[int] = []

            class Items(torch.utils.data.Dataset[Tensor]):
                def __getitem__(self, index: int) -> Tensor:
                    items.append(index)  # noqa: B023
                    return torch.tensor(float(index))

                def __len__(self) -> int:
                    return 4

            loader = door.Accelerator(cpu=True).prepare(DataLoader(Items()))
            next(iter(loader))
            read[package] = len(items)
    assert read == {ORIGINAL: 2, OURS: 1}


def reduced(package: str) -> float:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        return accelerator.reduce(torch.tensor([1.0 + accelerator.process_index]), "none").item()


@pytest.mark.better("W25")
def test_to_reduce_by_none_leaves_each_rank_its_own(ranks: Any):
    assert ranks(2).run(reduced, ORIGINAL) == [3.0, 3.0]
    assert ranks(2).run(reduced, OURS) == [1.0, 2.0]


def is_sharded(package: str) -> bool:
    with entered(package) as door:
        plugin = importlib.import_module(f"{package}.utils").FullyShardedDataParallelPlugin(fsdp_version=2)
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, _ = door.Accelerator(cpu=True, fsdp_plugin=plugin).prepare(model, optimizer)
        return any(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())


@pytest.mark.better("W25")
def test_fsdp_on_cpus_shards(ranks: Any):
    assert ranks(2).run(is_sharded, ORIGINAL) == [False, False]  # in silence
    assert ranks(2).run(is_sharded, OURS) == [True, True]
