"""Windows under way that are saved and gone on with where `DistributedDataParallelKwargs` ask for the wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.accelerate.doors import OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")

STATIC = {"static_graph": True, "gradient_as_bucket_view": True}
OPTIONS: dict[str, dict[str, bool]] = {
    "default": {},
    "views of buckets": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "static graph, views of buckets": STATIC,
}


class Branches(nn.Module):
    """Of two layers, the second one is used on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor, uses_both: bool) -> Tensor:
        return self.always(x) + (self.sometimes(x) if uses_both else 0.0)


def train(options: dict[str, bool], folder: str, stop: int | None, start: int = 0) -> Tensor:
    """Weights after two windows of three micro-batches, saved after `stop` of these, or begun after `start`. Where DDP
    finds out what is unused, the second layer is used in the first micro-batch of a window alone."""
    with entered(OURS) as door:
        torch.manual_seed(0)
        kwargs = door.DistributedDataParallelKwargs(**options)
        accelerator = door.Accelerator(cpu=True, gradient_accumulation_steps=3, kwargs_handlers=[kwargs])
        model: Any = Branches()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        micro_batches = torch.randn(6, 4, 3, 2)[:, accelerator.process_index]
        if start:
            accelerator.load_state(folder)
        for index, x in enumerate(micro_batches[start:], start=start):
            with accelerator.accumulate(model):
                uses_both = index % 3 == 0 or "find_unused_parameters" not in options
                accelerator.backward(model(x, uses_both).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if index + 1 == stop:
                accelerator.save_state(folder)
        return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.filterwarnings("ignore:find_unused_parameters")
@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_goes_on_in_the_middle_of_a_window(ranks: Any, tmp_path: Path, name: str, stop: int):
    """DDP of a new process knows nothing of the window's first micro-batches. Few numbers, and the same sums: rounded
    alike, or 6e-8 apart after two steps."""
    options = OPTIONS[name]
    whole = ranks(2).run(train, options, str(tmp_path), None)[0]
    saved = ranks(2).run(train, options, str(tmp_path), stop)
    for weights in (*saved, *ranks(2).run(train, options, str(tmp_path), None, stop)):
        torch.testing.assert_close(weights, whole, rtol=0, atol=1e-6)


def test_training_goes_on_with_other_numbers_of_ranks(ranks: Any, tmp_path: Path):
    """What is left of the window is smaller, or larger, than it would have been; all ranks see the same of it."""
    for num_before, num_after in ((4, 2), (2, 4)):
        folder = str(tmp_path / f"{num_before}")
        ranks(num_before).run(train, {}, folder, 2)
        weights = ranks(num_after).run(train, {}, folder, None, 2)
        assert all(torch.equal(each, weights[0]) for each in weights)
