"""Packed samples through the variable-length kernel, which exists on CUDA only. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.data.planned import WindowLoader, WindowSampler
from macrobatch.plan.pack import TokenBudget
from macrobatch.plan.varlen import Packer, packed_attention
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCABULARY, WIDTH, NUM_HEADS, LONGEST = 61, 64, 4, 96
LENGTHS = [33, 1, 96, 17, 1, 64, 2, 80, 5, 41]
MAX_TOKENS = 128
BF16 = 2e-2  # a few times 2^-8, the spacing of bfloat16


class Block(nn.Module):
    """Causal attention within samples; in 16 bits on CUDA by the kernel, else by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_TC: Tensor, bounds: Tensor, longest: int) -> Tensor:
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)) for part in self.qkv(self.norm(x_TC)).chunk(3, dim=-1))
        return x_TC + self.out(packed_attention(q, k, v, bounds, longest).flatten(1))


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch: Any) -> Tensor:
        x_TC = self.embed(batch["input_ids"][0]) + self.position(batch["position_ids"][0])
        for block in self.blocks:
            x_TC = block(x_TC, batch["cu_seqlens"], batch["max_seqlen"])
        return self.head(x_TC)[None]


def loss_fn(model: Any, batch: Any) -> Any:
    return mb.cross_entropy(model(batch), batch["labels"], shift=True)


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def window_gradient(model: nn.Module, window: list[Any]) -> dict[str, Tensor | None]:
    seen: dict[str, Tensor | None] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(model)))
    mb.TrainStep(model, optimizer, loss_fn, micro_batch=1, precision="bf16").window(window)
    return {name: None if gradient is None else gradient.cpu() for name, gradient in seen.items()}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_kernel_and_mask_agree(causal, num_key_heads):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    bounds = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(torch.int32)
    heads = (NUM_HEADS, num_key_heads, num_key_heads)
    parts = [torch.randn(total, num, 16, dtype=torch.bfloat16) for num in heads]
    probe = torch.randn(total, NUM_HEADS, 16)

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [part.to(device, dtype).requires_grad_() for part in parts]
        mixed = packed_attention(*leaves, bounds.to(device), max(LENGTHS), causal=causal)
        mixed.backward(probe.to(mixed))
        return [mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for found, expected in zip(run("cuda", torch.bfloat16), run("cpu", torch.float64), strict=True):
        assert float((found.cpu().double() - expected).norm() / expected.norm()) <= BF16


def test_packed_window_is_as_exact_as_the_samples_one_by_one():
    torch.manual_seed(0)
    model, data = TinyGPT(), documents()
    expected = full_batch_gradient(model, loss_fn, Packer()(data))  # float64, on the host, by the mask
    model.cuda()
    packed = [Packer()([data[i] for i in part]) for part in TokenBudget(MAX_TOKENS).pack(LENGTHS).of(0)]
    error = relative_error(window_gradient(model, packed), expected)
    alone = relative_error(window_gradient(model, [Packer()([ids]) for ids in data]), expected)
    assert error <= 1.25 * alone  # the kernels round in other places
    assert error <= BF16


def test_packed_attention_is_compiled():
    torch.manual_seed(0)
    model, data = TinyGPT().cuda(), documents()
    packed = [Packer()([data[i] for i in part]) for part in TokenBudget(MAX_TOKENS).pack(LENGTHS).of(0)]
    eager = window_gradient(model, packed)
    compiled: Any = torch.compile(model, dynamic=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: dict[str, Tensor | None] = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(model)))
    step = mb.TrainStep(model, optimizer, lambda _, b: loss_fn(compiled, b), micro_batch=1, precision="bf16")
    step.window(packed)
    found = {name: None if gradient is None else gradient.cpu() for name, gradient in seen.items()}
    assert relative_error(found, eager) <= BF16


def test_loader_brings_packed_micro_batches_to_the_device():
    data = documents()
    sampler = WindowSampler(LENGTHS, 5, TokenBudget(MAX_TOKENS), shuffle=True)
    model = TinyGPT().cuda()
    step = mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, micro_batch=1, precision="bf16")
    for window in WindowLoader(data, sampler, collate_fn=Packer(), device="cuda"):
        micro_batches = list(window)
        assert all(batch["cu_seqlens"].is_cuda for batch in micro_batches)
        assert step.window(micro_batches).skipped is None
    assert step.num_updates == 2
