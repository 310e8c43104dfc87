"""Losses that know their weight, against the means of torch.nn.functional."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from macrobatch import Loss, cross_entropy
from macrobatch.errors import LossError

IGNORED = -100
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)

# In float64 sums of some 30 terms may differ in their order of addition only: 30 × 1.1e-16, rounded up.
EXACT: dict[str, Any] = {"rtol": 1e-14, "atol": 1e-15}


def logits_and_labels(*shape: int, num_ignored: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, 5, shape, generator=generator)
    labels.view(-1)[torch.randperm(labels.numel(), generator=generator)[:num_ignored]] = IGNORED
    return logits, labels


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


OPTIONS = [
    pytest.param(num_ignored, class_weight, smoothing, id=f"{num_ignored} ignored-{name}-smoothing {smoothing}")
    for num_ignored, (name, class_weight), smoothing in itertools.product(
        (0, 7), (("unweighted", None), ("weighted", CLASS_WEIGHT)), (0.0, 0.3)
    )
]


@pytest.mark.parametrize(("num_ignored", "class_weight", "smoothing"), OPTIONS)
@pytest.mark.parametrize("shape", [(12,), (4, 6), (2, 3, 4)], ids=str)
def test_cross_entropy_mean_and_gradient_are_torchs(shape, num_ignored, class_weight, smoothing):
    logits, labels = logits_and_labels(*shape, num_ignored=num_ignored)
    loss = cross_entropy(logits, labels, class_weight=class_weight, label_smoothing=smoothing)
    expected = F.cross_entropy(
        logits.reshape(-1, 5), labels.reshape(-1), weight=class_weight, label_smoothing=smoothing, reduction="mean"
    )
    torch.testing.assert_close(loss.mean, expected, **EXACT)
    torch.testing.assert_close(gradient(loss.mean, logits), gradient(expected, logits), **EXACT)


@pytest.mark.parametrize(("num_ignored", "class_weight", "smoothing"), OPTIONS)
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 4, 3]], ids=str)
def test_cross_entropy_parts_add_up_to_the_whole(sizes, num_ignored, class_weight, smoothing):
    logits, labels = logits_and_labels(12, num_ignored=num_ignored)
    parts = [
        cross_entropy(part, label, class_weight=class_weight, label_smoothing=smoothing)
        for part, label in zip(logits.split(sizes), labels.split(sizes), strict=True)
    ]
    mean = torch.stack([part.total for part in parts]).sum() / sum(torch.as_tensor(part.weight) for part in parts)
    expected = F.cross_entropy(logits, labels, weight=class_weight, label_smoothing=smoothing)
    torch.testing.assert_close(mean, expected, **EXACT)
    torch.testing.assert_close(gradient(mean, logits), gradient(expected, logits), **EXACT)


def test_cross_entropy_mean_of_means_would_differ():
    """The control for the test above: with ignored labels, parts have unequal weights."""
    logits, labels = logits_and_labels(12, num_ignored=7)
    means = [F.cross_entropy(a, b) for a, b in zip(logits.split(6), labels.split(6), strict=True)]
    assert not torch.isclose(torch.stack(means).mean(), F.cross_entropy(logits, labels), rtol=1e-3)


def test_cross_entropy_weight_counts_labels_that_are_not_ignored():
    logits, labels = logits_and_labels(4, 6, num_ignored=7)
    weight = cross_entropy(logits, labels).weight
    assert isinstance(weight, Tensor)
    assert weight.ndim == 0
    assert int(weight) == 17


def test_cross_entropy_weight_with_class_weights_is_their_sum():
    logits, _ = logits_and_labels(4)
    loss = cross_entropy(logits, torch.tensor([1, 4, IGNORED, 0]), class_weight=CLASS_WEIGHT)
    assert float(loss.weight) == 2.0 + 3.0 + 0.5


@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("ignore_index", [-1, 0, 4, 7])
def test_cross_entropy_ignore_index_may_be_any_number(ignore_index, class_weight):
    logits, labels = logits_and_labels(20, num_ignored=6)
    labels = labels.where(labels != IGNORED, torch.full_like(labels, ignore_index))
    loss = cross_entropy(logits, labels, ignore_index=ignore_index, class_weight=class_weight)
    expected = F.cross_entropy(logits, labels, weight=class_weight, ignore_index=ignore_index)
    torch.testing.assert_close(loss.mean, expected, **EXACT)


@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_all_ignored_is_zero_without_nan(class_weight, smoothing):
    logits, labels = logits_and_labels(4, 3, num_ignored=12)
    loss = cross_entropy(logits, labels, class_weight=class_weight, label_smoothing=smoothing)
    assert float(loss.total.detach()) == float(loss.weight) == float(loss.mean.detach()) == 0.0
    assert not gradient(loss.total, logits).any()
    assert not gradient(loss.mean, logits).any()  # NaN would be true


@pytest.mark.parametrize("weight", [0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_loss_mean_over_nothing_has_a_zero_gradient(weight):
    x = torch.ones(3, requires_grad=True)
    loss = Loss((x * torch.zeros(3)).sum(), weight)
    assert float(loss.mean.detach()) == 0.0
    assert not gradient(loss.mean, x).any()


@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("num_ignored", [0, 3])
def test_cross_entropy_shift_predicts_the_next_label(shape, num_ignored):
    logits, labels = logits_and_labels(*shape, num_ignored=num_ignored)
    loss = cross_entropy(logits, labels, shift=True)
    expected = F.cross_entropy(logits[..., :-1, :].reshape(-1, 5), labels[..., 1:].reshape(-1))
    torch.testing.assert_close(loss.mean, expected, **EXACT)
    assert int(loss.weight) == int((labels[..., 1:] != IGNORED).sum())
    last = gradient(loss.mean, logits)[..., -1, :]
    assert not last.any()


def test_cross_entropy_shift_of_one_position_weighs_nothing():
    logits, labels = logits_and_labels(4, 1)
    loss = cross_entropy(logits, labels, shift=True)
    assert float(loss.total.detach()) == float(loss.weight) == 0.0
    assert not gradient(loss.total, logits).any()


def test_cross_entropy_shift_without_time_is_refused():
    with pytest.raises(LossError, match="with time for shift"):
        cross_entropy(torch.randn(5), torch.tensor(1), shift=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT.float()], ids=["unweighted", "weighted"])
def test_cross_entropy_16_bit_logits_are_summed_in_float32(dtype, class_weight):
    logits, labels = logits_and_labels(400, num_ignored=7, dtype=dtype)
    loss = cross_entropy(logits, labels, class_weight=class_weight)
    expected = F.cross_entropy(logits.double(), labels, weight=None if class_weight is None else class_weight.double())
    assert loss.total.dtype == torch.float32
    # 400 terms in float32: 400 × 6e-8 at worst; the sum in bfloat16 would be off by 4e-3.
    torch.testing.assert_close(loss.mean.double(), expected, rtol=3e-5, atol=0)
    assert gradient(loss.total, logits).dtype == dtype


def test_cross_entropy_sum_beyond_the_range_of_float16_stays_finite():
    logits = torch.zeros(1, 5, dtype=torch.float16).index_fill(1, torch.tensor([0]), 1000).repeat(100, 1)
    loss = cross_entropy(logits, torch.ones(100, dtype=torch.long))
    assert float(loss.total) == 100_000  # float16 ends at 65,504


@pytest.mark.parametrize(
    ("logits_dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32),  # what `verify` computes in, with weights that the loss function closes over
    ],
    ids=str,
)
def test_cross_entropy_class_weights_may_have_a_dtype_of_their_own(logits_dtype, weight_dtype):
    logits, labels = logits_and_labels(30, dtype=logits_dtype)
    loss = cross_entropy(logits, labels, class_weight=CLASS_WEIGHT.to(weight_dtype))
    expected = F.cross_entropy(logits.double(), labels, weight=CLASS_WEIGHT)
    torch.testing.assert_close(loss.mean.double(), expected, rtol=1e-6, atol=0)  # float32 over 30 terms


def test_cross_entropy_keeps_float32_and_float64():
    for dtype in (torch.float32, torch.float64):
        logits, labels = logits_and_labels(6, dtype=dtype)
        assert cross_entropy(logits, labels).total.dtype == dtype


@pytest.mark.parametrize(
    ("logits_shape", "labels_shape"),
    [((4, 5), (3,)), ((4, 5), (4, 5)), ((4, 5), ()), ((4, 5, 6), (4, 6)), ((2, 3, 5), (2,)), ((), ())],
    ids=str,
)
def test_cross_entropy_shapes_that_do_not_fit_are_refused(logits_shape, labels_shape):
    with pytest.raises(LossError, match=r"logits \(\.\.\., classes\) and labels \(\.\.\.\)") as caught:
        cross_entropy(torch.zeros(logits_shape), torch.zeros(labels_shape, dtype=torch.long))
    assert str(logits_shape) in str(caught.value)
    assert str(labels_shape) in str(caught.value)
    assert "movedim" in str(caught.value)


def test_cross_entropy_single_sample_without_batch_dimension():
    loss = cross_entropy(torch.zeros(8), torch.tensor(3))
    assert float(loss.mean) == pytest.approx(math.log(8), rel=1e-6)  # one float32 logarithm
    assert int(loss.weight) == 1
