"""Ranks with other numbers of batches, in `join_uneven_inputs`: every sample counts once, whichever rank has it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tests.accelerate.doors import ORIGINAL, OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")

DATA = torch.arange(10.0).view(5, 2) / 10


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(num_steps: int, even_batches: bool | None) -> tuple[int, Tensor]:
    """Batches of this rank, and its weights after two epochs of five samples."""
    with entered(OURS) as door:
        config = door.DataLoaderConfiguration(even_batches=even_batches is not None)
        accelerator = door.Accelerator(gradient_accumulation_steps=num_steps, dataloader_config=config, cpu=True)
        model, optimizer, loader = accelerator.prepare(*model_and_optimizer(), DataLoader(DATA))
        num_batches = 0
        for _ in range(2):
            with accelerator.join_uneven_inputs([model], even_batches=even_batches):
                for x in loader:
                    num_batches += 1
                    with accelerator.accumulate(model):
                        accelerator.backward(model(x).square().mean())
                        optimizer.step()
                        optimizer.zero_grad()
        assert loader.batch_sampler.even_batches is (even_batches is not None)
        return num_batches, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("even_batches", [None, False], ids=["of the loader", "of the context"])
@pytest.mark.parametrize(("num_steps", "windows"), [(1, [2, 4, 5]), (2, [4, 5]), (3, [5])])
def test_each_sample_counts_once(ranks: Any, num_steps: int, windows: list[int], even_batches: bool | None):
    results = ranks(2).run(train, num_steps, even_batches)
    assert [num for num, _ in results] == [6, 4]
    model, optimizer = model_and_optimizer()
    model.double()
    for _ in range(2):
        for start, end in zip([0, *windows], windows, strict=False):
            optimizer.zero_grad()
            model(DATA[start:end].double()).square().mean().backward()
            optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for _, weights in results:
        assert torch.equal(weights, results[0][1])
        torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)  # float32, a few roundings of 6e-8


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(DATA)


def warned(package: str) -> list[str]:
    with entered(package) as door:
        accelerator = door.Accelerator(cpu=True)
        model, *_ = accelerator.prepare(nn.Linear(2, 2), DataLoader(Stream()))
        with (
            warnings.catch_warnings(record=True) as caught,
            accelerator.join_uneven_inputs([model], even_batches=False),
        ):
            pass
        return [str(each.message) for each in caught]


def test_the_original_does_nothing_on_cpus_and_ours_says_what_it_cannot_do(ranks: Any):
    assert all("no effect" in text for (text,) in ranks(2).run(warned, ORIGINAL))  # the rank without data would wait
    assert all("only supported for map-style" in text for (text,) in ranks(2).run(warned, OURS))


def wrapped() -> str:
    with entered(OURS) as door:
        accelerator = door.Accelerator(cpu=True, kwargs_handlers=[door.DistributedDataParallelKwargs()])
        return refused(accelerator)


def sharded() -> str:
    with entered(OURS) as door:
        return refused(door.Accelerator(cpu=True, fsdp_plugin=door.FullyShardedDataParallelPlugin()))


def refused(accelerator: Any) -> str:
    model, _ = accelerator.prepare(*model_and_optimizer())
    try:
        with accelerator.join_uneven_inputs([model]):
            return "entered"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("job", [wrapped, sharded])
def test_models_whose_forward_is_a_collective_are_refused(ranks: Any, job: Any):
    assert all("To fix it, leave" in text for text in ranks(2).run(job))
