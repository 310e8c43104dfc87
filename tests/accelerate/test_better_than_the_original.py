"""Failures of the original, each shown by running `accelerate` itself beside ours. Those of the window are in
`test_accumulate.py` and `test_by_hand.py` (W1-W3, W5, W6, W13-W19), of checkpoints in `test_checkpointing.py` and
`test_resume_order.py` (W7-W9, W11, W22), of torchrun in `test_state.py` (W20)."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.accelerate.doors import BOTH, ORIGINAL, OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")


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


def test_two_forwards_then_two_backwards_keep_replicas_equal(ranks: Any):  # W4
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


def test_a_bare_tensor_is_synchronised(ranks: Any):  # W21
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


@pytest.mark.parametrize("split", [False, True])
def test_a_scheduler_moves_as_in_the_original(ranks: Any, split: bool):  # W10: a quirk that is kept, with its switch
    theirs, ours = (ranks(2).run(learning_rates, package, split)[0] for package in BOTH)
    assert theirs == ours == ([0.125, 0.25, 0.375, 0.5] if split else [0.25, 0.5, 0.75, 1.0])


def losses_of_ranks(package: str) -> list[int]:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        loader = accelerator.prepare(DataLoader(torch.arange(9.0), batch_size=2))
        return [accelerator.gather_for_metrics(batch.mean()).numel() for batch in loader]


def test_one_value_of_each_rank_is_gathered_whole(ranks: Any):  # W12
    theirs, ours = (ranks(2).run(losses_of_ranks, package)[0] for package in BOTH)
    assert theirs == [2, 2, 1]
    assert ours == [2, 2, 2]


def takes_hooks(optimizer: Any) -> bool:
    try:
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return True


def test_wrappers_have_what_they_wrap():  # W23
    kept: dict[str, list[bool]] = {}
    for package in BOTH:
        with entered(package) as door:
            model = nn.Linear(1, 1)
            own = torch.optim.SGD(model.parameters(), lr=0.1)
            own.my_name = "mine"  # pyright: ignore[reportAttributeAccessIssue]
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(own, 7)
            model, optimizer, scheduler = door.Accelerator(cpu=True).prepare(model, own, cosine)
            model.weight.grad = torch.ones(1, 1)
            kept[package] = [
                getattr(scheduler, "T_max", None) == 7,
                getattr(scheduler, "base_lrs", None) == [0.1],
                isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler),
                takes_hooks(optimizer),
                getattr(optimizer, "my_name", None) == "mine",
                isinstance(optimizer, torch.optim.SGD),
            ]
            optimizer.zero_grad()
    assert not any(kept[ORIGINAL][i] for i in range(6))
    assert all(kept[OURS])


def test_nothing_is_read_ahead_where_the_length_is_known():  # W24
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


def test_to_reduce_by_none_leaves_each_rank_its_own(ranks: Any):  # W25
    assert ranks(2).run(reduced, ORIGINAL) == [3.0, 3.0]
    assert ranks(2).run(reduced, OURS) == [1.0, 2.0]


def is_sharded(package: str) -> bool:
    with entered(package) as door:
        plugin = importlib.import_module(f"{package}.utils").FullyShardedDataParallelPlugin(fsdp_version=2)
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, _ = door.Accelerator(cpu=True, fsdp_plugin=plugin).prepare(model, optimizer)
        return any(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())


def test_fsdp_on_cpus_shards(ranks: Any):  # W25
    assert ranks(2).run(is_sharded, ORIGINAL) == [False, False]  # in silence
    assert ranks(2).run(is_sharded, OURS) == [True, True]


def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch):  # W25
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    found: dict[str, int] = {}
    for package in BOTH:
        with entered(package) as door:
            found[package] = door.Accelerator(cpu=True, gradient_accumulation_steps=8).gradient_accumulation_steps
    assert found == {ORIGINAL: 2, OURS: 8}
