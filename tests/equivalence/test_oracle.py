"""The promise itself: every kind of model, split and dtype against a full batch in float64, in one process.

Tolerances: 1e-12 in float64 and 1e-6 in float32 are the promise (DESIGN section 1); they leave about two digits over
the rounding of sums of this size. Where computing in 16 bits is the larger error, the yardstick is the error of one
16-bit backward of the whole batch with float32 accumulation, and what counts is not being worse than that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import macrobatch as mb
from macrobatch import tree
from macrobatch.testing.models import CASES, Case
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error

NUM_SAMPLES = 29  # a prime: every split but one is ragged
# Torch's initial loss scale of 2^16 is meant to overflow a few times at first; here every window counts.
FP16 = mb.Fp16("cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def whole(batch: Any) -> list[Any]:
    return [batch]


def ragged(batch: Any) -> list[Any]:
    return tree.split(batch, [7, 7, 7, 7, 1])


def uneven(batch: Any) -> list[Any]:
    return tree.split(batch, [1, 16, 3, 9])


def one_sample(batch: Any) -> list[Any]:
    return tree.split(batch, [1] * NUM_SAMPLES)


def permuted(batch: Any) -> list[Any]:
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(7)).tolist()
    return tree.split(tree.select(batch, order), [10, 10, 9])


SPLITS: list[Callable[[Any], list[Any]]] = [whole, ragged, uneven, one_sample, permuted]


def build(kind: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(11)
    case = CASES[kind](NUM_SAMPLES)
    batch = tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, case.batch)
    return Case(case.model.to(dtype), batch, case.loss_fn)


def window_gradient(case: Case, split: Callable[[Any], list[Any]], **options: Any) -> dict[str, Tensor | None]:
    """The gradient as the optimizer saw it, parameters that were None to it included."""
    seen: dict[str, Tensor | None] = {}
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradients_of(case.model)))
    step = mb.TrainStep(case.model, optimizer, case.loss_fn, micro_batch=1, **options)
    assert step.window(split(case.batch)).skipped is None
    return seen


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.__name__)
@pytest.mark.parametrize("kind", CASES)
def test_window_any_split_equals_full_batch(kind, split, dtype):
    case = build(kind, dtype)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    assert relative_error(window_gradient(case, split), reference) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("micro_batch", [1, 4, NUM_SAMPLES, 10 * NUM_SAMPLES])
def test_accumulate_any_micro_batch_equals_full_batch(kind, micro_batch):
    case = build(kind, torch.float64)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    loss = mb.accumulate(case.model, case.loss_fn, case.batch, micro_batch=micro_batch)
    assert relative_error(gradients_of(case.model), reference) <= TOLERANCE[torch.float64]
    expected = case.loss_fn(case.model, case.batch)
    expected = expected.mean if isinstance(expected, mb.Loss) else expected
    torch.testing.assert_close(loss.mean, expected.double(), rtol=1e-12, atol=0)


def full_batch_16_bit(case: Case, options: dict[str, Any]) -> dict[str, Tensor | None]:
    return window_gradient(Case(copy.deepcopy(case.model), case.batch, case.loss_fn), whole, **options)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.float32, {"precision": "bf16"}),
        (torch.float32, {"precision": FP16}),
    ],
    ids=["bf16-parameters", "bf16-autocast", "fp16-scaler"],
)
@pytest.mark.parametrize("split", [ragged, uneven, one_sample, permuted], ids=lambda split: split.__name__)
@pytest.mark.parametrize("kind", CASES)
def test_window_in_16_bits_no_worse_than_full_batch(kind, split, dtype, options):
    case = build(kind, dtype)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    yardstick = relative_error(full_batch_16_bit(case, options), reference)
    error = relative_error(window_gradient(case, split, **options), reference)
    # The promise is 1.1 × in expectation; one draw of 29 samples scatters by some 30 % around it (seeds 0..9), so
    # single cases get 2 ×. test_window_bf16_1024_micro_batches holds the 1.1 × where the average is over many.
    assert error <= 2 * yardstick


def byte_lm(num_rows: int) -> Case:
    """A small language model on bytes of this file's first paragraph, in bf16."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(128, 48)
            self.gru = nn.Sequential(nn.Linear(48 * 4, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 128))

        def forward(self, ids_BT: Tensor) -> Tensor:
            return self.gru(self.embed(ids_BT).unfold(1, 4, 1).flatten(2))

    def loss_fn(model: Any, ids_BT: Tensor) -> Tensor:
        logits_BTV = model(ids_BT[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 4:].flatten())

    text = torch.tensor(list((__doc__ or "").encode()) * 60) % 128
    starts = torch.randint(0, len(text) - 20, (num_rows,))
    return Case(Model().bfloat16(), torch.stack([text[start : start + 20] for start in starts.tolist()]), loss_fn)


def accumulated(case: Case, rows: list[Tensor], grad_dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Autograd's own running sum of the same micro-gradients, in a dtype of choice."""
    model = copy.deepcopy(case.model)
    for param in model.parameters():
        param.grad_dtype = grad_dtype
    for row in rows:
        (case.loss_fn(model, row) / len(rows)).backward()
    return gradients_of(model)


def test_window_bf16_1024_micro_batches_within_promise():
    case = byte_lm(1024)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    yardstick = relative_error(full_batch_16_bit(case, {}), reference)
    error = relative_error(window_gradient(case, lambda batch: list(batch.split(1))), reference)
    assert error <= 1.1 * yardstick  # the promise


def test_window_bf16_1024_micro_batches_sums_exactly_and_bf16_accumulator_does_not():
    case = byte_lm(1024)
    rows = list(case.batch.split(1))
    exact_sum = accumulated(case, rows, torch.float64)
    # 1,024 additions in float32 round by 3e-8 on average; the division by 1,024 is exact in any of these formats.
    assert relative_error(window_gradient(case, lambda batch: rows), exact_sum) < 1e-6
    assert relative_error(accumulated(case, rows, torch.bfloat16), exact_sum) > 0.05  # control: autograd's default


def mean_of_means(case: Case, parts: list[Any], num: int) -> dict[str, Tensor | None]:
    model = copy.deepcopy(case.model)
    model.zero_grad()
    for part in parts:
        loss = case.loss_fn(model, part)
        ((loss.mean if isinstance(loss, mb.Loss) else loss) / num).backward()
    return gradients_of(model)


@pytest.mark.parametrize("kind", ["mlp", "conv", "tied_lm", "embedding", "lora"])
def test_control_mean_of_means_on_ragged_split_is_wrong(kind):
    case = build(kind, torch.float64)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    parts = ragged(case.batch)
    assert relative_error(mean_of_means(case, parts, len(parts)), reference) > 1e-2


def test_control_constant_divisor_on_short_window_is_wrong():
    case = build("mlp", torch.float64)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    assert relative_error(mean_of_means(case, whole(case.batch), 4), reference) == pytest.approx(0.75)


def test_control_wrong_reference_is_noticed():
    """The oracle can fail: one parameter's gradient off by 1e-5, or None where there is one, is not let through."""
    case = build("mlp", torch.float64)
    reference = full_batch_gradient(case.model, case.loss_fn, case.batch)
    weight = reference["0.weight"]
    assert weight is not None
    off = {**reference, "0.weight": weight * (1 + 1e-5)}
    assert relative_error(off, reference) > 1e-6
    assert relative_error({**reference, "0.weight": None}, reference) == float("inf")
