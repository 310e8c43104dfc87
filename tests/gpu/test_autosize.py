"""`micro_batch="auto"` on a GPU whose memory is cut down: it really runs out. Skipped without one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDTH = 1024
LIMIT_BYTES = 2 * 2**30


@pytest.fixture(autouse=True)
def small_gpu(tmp_path, monkeypatch) -> Iterator[None]:
    """2 GiB for this process, and a cache of its own."""
    monkeypatch.setenv("MACROBATCH_CACHE", str(tmp_path))
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(LIMIT_BYTES / total, 0)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    gc.collect()
    torch.cuda.empty_cache()


class Wide(nn.Module):
    """8 layers, each keeping 3 activations of a row of 64 × 1024 float32: 6 MiB for each sample, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.norm(x_BTC)
        for layer in self.layers:
            x_BTC = F.dropout(torch.tanh(layer(x_BTC)), 0.1)
        return x_BTC


def loss_fn(model: Any, x_BTC: Tensor) -> Tensor:
    return model(x_BTC).square().mean()


def build(micro_batch: Any, **options: Any) -> tuple[nn.Module, mb.TrainStep]:
    torch.manual_seed(3)
    model = Wide().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, mb.TrainStep(model, optimizer, loss_fn, micro_batch=micro_batch, **options)


def batch_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 64, WIDTH, generator=torch.Generator().manual_seed(7))  # on the host


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}], ids=["fp32", "bf16"])
def test_the_chosen_size_runs_and_the_largest_is_near_the_limit(options):
    _, step = build("auto", **options)
    batch = batch_of(1000)
    for _ in range(3):
        assert step(batch).skipped is None
    survey: Any = step.split.survey
    peaks: Any = {trial.size: trial.peak_bytes for trial in survey.trials}
    assert step.split.size == survey.size, "nothing ran out of memory"
    assert survey.size <= survey.largest < 1000
    assert peaks[survey.largest] <= survey.limit_bytes <= 0.9 * LIMIT_BYTES + 2**20
    assert peaks[survey.largest] >= 0.9 * survey.limit_bytes, "the line is straight"
    assert torch.cuda.max_memory_allocated() <= LIMIT_BYTES
    print(survey)  # noqa: T201 - what was measured, for whoever runs this by hand


@pytest.mark.parametrize("sizes", [[400, 40], [40, 40, 400]], ids=["first", "last"])
def test_a_window_that_ran_out_of_memory_has_the_bits_of_one_that_was_smaller(sizes):
    """400 samples take more than 2.4 GB, whether in the forward or in the backward, and 200 do not always."""
    model, step = build("auto")
    batch = batch_of(sum(sizes))
    for _ in range(2):
        step.window(batch.split(sizes))
    size = step.split.size
    assert size in (200, 100, 50)
    parts = [part for each in sizes for part in [size] * (each // size) + [each % size] * bool(each % size)]
    states = torch.cuda.get_rng_state(), torch.get_rng_state()
    del step
    gc.collect()
    torch.cuda.empty_cache()
    other, direct = build(1)
    for _ in range(2):
        direct.window(batch.split(parts))
    assert_same_bits(model, other)
    assert torch.equal(states[0], torch.cuda.get_rng_state())
    assert torch.equal(states[1], torch.get_rng_state())


def test_trying_leaves_no_trace():
    model, step = build("auto")
    batch = batch_of(300)
    result = step(batch)
    size = step.split.survey.size
    assert result.num_micro_batches == -(-300 // size)
    states = torch.cuda.get_rng_state(), torch.get_rng_state()
    del step
    gc.collect()
    torch.cuda.empty_cache()
    other, direct = build(size)
    direct(batch)
    assert_same_bits(model, other)
    assert torch.equal(states[0], torch.cuda.get_rng_state())
    assert torch.equal(states[1], torch.get_rng_state())


def test_one_sample_that_does_not_fit():
    def greedy(model: Any, x_BTC: Tensor) -> Tensor:
        return loss_fn(model, x_BTC) + torch.empty(3 * 2**30, dtype=torch.uint8, device="cuda").sum()

    model = Wide().cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = mb.TrainStep(model, torch.optim.AdamW(model.parameters()), greedy)
    with pytest.raises(mb.errors.NoMemoryError, match="a single sample"):
        step(batch_of(4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_plan_is_remembered():
    def counted(model: Any, x_BTC: Tensor) -> Tensor:
        calls.append(len(x_BTC))
        return loss_fn(model, x_BTC)

    calls: list[int] = []
    sizes, tried = [], 0
    for _ in range(2):
        torch.manual_seed(3)
        model = Wide().cuda()
        step = mb.TrainStep(model, torch.optim.AdamW(model.parameters()), counted)
        result = step(batch_of(60))
        sizes.append(step.split.size)
        tried = len(calls) - result.num_micro_batches
        calls.clear()
        del model, step, result
        gc.collect()
        torch.cuda.empty_cache()
    assert tried == 0
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_micro_steps_are_planned_for():
    _, step = build("auto", capture="compile")
    batch = batch_of(64)
    for _ in range(2):
        assert step(batch).skipped is None
    assert step.split.size == step.split.survey.size


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("capture", ["graph", "auto"])
def test_graphs_are_planned_for(capture):
    """The size leaves room for a graph beside the eager run that it is compared with, so nothing is given up again."""
    _, step = build("auto", capture=capture)
    batch = batch_of(400)
    for _ in range(6):
        assert step(batch).skipped is None
    survey: Any = step.split.survey
    assert step.split.size == survey.size, "nothing ran out of memory"
    micro_step: Any = step._step.micro_step
    assert micro_step.num_recordings > 0
    print(survey)  # noqa: T201 - what was measured, for whoever runs this by hand
