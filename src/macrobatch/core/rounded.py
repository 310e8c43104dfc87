"""Parameters in the 16 bits that autocast computes in, rounded once for all micro-batches of a window.

Autocast rounds the weights anew for each forward, which it must: it cannot know that they stay what they are.

Source: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from macrobatch.core.snapshot import same_bits
from macrobatch.errors import LossError

__all__ = ["HALF", "Rounded", "keep_address"]

HALF = (torch.bfloat16, torch.float16)


class Rounded:
    """Parameters in autocast's dtype, for a window in which they stay what they are.

    Args:
        dtype: None for no copies.

    ```pycon
    >>> weight = torch.nn.Parameter(torch.tensor([1 / 3]))
    >>> rounded = Rounded(torch.bfloat16)
    >>> copy = rounded.of(weight)
    >>> rounded.make()
    >>> float(copy)
    0.333984375

    ```
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype if dtype in HALF else None
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        """Parameters and their copies, by the `id` of the parameter."""
        self._num_unchecked = 2
        """Windows: a forward that normalizes its weights may find nothing to do in the first."""

    def of(self, param: Tensor | None) -> Tensor | None:
        """The copy that `make` fills, the same each time; None of what is no plain parameter in fp32."""
        if self._dtype is None or type(param) is not nn.Parameter or param.dtype is not torch.float32:
            return None
        if id(param) not in self._pairs:
            copy = torch.empty_like(param, dtype=self._dtype, requires_grad=False)
            keep_address(copy)
            self._pairs[id(param)] = param, copy
        return self._pairs[id(param)][1]

    def fits(self) -> bool:
        """Whether the parameters still have the shapes and devices that they had."""
        return all(param.shape == copy.shape and param.device == copy.device for param, copy in self._pairs.values())

    @torch.no_grad()
    def make(self) -> None:
        """Round the parameters."""
        if self._pairs:
            params, copies = map(list, zip(*self._pairs.values(), strict=True))
            torch._foreach_copy_(copies, params)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]

    @torch.no_grad()
    def check(self) -> None:
        """After each of the first windows, which wait for the device: are the copies still what they should be?"""
        if not self._num_unchecked:
            return
        self._num_unchecked -= 1
        if not all(same_bits(param.to(copy.dtype), copy) for param, copy in self._pairs.values()):
            raise LossError(
                "loss_fn",
                given="a model whose forward changes the weights of its linear layers",
                expected="weights that stay as they are for a window, which has one gradient at one point",
                fix="change them between two windows, or leave fused_linear out",
            )


def keep_address(tensor: Tensor) -> None:
    """A captured graph is to read and write the tensor itself, not a copy."""
    torch._dynamo.mark_static_address(tensor, guard=True)  # pyright: ignore[reportPrivateUsage]
