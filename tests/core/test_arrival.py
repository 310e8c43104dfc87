"""Batches on their way to the device: begun one micro-batch ahead. What needs a GPU is in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.core.arrival import Arrivals


@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_copy_of_a_micro_batch_begins_before_the_one_before_it_runs(num, monkeypatch):
    model = nn.Linear(1, 1)
    order: list[str] = []
    begin = Arrivals.start

    def noted(arrivals: Arrivals, batch: Any) -> Any:
        order.append(f"copy {batch[0].item():.0f}")
        return begin(arrivals, batch)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        order.append(f"run {batch[0].item():.0f}")
        return model(batch).mean()

    def micro_batches() -> Iterator[Tensor]:
        yield from (torch.full((2, 1), float(index)) for index in range(num))

    monkeypatch.setattr(Arrivals, "start", noted)
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=1)
    step.window(micro_batches())
    expected = ["copy 0"]
    for index in range(1, num):
        expected += [f"copy {index}", f"run {index - 1}"]
    assert order == [*expected, f"run {num - 1}"]


def test_on_the_host_a_batch_is_handed_on_as_it_is():
    batch = {"x": torch.ones(2), "names": ["a", "b"]}
    arrival = Arrivals(torch.device("cpu")).start(batch)
    assert arrival.ready() is batch
    assert arrival.wait is None
