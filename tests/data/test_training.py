"""Loader and step together: any macro-batch on any number of ranks trains as one process with the whole batch does.

EXACT is the promise in float64 (DESIGN section 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import macrobatch as mb
from macrobatch.data import MacroBatchLoader, shard
from macrobatch.data.windows import Windows
from macrobatch.ranks import Ranks

EXACT = 1e-12
NUM_EPOCHS = 2
MICRO_BATCH = 7
SEED = 12


def samples(num: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(num)
    inputs = torch.randn(num, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, 3, (num,), generator=generator))


class Stream(IterableDataset):
    """The samples, one by one."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset[index] for index in range(len(self.dataset)))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def full_batches(num: int, global_batch: int, *, shuffle: bool, tail: Any = "apply") -> Tensor:
    """The parameters after plain PyTorch has trained on whole macro-batches in one process."""
    dataset, (model, optimizer) = samples(num), build()
    windows = Windows(num_samples=num, global_batch=global_batch, shuffle=shuffle, seed=SEED, tail=tail)
    for epoch in range(NUM_EPOCHS):
        for indices in windows.shares(epoch, 0, Ranks()):
            optimizer.zero_grad()
            loss_fn(model, dataset[indices]).backward()
            optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def trained(num: int, global_batch: int, way: str) -> tuple[Tensor, list[int]]:
    """The parameters after training by this library on all ranks there are, and each update's samples on this one."""
    dataset, (model, optimizer) = samples(num), build()
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=MICRO_BATCH, global_batch=global_batch)
    if way == "shard":
        loader = shard(DataLoader(dataset, batch_size=global_batch, shuffle=True), seed=SEED)
    elif way == "stream":
        loader = MacroBatchLoader(Stream(dataset), global_batch)
    else:
        tail: Any = "carry" if way == "carry" else "apply"
        loader = step.loader(dataset, shuffle=True, seed=SEED, tail=tail)
    num_samples = []
    for _ in range(NUM_EPOCHS):
        if way == "micro_batches":
            num_samples += [step.window(share).num_samples for share in loader.micro_batches(MICRO_BATCH)]
        else:
            num_samples += [step(batch).num_samples for batch in loader]
    return nn.utils.parameters_to_vector(model.parameters()).detach(), num_samples


def job(num: int, global_batch: int, way: str) -> tuple[Any, list[int]]:
    torch.manual_seed(100 + dist.get_rank())
    parameters, num_samples = trained(num, global_batch, way)
    return parameters.tolist(), num_samples


def error(found: Any, expected: Tensor) -> float:
    return float((torch.as_tensor(found, dtype=torch.float64) - expected).norm() / expected.norm())


WAYS = ["batches", "micro_batches", "carry", "shard", "stream"]


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_samples_on_three_ranks_in_micro_batches_of_seven(ranks, way):
    expected = full_batches(2300, 1000, shuffle=way != "stream", tail="carry" if way == "carry" else "apply")
    alone, _ = trained(2300, 1000, way)
    assert error(alone, expected) <= EXACT
    for parameters, num_samples in ranks(3).run(job, 2300, 1000, way):
        assert error(parameters, expected) <= EXACT
        assert error(parameters, alone) <= EXACT
        assert set(num_samples) <= {334, 333, 100}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("num", "global_batch"), [(5, 2), (4, 64), (7, 3)])
def test_fewer_samples_than_ranks(ranks, way, num, global_batch):
    expected = full_batches(num, global_batch, shuffle=way != "stream", tail="carry" if way == "carry" else "apply")
    for parameters, _ in ranks(3).run(job, num, global_batch, way):
        assert error(parameters, expected) <= EXACT


def test_control_duplicated_samples_are_noticed():
    """What padding to a multiple of the ranks does, as DistributedSampler would: 1,000 becomes 1,002."""
    dataset, (model, _) = samples(1000), build()
    loss_fn(model, dataset[list(range(1000))]).backward()
    expected = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])
    model.zero_grad()
    loss_fn(model, dataset[[*range(1000), 0, 1]]).backward()
    padded = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])
    assert error(padded, expected) > 1e-5
