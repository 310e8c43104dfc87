"""The environment variables that macrobatch reads for itself, and what this machine has.

Nothing else reads the environment, except for `launch`, which reads the variables of whoever started the ranks.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["debug", "description", "num_cores"]

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_QUOTA = "/sys/fs/cgroup/cpu.max"


def debug(environ: Mapping[str, str] = os.environ) -> bool:
    """MACROBATCH_DEBUG: whether commands show a traceback with their errors, as `--debug` does."""
    return environ.get("MACROBATCH_DEBUG", "").lower() in ("1", "true", "yes", "on")


def num_cores() -> int:
    """Physical cores that this process may use: what it is pinned to and its container's share, without hyper-threads.

    ```pycon
    >>> 1 <= num_cores() <= os.cpu_count()
    True

    ```
    """
    pinned = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_read(_SIBLINGS.format(index)) or str(index) for index in pinned}
    quota, _, period = _read(_QUOTA).partition(" ")
    share = math.ceil(int(quota) / int(period)) if quota.isdecimal() and period.isdecimal() else len(cores)
    return max(1, min(len(cores), share))


def description() -> dict[str, str]:
    """What a bug report should say: versions, processors and devices, by name."""
    found = {
        "macrobatch": _version("macrobatch"),
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "cuda": torch.version.cuda or "not in this build of torch",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    for package in ("numpy", "transformers", "scikit-learn", "matplotlib"):
        found[package] = _version(package)
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
