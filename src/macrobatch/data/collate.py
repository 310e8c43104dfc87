"""From a list of samples, a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from macrobatch import tree
from macrobatch.errors import BatchError

__all__ = ["collation", "stacked"]


def collation(collate_fn: Callable[[list[Any]], Any] | None) -> Callable[[list[Any]], Any]:
    """The collate function to use for one that was given: `stacked` in place of torch's own."""
    return stacked if collate_fn is None or collate_fn is default_collate else collate_fn


def stacked(samples: list[Any]) -> Any:
    """As torch's `default_collate`, which stacks, but it says what to do about samples that cannot be stacked.

    Raises:
        BatchError: their shapes or lengths differ.

    ```pycon
    >>> import torch
    >>> stacked([torch.zeros(2), torch.ones(2)])
    tensor([[0., 0.],
            [1., 1.]])

    ```
    """
    try:
        return default_collate(samples)
    except RuntimeError:
        shapes = sorted({tuple(map(_shape, tree.leaves(sample))) for sample in samples})
        if len(shapes) < 2:
            raise
        given = ", ".join(" and ".join(map(str, shape)) for shape in shapes[:3])
        raise BatchError(
            "samples",
            given=f"different shapes in one batch, {given}" + ", ..." * (len(shapes) > 3),
            expected="the same shape from all of them, if they are to be stacked",
            fix="pass a collate_fn that pads them, or pack them: see docs/variable-lengths.md",
        ) from None


def _shape(leaf: Any) -> tuple[int, ...]:
    if isinstance(leaf, Tensor | np.ndarray):
        return tuple(leaf.shape)
    return (len(leaf),) if isinstance(leaf, list | tuple) else ()
