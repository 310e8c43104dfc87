"""Looking at gradients, and limiting them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from macrobatch.checks import check_limit

__all__ = ["clip_grad_norm_fp32", "count_zeros_fp32"]


@torch.no_grad()
def clip_grad_norm_fp32(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor:
    """Scale gradients in place so that their norm, all taken together in fp32 or better, is at most `max_norm`.

    Args:
        parameters: with gradients, on any device; those without are left out.
        max_norm: >= 0; 0 only measures.
        norm_type: 2 for the Euclidean norm, math.inf for the largest entry.

    Returns:
        The norm before, on the device of the gradients.

    Raises:
        ArgumentError: max_norm is negative or NaN.

    ```pycon
    >>> weight = torch.zeros(2, requires_grad=True)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_fp32(weight, 1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))

    ```
    """
    check_limit("max_norm", max_norm)
    gradients = _gradients(parameters)
    if not gradients:
        return torch.tensor(0.0)
    device = gradients[0].device
    norms = [
        torch.linalg.vector_norm(each, norm_type, dtype=torch.promote_types(each.dtype, torch.float32)).to(device)
        for each in gradients
    ]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if max_norm > 0:
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for each in gradients:
            each.mul_(factor.to(each.device))
    return total


@torch.no_grad()
def count_zeros_fp32(parameters: Tensor | Iterable[Tensor]) -> int:
    """Number of entries of the gradients that are exactly zero."""
    return sum(each.numel() - int(torch.count_nonzero(each)) for each in _gradients(parameters))


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    tensors = [parameters] if isinstance(parameters, Tensor) else parameters
    return [each.grad.detach() for each in tensors if each.grad is not None]
