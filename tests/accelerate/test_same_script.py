"""One script under `accelerate` and under `macrobatch.accelerate`, on one rank and on two: the same weights.

Where the arithmetic is the same (equal micro-batches in full windows, or `normalize="constant"` for the short ones), to
the bit; the original's gradients are averaged by DDP, ours are summed with seeds scaled beforehand, and both scale by
powers of two here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.accelerate.doors import BOTH, OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


def train(package: str, options: dict[str, Any]) -> tuple[Tensor, list[float]]:
    with entered(package) as door:
        torch.manual_seed(0)
        plugin: dict[str, Any] = {"num_steps": options["num_steps"]}
        if package == OURS and options.get("constant"):
            plugin["normalize"] = "constant"
        if package == OURS and options.get("narrow"):
            plugin["widens"] = False
        accelerator = door.Accelerator(
            cpu=True,
            gradient_accumulation_plugin=door.utils.GradientAccumulationPlugin(**plugin),
            mixed_precision=options.get("precision", "no"),
            kwargs_handlers=[door.DistributedDataParallelKwargs(**options["ddp"])] if "ddp" in options else None,
        )
        assert accelerator.num_processes == (dist.get_world_size() if dist.is_initialized() else 1)
        dtype = options.get("dtype", torch.float32)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
        optimizer = OPTIMIZERS[options["optimizer"]](model.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        data = TensorDataset(torch.randn(options["num_samples"], 6), torch.randint(0, 3, (options["num_samples"],)))
        loader = DataLoader(data, batch_size=4, shuffle=options.get("shuffle", False))
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        norms = []
        for _ in range(2):
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(x.to(dtype)).float(), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and options.get("clip"):
                        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        weights = torch.cat([p.detach().flatten() for p in accelerator.unwrap_model(model).parameters()])
        return weights.clone(), norms


CASES = {
    "full windows": {"num_samples": 64, "num_steps": 4},
    "shuffled": {"num_samples": 64, "num_steps": 4, "shuffle": True},
    "one": {"num_samples": 64, "num_steps": 1},
    "bf16": {"num_samples": 64, "num_steps": 4, "precision": "bf16"},
    "bf16 parameters": {"num_samples": 64, "num_steps": 4, "dtype": torch.bfloat16, "narrow": True},
    "short windows, constant": {"num_samples": 72, "num_steps": 4, "constant": True},
    "ragged batches, constant": {"num_samples": 70, "num_steps": 4, "constant": True},
    "shuffled, short, bf16, constant": {
        "num_samples": 70,
        "num_steps": 4,
        "constant": True,
        "shuffle": True,
        "precision": "bf16",
    },
}
OVER_RANKS = {
    **CASES,
    "wrapped": {"num_samples": 64, "num_steps": 4, "ddp": {}},
    "wrapped, find_unused_parameters": {"num_samples": 64, "num_steps": 4, "ddp": {"find_unused_parameters": True}},
    "wrapped, short windows, constant": {"num_samples": 72, "num_steps": 4, "constant": True, "ddp": {}},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_in_one_process(case, optimizer):
    theirs, ours = (train(package, {**CASES[case], "optimizer": optimizer})[0] for package in BOTH)
    assert torch.equal(theirs, ours)


def test_same_training_with_clipping():
    theirs, ours = (train(package, {**CASES["full windows"], "optimizer": "sgd", "clip": True}) for package in BOTH)
    # The norm of one flat tensor is rounded otherwise than the norm of the norms of several: a few 6e-8.
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_short_windows_differ_without_the_switch():
    # The control: without `constant`, the short window's gradient is another one.
    options = {"num_samples": 72, "num_steps": 4, "optimizer": "sgd"}
    theirs, ours = (train(package, options)[0] for package in BOTH)
    assert not torch.allclose(theirs, ours, atol=1e-4)


def test_sums_of_16_bits_differ_without_the_switch():
    options = {"num_samples": 64, "num_steps": 8, "optimizer": "sgd", "dtype": torch.bfloat16}
    theirs, ours = (train(package, options)[0] for package in BOTH)
    assert not torch.equal(theirs, ours)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_windows_that_are_no_power_of_two_are_the_same_but_for_roundings(ranks: Any, optimizer: str, num_ranks: int):
    options = {"num_samples": 72, "num_steps": 3, "optimizer": optimizer}
    theirs, ours = (
        ranks(2).run(train, package, options)[0][0] if num_ranks > 1 else train(package, options)[0] for package in BOTH
    )
    # A third is rounded before the sum in one and after it in the other: 6e-8 of gradients of about 1, 12 updates.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", [case for case in OVER_RANKS if case != "bf16 parameters"])
def test_same_weights_on_two_ranks(ranks: Any, case: str, optimizer: str):
    options = {**OVER_RANKS[case], "optimizer": optimizer}
    theirs, ours = ([weights for weights, _ in ranks(2).run(train, package, options)] for package in BOTH)
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(theirs[0], ours[0])


def test_clipping_on_two_ranks(ranks: Any):
    options = {**CASES["full windows"], "optimizer": "sgd", "clip": True}
    theirs, ours = (ranks(2).run(train, package, options)[0] for package in BOTH)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)  # as in one process
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_communication_in_half_precision_on_two_ranks(ranks: Any):
    options = {"num_samples": 64, "num_steps": 4, "ddp": {"comm_hook": "fp16"}, "optimizer": "sgd"}
    theirs, ours = ([weights for weights, _ in ranks(2).run(train, package, options)] for package in BOTH)
    assert torch.equal(ours[0], ours[1])
    # What is sent is scaled otherwise, which tells for numbers below fp16's normal range, 6e-5.
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)
    exact = ranks(2).run(train, OURS, {**options, "ddp": {}})[0][0]
    assert not torch.equal(ours[0], exact)  # the hook is there
