"""The memory that this process holds."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.logging import DistributedLogger, get_dist_logger

__all__ = ["bytes_to_GB", "bytes_to_MB", "report_memory_usage"]


def bytes_to_GB(val: int, decimal: int = 2) -> float:
    """GiB.

    ```pycon
    >>> bytes_to_GB(3 * 2**29), bytes_to_MB(2**20)
    (1.5, 1.0)

    ```
    """
    return round(val / 2**30, decimal)


def bytes_to_MB(val: int, decimal: int = 2) -> float:
    """MiB."""
    return round(val / 2**20, decimal)


def report_memory_usage(message: str, logger: DistributedLogger | None = None, report_cpu: bool = False) -> None:
    """Log the memory that this process holds, and begin a new peak.

    Args:
        message: what the line begins with.
        logger: who says it.
        report_cpu: whether to say what the process holds outside of the GPU as well, as is done without a GPU anyway.
    """
    parts: list[str] = []
    if torch.cuda.is_available():
        allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        reserved, peak_reserved = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
        parts.append(
            f"GPU: allocated {bytes_to_MB(allocated)} MB, max allocated: {bytes_to_MB(peak)} MB, "
            f"cached: {bytes_to_MB(reserved)} MB, max cached: {bytes_to_MB(peak_reserved)} MB"
        )
        torch.cuda.reset_peak_memory_stats()
    if report_cpu or not parts:
        gc.collect()
        parts.append(f"CPU Virtual Memory: used = {bytes_to_MB(_resident_bytes())} MB")
    (logger or get_dist_logger()).info(f"[Rank {gpc.get_global_rank()}] {message}: {', '.join(parts)}")


def _resident_bytes() -> int:
    """What this process has in memory, or 0 where the system does not tell in this way."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
