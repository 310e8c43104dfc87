"""The yardstick: the whole batch's gradient in float64, by plain PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.core.loss import Loss

__all__ = ["full_batch_gradient", "gradients_of", "relative_error"]


def full_batch_gradient(
    model: nn.Module, loss_fn: Callable[[Any, Any], Any], batch: Any, *, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    """Gradient of the mean loss of the whole batch, by parameter name; None for a parameter that it does not use.

    Uses no code of the core. Model and batch are copied, and converted to `dtype`.
    """
    model = copy.deepcopy(model).to(dtype)
    model.zero_grad()
    output = loss_fn(model, tree.map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch))
    terms = output.values() if isinstance(output, Mapping) else [output]
    means = [term.total / term.weight if isinstance(term, Loss) else term for term in terms]
    torch.stack(means).sum().backward()
    return gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """What `.grad` of every trainable parameter holds, by name; copies."""
    return {
        name: None if param.grad is None else param.grad.detach().clone()
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def relative_error(gradients: Mapping[str, Tensor | None], reference: Mapping[str, Tensor | None]) -> float:
    """‖g − g_ref‖ / ‖g_ref‖ over all parameters together, in float64.

    A parameter that one side used and the other did not makes the error infinite: to an optimizer, None and zero are
    different things.
    """
    if any((gradients[name] is None) != (expected is None) for name, expected in reference.items()):
        return math.inf
    wanted = {name: expected.double() for name, expected in reference.items() if expected is not None}
    found = {name: gradient.double() for name, gradient in gradients.items() if gradient is not None}
    error = math.hypot(*(float((found[name] - expected).norm()) for name, expected in wanted.items()))
    return error / math.hypot(*(float(expected.norm()) for expected in wanted.values()))
