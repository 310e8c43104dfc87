"""Parameters in the 16 bits that autocast computes in, rounded once for all micro-batches of a window.

Autocast rounds the weights anew for each forward, which it must: it cannot know that they stay what they are.

Source: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from macrobatch.core.snapshot import same_bits
from macrobatch.errors import LossError

__all__ = ["HALF", "Rounded", "keep_address"]

HALF = (torch.bfloat16, torch.float16)


class Rounded:
    """Parameters in autocast's dtype, for a window in which they stay what they are.

    Args:
        params: of any dtypes; those in fp32 get copies.
        dtype: None for no copies.

    ```pycon
    >>> weight = torch.tensor([1 / 3], requires_grad=True)
    >>> rounded = Rounded([weight], torch.bfloat16)
    >>> rounded.make()
    >>> float(rounded.of(weight))
    0.333984375

    ```
    """

    def __init__(self, params: Iterable[Tensor], dtype: torch.dtype | None) -> None:
        wide = {id(p): p for p in params if p.dtype is torch.float32} if dtype in HALF else {}
        self._params = list(wide.values())
        self._copies = [torch.empty_like(param, dtype=dtype, requires_grad=False) for param in self._params]
        self._places = {key: place for place, key in enumerate(wide)}
        self._num_unchecked = 2
        """Windows: a forward that normalizes its weights may find nothing to do in the first."""
        for copy in self._copies:
            keep_address(copy)

    def of(self, param: Tensor | None) -> Tensor | None:
        """The copy, if there is one."""
        place = self._places.get(id(param))
        return None if place is None else self._copies[place]

    def fits(self) -> bool:
        """Whether the parameters still have the shapes and devices that they had."""
        pairs = zip(self._params, self._copies, strict=True)
        return all(param.shape == copy.shape and param.device == copy.device for param, copy in pairs)

    @torch.no_grad()
    def make(self) -> None:
        """Round the parameters."""
        if self._params:
            torch._foreach_copy_(self._copies, self._params)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    @torch.no_grad()
    def check(self) -> None:
        """After each of the first windows, which wait for the device: are the copies still what they should be?"""
        if not self._params or not self._num_unchecked:
            return
        self._num_unchecked -= 1
        pairs = zip(self._params, self._copies, strict=True)
        if not all(same_bits(param.to(copy.dtype), copy) for param, copy in pairs):
            raise LossError(
                "loss_fn",
                given="a model whose forward changes the weights of its linear layers",
                expected="weights that stay as they are for a window, which has one gradient at one point",
                fix="change them between two windows, or leave fused_linear out",
            )


def keep_address(tensor: Tensor) -> None:
    """A captured graph is to read and write the tensor itself, not a copy."""
    torch._dynamo.mark_static_address(tensor, guard=True)  # pyright: ignore[reportPrivateUsage]
