"""Samples in one row: the gradient is that of the samples one by one.

EXACT and FLOAT32 are the promises (DESIGN section 1). Controls must be off by WRONG at least.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch.errors import ArgumentError, BatchError
from macrobatch.plan.pack import TokenBudget
from macrobatch.plan.varlen import Packer, flash_arguments, packed_attention
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

EXACT, FLOAT32, WRONG = 1e-12, 1e-6, 1e-3
TOLERANCES = [(torch.float64, EXACT), (torch.float32, FLOAT32)]
VOCABULARY, WIDTH, LONGEST = 23, 12, 20
LENGTHS = [7, 1, 12, 3, 1, 20, 2, 5, 1, 9]  # ragged, single tokens, one of exactly the cap
MAX_TOKENS = 20


class Attention(nn.Module):
    """Causal, over padded rows or within the samples of a packed one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BTC: Tensor, bounds: Tensor | None, longest: int) -> Tensor:
        q, k, v = (part.unflatten(-1, (3, -1)) for part in self.qkv(x_BTC).chunk(3, dim=-1))
        if bounds is None:
            mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
            return self.out(mixed.transpose(1, 2).flatten(2))
        return self.out(packed_attention(q[0], k[0], v[0], bounds, longest).flatten(1)[None])


class TinyGPT(nn.Module):
    """Two blocks, learnt positions, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, positions: Tensor, bounds: Tensor | None = None, longest: int = 0) -> Tensor:
        x_BTC = self.embed(ids) + self.position(positions)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x_BTC = x_BTC + block(norm(x_BTC), bounds, longest)
        return self.head(x_BTC)


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def micro_batches(max_tokens: int = MAX_TOKENS) -> list[Any]:
    data = documents()
    plan = TokenBudget(max_tokens).pack(LENGTHS)
    return [Packer()([data[index] for index in indices]) for indices in plan.of(0)]


def packed_loss(model: Any, batch: Any) -> Any:
    logits = model(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"], batch["max_seqlen"])
    return mb.cross_entropy(logits, batch["labels"], shift=True)


def one_by_one(logits_of: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """The loss of all samples, each in a row of its own, in a plain loop."""

    def loss_fn(model: Any, _: Any) -> Any:
        losses = [mb.cross_entropy(logits_of(model, ids), ids, shift=True) for ids in documents()]
        return mb.Loss(torch.stack([loss.total for loss in losses]).sum(), sum(int(loss.weight) for loss in losses))

    return loss_fn


def plain_logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids[None], torch.arange(len(ids))[None])[0]


def seen_by_optimizer(model: nn.Module, loss_fn: Any, window: list[Any]) -> dict[str, Tensor | None]:
    seen: dict[str, Tensor | None] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(model)))
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=1)
    result = step.window(window)
    assert float(result.weight) == sum(length - 1 for length in LENGTHS)
    return seen


def tiny_gpt(dtype: torch.dtype) -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT().to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("max_tokens", [MAX_TOKENS, 33, sum(LENGTHS)])
def test_packed_window_has_the_gradient_of_the_samples_one_by_one(dtype, tolerance, max_tokens):
    model = tiny_gpt(dtype)
    expected = full_batch_gradient(model, one_by_one(plain_logits), torch.zeros(1))
    assert relative_error(seen_by_optimizer(model, packed_loss, micro_batches(max_tokens)), expected) <= tolerance


def test_micro_batches_of_single_tokens_weigh_nothing():
    model = tiny_gpt(torch.float64)
    expected = full_batch_gradient(model, one_by_one(plain_logits), torch.zeros(1))
    data = documents()
    window = [Packer()([data[1], data[4]]), *(Packer()([ids]) for at, ids in enumerate(data) if at not in (1, 4))]
    assert relative_error(seen_by_optimizer(model, packed_loss, window), expected) <= EXACT


@pytest.mark.parametrize("control", ["one document", "positions run on", "mean of means"])
def test_controls_are_wrong(control):
    model = tiny_gpt(torch.float64)
    expected = full_batch_gradient(model, one_by_one(plain_logits), torch.zeros(1))
    window = micro_batches()
    for batch in window:
        num = batch["input_ids"].shape[1]
        if control == "one document":
            batch |= {"cu_seqlens": torch.tensor([[0, num]], dtype=torch.int32), "max_seqlen": num}
        elif control == "positions run on":
            batch |= {"position_ids": torch.arange(num)[None]}
    loss_fn = (lambda m, b: packed_loss(m, b).mean) if control == "mean of means" else packed_loss
    seen: dict[str, Tensor | None] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(model)))
    mb.TrainStep(model, optimizer, loss_fn, micro_batch=1).window(window)
    assert relative_error(seen, expected) >= WRONG


# --- transformers ---


def transformers_model(kind: str, dtype: torch.dtype, attention: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own deprecations while it is imported
        import transformers

        torch.manual_seed(0)
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=LONGEST,
                n_embd=16,
                n_layer=2,
                n_head=2,
                attn_implementation=attention,
            )
            config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        else:
            config = transformers.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=LONGEST,
                attn_implementation=attention,
            )
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()


def transformers_logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0]


def transformers_loss(model: Any, batch: Any) -> Any:
    return mb.cross_entropy(model(**flash_arguments(batch)).logits, batch["labels"], shift=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_transformers_model_has_the_gradient_of_the_samples_one_by_one(kind, attention):
    # float32: the library computes norms and rotations in float32, whatever the model's dtype.
    model = transformers_model(kind, torch.float32, attention)
    reference = copy.deepcopy(model)
    expected = full_batch_gradient(reference, one_by_one(transformers_logits), torch.zeros(1), dtype=torch.float32)
    assert relative_error(seen_by_optimizer(model, transformers_loss, micro_batches()), expected) <= FLOAT32


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_transformers_model_in_float64(kind):
    model = transformers_model(kind, torch.float64, "sdpa")
    expected = full_batch_gradient(model, one_by_one(transformers_logits), torch.zeros(1))
    tolerance = EXACT if kind == "gpt2" else FLOAT32  # Llama's norms are in float32 in any case
    assert relative_error(seen_by_optimizer(model, transformers_loss, micro_batches()), expected) <= tolerance


def test_control_a_cache_makes_one_sample_of_the_row():
    model = transformers_model("gpt2", torch.float64, "sdpa")
    expected = full_batch_gradient(model, one_by_one(transformers_logits), torch.zeros(1))

    def cached(model: Any, batch: Any) -> Any:
        arguments = flash_arguments(batch) | {"use_cache": True}
        return mb.cross_entropy(model(**arguments).logits, batch["labels"], shift=True)

    assert relative_error(seen_by_optimizer(model, cached, micro_batches()), expected) >= WRONG


def test_packs_what_the_collator_of_transformers_packs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import DataCollatorWithFlattening
    samples = [{"input_ids": ids.tolist(), "labels": (ids + 1).tolist()} for ids in documents()]
    theirs = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(samples)
    ours = Packer()(samples)
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(ours[key], theirs[key])
    arguments = flash_arguments(ours)
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(arguments[key], theirs[key].to(torch.int32))
    assert arguments["max_length_q"] == theirs["max_length_q"]


# --- the pieces ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_attention_stays_within_samples(causal, num_key_heads):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    query = torch.randn(total, 4, 6, dtype=torch.float64)
    key, value = torch.randn(2, total, num_key_heads, 6, dtype=torch.float64)
    bounds = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(torch.int32)
    alone = [
        F.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in parts), is_causal=causal, enable_gqa=num_key_heads < 4
        ).transpose(0, 1)
        for parts in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True)
    ]
    mixed = packed_attention(query, key, value, bounds, max(LENGTHS), causal=causal)
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_packer_takes_lists_tensors_arrays_and_mappings():
    import numpy as np

    expected = Packer()([[5, 6, 7], [8]])
    for samples in (
        [torch.tensor([5, 6, 7]), torch.tensor([8], dtype=torch.int32)],
        [np.array([5, 6, 7]), np.array([8])],
        [{"input_ids": [5, 6, 7]}, {"input_ids": torch.tensor([8])}],
    ):
        packed = Packer()(samples)
        assert packed.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(packed[key]), torch.as_tensor(expected[key])) for key in packed)


def test_packer_masks_the_first_label_only():
    packed = Packer(ignore_index=-1)([{"input_ids": [5, 6, 7], "labels": [5, -1, 7]}, [8, 9]])
    assert packed["labels"].tolist() == [[-1, -1, 7, -1, 9]]


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        ([], "samples to pack"),
        ([[1, 2], []], "samples to pack"),
        ([{"input_ids": [1, 2], "labels": [1]}], "samples to pack"),
        ([[1, 2], [1.5]], "sample 1"),
        ([[[1, 2]]], "sample 0"),
        (["text"], "sample 0"),
        ([{"ids": [1]}], "sample 0"),
        ([None], "sample 0"),
    ],
    ids=["none", "empty", "labels", "floats", "nested", "text", "key", "None"],
)
def test_what_cannot_be_packed_is_refused(samples, named):
    with pytest.raises(BatchError, match=named):
        Packer()(samples)


def test_a_batch_that_is_not_packed_is_refused():
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        flash_arguments({"input_ids": torch.zeros(1, 2)})
