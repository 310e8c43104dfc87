"""Weight gradients that are added to the fp32 buffer in place, by matrix products and row by row, on CUDA. Skipped
without it.

Tolerances: as in tests/core/test_fused.py. With TF32 and reduced-precision reductions off, products of bf16 numbers add
up in fp32.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.core.fused import add_product, add_rows
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tied(nn.Module):
    """A head that shares its weight with the embedding, and a layer that is left unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.up, self.down, self.unused = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 128, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.embed(ids_BT[:, :-1])
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def loss_fn(model: Any, ids_BT: Tensor) -> Tensor:
    return model(ids_BT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_is_added_in_fp32_in_place(dtype):
    torch.manual_seed(0)
    grad, x = torch.randn(512, 64, dtype=dtype, device="cuda"), torch.randn(512, 96, dtype=dtype, device="cuda")
    flat = torch.randn(64 * 96 + 64, device="cuda")
    total = flat[64:].view(64, 96)
    expected = total.double() + grad.double().T @ x.double()
    before, version = flat[:64].clone(), total._version
    add_product(total, grad, x)
    # fp32 sums of 512 products of size 1: 1e-6 of their norm
    assert float((total.double() - expected).norm() / expected.norm()) < 1e-6
    assert torch.equal(flat[:64], before)
    assert total._version > version
    rounded = flat[64:].view(64, 96).to(dtype).double()  # control: a 16-bit buffer
    assert float((rounded - expected).norm() / expected.norm()) > 1e-4


def test_rows_are_added_in_fp32_in_one_order():
    torch.manual_seed(0)
    grad_NC = torch.randn(4096, 96, dtype=torch.bfloat16, device="cuda")
    ids_N = torch.randint(0, 64, (4096,), device="cuda")  # each of them dozens of times
    start = torch.randn(64, 96, device="cuda")
    expected = start.double().index_add(0, ids_N[ids_N != 3], grad_NC[ids_N != 3].double())
    totals = [start.clone() for _ in range(5)]
    for total in totals:
        add_rows(total, ids_N, grad_NC, 3)
    assert float((totals[0].double() - expected).norm() / expected.norm()) < 1e-6
    assert all(torch.equal(total, totals[0]) for total in totals)
    without = start.double().index_add(0, ids_N, grad_NC.double())  # control: with the row that is left out
    assert float((totals[0].double() - without).norm() / expected.norm()) > 1e-2


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch.compile's own, as it sets out
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("capture", [None, "compile", "graph"])
@pytest.mark.parametrize("micro_batch", [16, 2])
def test_window_is_no_worse_than_the_plain_path(micro_batch, capture):
    torch.manual_seed(0)
    model, ids_BT = Tied().to("cuda", torch.bfloat16), torch.randint(0, 128, (16, 33), device="cuda")
    exact = {
        name: None if gradient is None else gradient.cuda()
        for name, gradient in full_batch_gradient(copy.deepcopy(model).cpu(), loss_fn, ids_BT.cpu()).items()
    }
    errors: dict[bool, float] = {}
    gradients: dict[str, Tensor | None] = {}
    for fused in (False, True):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
        step = mb.TrainStep(twin, optimizer, loss_fn, micro_batch=micro_batch, capture=capture, fused_linear=fused)
        for _ in range(4):  # under "compile", the first windows warm up and record, the later ones replay
            assert step(ids_BT).skipped is None
            gradients = gradients_of(twin)
            assert gradients["unused.weight"] is None
            assert all(gradients[name] is not None for name in ("embed.weight", "up.weight", "down.weight"))
        errors[fused] = relative_error(gradients, exact)
    assert errors[True] <= 1.1 * errors[False] + 1e-6
    assert errors[True] < 2e-2  # bf16


def test_step_never_waits_for_the_device():
    torch.manual_seed(0)
    model, ids_BT = Tied().to("cuda", torch.bfloat16), torch.randint(0, 128, (8, 33), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=2, nonfinite="ignore", fused_linear=True)
    step(ids_BT)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ids_BT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
