"""Metrics."""

from __future__ import annotations

import pytest
import torch

from macrobatch.colossalai.nn.metric import Accuracy


def test_accuracy_counts_what_is_right():
    logits_BC = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    targets_B = logits_BC.argmax(1)
    targets_B[:20] = (targets_B[:20] + 1) % 10
    correct = Accuracy()(logits_BC, targets_B)
    assert correct.shape == ()
    assert correct.item() == 44


@pytest.mark.parametrize("shape", [(3,), (4, 10), (4, 1)], ids=str)
def test_targets_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="samples, classes"):
        Accuracy()(torch.zeros(4, 10), torch.zeros(shape, dtype=torch.long))
