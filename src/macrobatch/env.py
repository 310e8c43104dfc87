"""The environment variables that macrobatch reads for itself, and what this machine has.

Nothing else reads the environment, except for `launch`, which reads the variables of whoever started the ranks, and the
compatible doors, which read those that their originals do, and MACROBATCH_NORMALIZE.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["cache_folder", "debug", "description", "free_memory_bytes", "num_cores", "num_started", "version"]

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_QUOTA = "/sys/fs/cgroup/cpu.max"
_MEMORY = "/proc/meminfo"
_MEMORY_LIMIT = "/sys/fs/cgroup/memory.max"
_MEMORY_USED = "/sys/fs/cgroup/memory.current"
_MEMORY_STAT = "/sys/fs/cgroup/memory.stat"


def debug(environ: Mapping[str, str] = os.environ) -> bool:
    """MACROBATCH_DEBUG: whether commands show a traceback with their errors, as `--debug` does."""
    return environ.get("MACROBATCH_DEBUG", "").lower() in ("1", "true", "yes", "on")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """MACROBATCH_CACHE: where to remember what was measured; set to nothing, nowhere.

    By default, a folder of the user's own caches: XDG_CACHE_HOME, or the system's place for them.

    ```pycon
    >>> cache_folder({"MACROBATCH_CACHE": "/tmp/plans"}).name, cache_folder({"MACROBATCH_CACHE": ""})
    ('plans', None)

    ```
    """
    given = environ.get("MACROBATCH_CACHE")
    if given is not None:
        return Path(given) if given else None
    base = environ.get("XDG_CACHE_HOME") or environ.get("LOCALAPPDATA")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "macrobatch"
    except RuntimeError:  # a user without a home
        return None


def free_memory_bytes() -> int | None:
    """Host memory that is free, or that the system would make free, within this process's container; None if unknown.

    ```pycon
    >>> free = free_memory_bytes()
    >>> free is None or free > 0
    True

    ```
    """
    available = _field(_MEMORY, "MemAvailable:")
    found = [] if available is None else [available * 1024]
    limit, used = _read(_MEMORY_LIMIT), _read(_MEMORY_USED)
    if limit.isdecimal() and used.isdecimal():  # of what is used, pages of files are given up on demand
        found.append(max(int(limit) - int(used) + (_field(_MEMORY_STAT, "file") or 0), 0))
    return min(found, default=None)


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


def num_started(environ: Mapping[str, str] = os.environ) -> int:
    """WORLD_SIZE: how many processes were started together with this one, by torchrun and those that set its variables.

    ```pycon
    >>> num_started({"WORLD_SIZE": "8"}), num_started({})
    (8, 1)

    ```
    """
    text = environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def description() -> dict[str, str]:
    """What a bug report should say: versions, processors and devices, by name."""
    found = {
        "macrobatch": version("macrobatch"),
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "cuda": torch.version.cuda or "not in this build of torch",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    for package in ("numpy", "transformers", "scikit-learn", "matplotlib"):
        found[package] = version(package)
    return found


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _field(path: str, name: str) -> int | None:
    """The number that follows a name at the beginning of a line."""
    words = [line.split() for line in _read(path).splitlines() if line.startswith(name)]
    return next((int(line[1]) for line in words if line[0] == name and line[1].isdecimal()), None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
