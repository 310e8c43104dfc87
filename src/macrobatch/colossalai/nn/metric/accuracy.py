"""How many samples a classifier got right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from macrobatch.errors import ArgumentError

__all__ = ["Accuracy"]


class Accuracy(nn.Module):
    """Counts, on the device: divide by the number of samples for the accuracy.

    ```pycon
    >>> logits_BC, targets_B = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), torch.tensor([0, 1, 1])
    >>> Accuracy()(logits_BC, targets_B)
    tensor(2)

    ```
    """

    def forward(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        """Number of samples whose largest logit is that of their class.

        Args:
            logits_BC: one row of logits for each sample.
            targets_B: classes, integers.

        Raises:
            ArgumentError: there is not one class for each row.
        """
        if logits_BC.ndim != 2 or targets_B.shape != logits_BC.shape[:1]:
            raise ArgumentError(
                "Accuracy",
                given=f"logits of shape {tuple(logits_BC.shape)} and targets of shape {tuple(targets_B.shape)}",
                expected="(samples, classes) and (samples,)",
                fix="flatten the other dimensions into the first",
            )
        return torch.sum(logits_BC.argmax(dim=-1) == targets_B)
