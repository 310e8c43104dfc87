"""The context of the run: `from macrobatch.colossalai.core import global_context as gpc`."""

from __future__ import annotations

from macrobatch.colossalai.context.parallel_context import ParallelContext

__all__ = ["global_context"]

global_context = ParallelContext()
