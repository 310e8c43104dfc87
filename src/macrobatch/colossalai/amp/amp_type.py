"""The modes of the config's `fp16`."""

from __future__ import annotations

from enum import Enum

__all__ = ["AMP_TYPE"]


class AMP_TYPE(Enum):
    """Ways to float16 with a loss scale."""

    APEX = "apex"
    TORCH = "torch"
    NAIVE = "naive"
