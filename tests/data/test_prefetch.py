"""Copies to a GPU that run ahead. Skipped without one; run before a release."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from macrobatch.core.arrival import Arrivals
from macrobatch.data import MacroBatchLoader
from macrobatch.data.prefetch import on_device
from macrobatch.data.source import Piece

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Samples:
    """Large samples, so that a copy that is not waited for is seen."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        return {"x": torch.full((2**20,), float(index)), "name": str(index)}


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_whole(device, num_workers):
    for batch, first in zip(
        MacroBatchLoader(Samples(), 4, device=device, num_workers=num_workers), (0, 4, 8), strict=True
    ):
        assert batch["x"].is_cuda
        assert batch["name"] == [str(first + row) for row in range(4)]
        torch.cuda._sleep(10**7)  # a busy device: the next copy overtakes this work
        expected = torch.arange(first, first + 4, device="cuda", dtype=torch.float32)[:, None]
        assert bool((batch["x"] == expected).all())


def test_exactly_one_is_drawn_ahead():
    dataset = Samples()
    iterator = iter(MacroBatchLoader(dataset, 2, device="cuda"))
    next(iterator)
    assert dataset.asked == [0, 1, 2, 3]
    next(iterator)
    assert dataset.asked == [0, 1, 2, 3, 4, 5]


def test_position_counts_what_was_yielded():
    loader = MacroBatchLoader(Samples(), 2, device="cuda")
    next(iter(loader))
    assert loader.state_dict()["num_windows"] == 1


def test_memory_is_not_reused_before_the_work_on_it_is_done():
    """Without `record_stream` the allocator hands a batch's memory to a later copy while work on it is still queued."""
    pieces = (Piece(torch.full((2**22,), float(number)).pin_memory(), is_last=True) for number in range(8))
    sums = []
    for piece in on_device(pieces, torch.device("cuda")):
        torch.cuda._sleep(5 * 10**7)
        sums.append(piece.batch.sum())
        del piece
    assert [float(total) / 2**22 for total in sums] == list(range(8))


def test_a_copy_runs_beside_the_work():
    host = torch.ones(2**24).pin_memory()
    arrivals = Arrivals(torch.device("cuda"))
    arrivals.start(host).ready()  # takes memory and streams, which may wait
    torch.cuda._sleep(10**9)  # some 0.5 s, against 1 ms for the copy
    done = torch.cuda.Event()
    done.record()
    arrivals.start(host)
    arrivals._stream.synchronize()
    assert not done.query()


def test_the_work_waits_for_the_copy():
    """The last element of a copy that takes 10 ms, looked at at once."""
    host = [torch.full((2**27,), float(number)).pin_memory() for number in range(3)]
    pieces = (Piece(host[number % 3], is_last=True) for number in range(9))
    seen = [piece.batch[-1].clone() for piece in on_device(pieces, torch.device("cuda"))]
    assert [float(each) for each in seen] == [float(number % 3) for number in range(9)]
