"""Losses that say what they are a sum over.

Shape letters: ... any batch and time dimensions, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from macrobatch.core.loss import Loss
from macrobatch.errors import LossError

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    shift: bool = False,
) -> Loss:
    """Cross-entropy as a sum and the weight that `torch.nn.functional.cross_entropy` divides it by.

    Over any split, `Σ total / Σ weight` is then what the whole batch's mean would have been: the number of labels that
    are not ignored, or the sum of their classes' weights.

    Args:
        logits: (..., C), classes last.
        labels: (...), class numbers.
        ignore_index: labels of this value count nothing.
        class_weight: (C,), weight of each class.
        label_smoothing: in [0, 1].
        shift: position t predicts the label at t + 1, as in a causal language model: the last logits and the first
            label of every row are left out, of the sum and of the weight.

    Returns:
        `Loss(total, weight)`, both 0-d tensors on the device of the logits. Nothing is read by the host.

    Raises:
        LossError: the shapes do not fit.

    Source:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html

    ```pycon
    >>> logits = torch.zeros(2, 3, 8)
    >>> labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    >>> loss = cross_entropy(logits, labels)
    >>> int(loss.weight), round(float(loss.mean), 4)  # log 8
    (3, 2.0794)

    ```
    """
    if logits.ndim < 1 + shift or labels.shape != logits.shape[:-1]:
        raise LossError(
            "cross_entropy",
            given=f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}",
            expected="logits (..., classes) and labels (...)" + (", with time for shift" if shift else ""),
            fix="put the classes last, for logits (batch, classes, ...) with logits.movedim(1, -1)",
        )
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    logits_NC, labels_N = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if logits_NC.dtype in (torch.bfloat16, torch.float16):
        logits_NC = logits_NC.float()
    if class_weight is not None:
        class_weight = class_weight.to(logits_NC)
    total = F.cross_entropy(
        logits_NC,
        labels_N,
        weight=class_weight,
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    counted_N = labels_N != ignore_index
    if class_weight is None:
        return Loss(total, counted_N.sum())
    weights_N = class_weight.detach()[torch.where(counted_N, labels_N, 0)]
    return Loss(total, (weights_N * counted_N).sum())
