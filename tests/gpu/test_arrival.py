"""Copies of micro-batches to a GPU, beside the work on the one before. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.core.arrival import Arrivals

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("pins", [True, False])
def test_micro_batches_arrive_whole_on_a_busy_device(pins):
    """Each is large enough that work which does not wait for its copy sees another one's numbers."""
    model = nn.Linear(1, 1, bias=False, device="cuda")
    host = [torch.full((2**22, 1), float(index)) for index in range(6)]
    host = [each.pin_memory() for each in host] if pins else host
    sums: list[Tensor] = []

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        torch.cuda._sleep(10**7)  # the next copy overtakes this
        sums.append(batch.double().sum())
        return model(batch).mean()

    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, micro_batch=1)
    assert step.window(host).num_micro_batches == 6
    assert [float(each) / 2**22 for each in sums] == list(range(6))


@pytest.mark.parametrize("capture", [None, "graph"])
def test_an_expanded_tensor_arrives_whole(capture):
    model = nn.Linear(4, 1, bias=False, device="cuda")
    batch = torch.arange(4.0).expand(8, -1)
    step = mb.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x).mean(), micro_batch=2, capture=capture
    )
    for _ in range(2):
        step(batch)
    assert torch.equal(model.weight.grad.cpu(), torch.arange(4.0)[None])


def test_the_copy_of_the_next_one_is_done_while_the_first_still_runs():
    model = nn.Linear(1, 1, bias=False, device="cuda")
    host = [torch.full((2**20, 1), float(index)).pin_memory() for index in range(2)]
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x).mean(), micro_batch=1)
    step.window(host)  # takes memory and streams, which may wait
    found: list[tuple[bool, bool]] = []

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        if not found:
            torch.cuda._sleep(10**9)  # some 0.5 s, against less than 1 ms for the copy
            done = torch.cuda.Event()
            done.record()
            stream = step._step._arrivals._stream
            stream.synchronize()
            found.append((stream.query(), done.query()))
        return model(batch).mean()

    step._step.loss_fn = loss_fn
    step.window(host)
    assert found == [(True, False)]


def test_what_is_on_the_device_is_left_there():
    batch = {"x": torch.ones(2, device="cuda")}
    arrival = Arrivals(torch.device("cuda")).start(batch)
    assert arrival.ready() is batch
    assert arrival.wait is None
