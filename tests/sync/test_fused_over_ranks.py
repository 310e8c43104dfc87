"""Weight gradients that matrix products add to the buffer themselves, while `ReplicatedSync` sends pieces of it.

The weights are in bf16 and stay where they are (learning rate 0), so every micro-batch has the same bf16 numbers on
several ranks and on one; what may differ is the order of sums in fp32. FP32: 1e-6, some tens of roundings.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

import macrobatch as mb
from macrobatch.core import fused
from macrobatch.sync import ReplicatedSync
from tests.sync.windows import off_from_alone

pytestmark = pytest.mark.xdist_group("ranks")

FP32 = 1e-6


class Net(nn.Module):
    """Layers without biases, one used twice, one only for windows that ask for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.twice, self.last = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.rare = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.first(x))))
        x = self.rare(x) if bool(x[0, 0] > 0.5) else x
        return self.last(torch.tanh(self.twice(x)))


def mean_square(model: Any, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def two_backwards(model: Any, x: Tensor) -> Tensor:
    """The first is the loss function's own: what the second one adds comes after buckets have left."""
    first, second = mean_square(model, x), mean_square(model, 2 * x)
    first.backward()
    return second


def rows(num: int, seed: int) -> Tensor:
    return torch.randn(num, 16, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def off(loss_fn: Any) -> float:
    windows = [[[rows(4, 10 * rank + at) for at in range(1 + rank)] for rank in range(2)] for _ in range(2)]
    optimizer = partial(_still, SGD)
    return off_from_alone(
        Net().to(torch.bfloat16), loss_fn, windows, fused_linear=True, make_optimizer=optimizer,
        sync=ReplicatedSync(bucket_bytes=4 * 16 * 16),
    )  # fmt: skip


def _still(kind: Any, params: Any, lr: float) -> Any:
    return kind(params, lr=0.0 * lr)


@pytest.mark.parametrize("loss_fn", [mean_square, two_backwards])
def test_window_equals_one_process(ranks, loss_fn):
    assert max(ranks(2).run(off, loss_fn)) <= FP32


def events() -> list[str]:
    """What happens in the last micro-batch of a second window."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6))).to(torch.bfloat16)
    seen: list[str] = []
    done = mb.on(mb.MicroBatchDone, lambda event: seen.append("last" if event.is_last else "one"))
    sync = ReplicatedSync(bucket_bytes=4 * 32 * 32)
    optimizer = SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, mean_square, micro_batch=2, sync=sync, listeners=[done], fused_linear=True)
    batch = torch.randn(6, 32).to(torch.bfloat16)
    step(batch)
    seen.clear()
    all_reduce, product = dist.all_reduce, fused._add_product

    def sending(*args: Any, **kwargs: Any) -> Any:
        seen.append("sent")
        return all_reduce(*args, **kwargs)

    def adding(*args: Any) -> None:
        seen.append("product")
        product(*args)

    dist.all_reduce, fused._add_product = sending, adding
    try:
        step(batch)
    finally:
        dist.all_reduce, fused._add_product = all_reduce, product
    return seen


def test_a_bucket_leaves_as_soon_as_its_products_are_in_it(ranks):
    one = ["product"] * 6 + ["one"]
    for seen in ranks(2).run(events):
        assert seen == one * 2 + ["product", "sent"] * 5 + ["product", "last", "sent"]
