"""One script under `accelerate` and under `macrobatch.accelerate`, on one rank and on two: the same weights.

Where the arithmetic is the same (equal micro-batches in full windows, or `normalize="constant"` for the short ones), to
the bit; the original's gradients are averaged by DDP, ours are summed with seeds scaled beforehand, and both scale by
powers of two here.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.xdist_group("ranks")

PACKAGES = ["accelerate", "macrobatch.accelerate"]
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


def train(package: str, options: dict[str, Any]) -> tuple[Tensor, list[float]]:
    door = importlib.import_module(package)
    state = importlib.import_module(f"{package}.state")
    for kind in (state.AcceleratorState, state.PartialState, state.GradientState):
        kind._reset_state()
    if dist.is_initialized():  # the original asks the environment, not the group
        rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    torch.manual_seed(0)
    plugin: dict[str, Any] = {"num_steps": options["num_steps"]}
    if package != "accelerate" and options.get("constant"):
        plugin["normalize"] = "constant"
    accelerator = door.Accelerator(
        cpu=True,
        gradient_accumulation_plugin=door.utils.GradientAccumulationPlugin(**plugin),
        mixed_precision=options.get("precision", "no"),
    )
    assert accelerator.num_processes == (dist.get_world_size() if dist.is_initialized() else 1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = OPTIMIZERS[options["optimizer"]](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = TensorDataset(torch.randn(options["num_samples"], 6), torch.randint(0, 3, (options["num_samples"],)))
    loader = DataLoader(data, batch_size=4, shuffle=options.get("shuffle", False))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    norms = []
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients and options.get("clip"):
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])
    for kind in (state.AcceleratorState, state.PartialState, state.GradientState):
        kind._reset_state()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return weights.clone(), norms


CASES = {
    "full windows": {"num_samples": 64, "num_steps": 4},
    "shuffled": {"num_samples": 64, "num_steps": 4, "shuffle": True},
    "one": {"num_samples": 64, "num_steps": 1},
    "bf16": {"num_samples": 64, "num_steps": 4, "precision": "bf16"},
    "short windows, constant": {"num_samples": 72, "num_steps": 4, "constant": True},
    "ragged batches, constant": {"num_samples": 70, "num_steps": 4, "constant": True},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_in_one_process(case, optimizer):
    theirs, ours = (train(package, {**CASES[case], "optimizer": optimizer})[0] for package in PACKAGES)
    assert torch.equal(theirs, ours)


def test_same_training_with_clipping():
    theirs, ours = (train(package, {**CASES["full windows"], "optimizer": "sgd", "clip": True}) for package in PACKAGES)
    # The norm of one flat tensor is rounded otherwise than the norm of the norms of several: a few 6e-8.
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_short_windows_differ_without_the_switch():
    # The control: without `constant`, the short window's gradient is another one.
    options = {"num_samples": 72, "num_steps": 4, "optimizer": "sgd"}
    theirs, ours = (train(package, options)[0] for package in PACKAGES)
    assert not torch.allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize("case", ["full windows", "shuffled", "one", "short windows, constant"])
def test_same_weights_on_two_ranks(ranks, case):
    options = {**CASES[case], "optimizer": "adamw"}
    results = {package: [weights for weights, _ in ranks(2).run(train, package, options)] for package in PACKAGES}
    theirs, ours = results.values()
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(theirs[0], ours[0])
