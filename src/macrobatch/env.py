"""Every environment variable that macrobatch reads, and what this machine has. Nothing else reads the environment."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata

import torch

from macrobatch.errors import ArgumentError
from macrobatch.ranks import Ranks

__all__ = ["debug", "description", "ranks"]

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def debug(environ: Mapping[str, str] = os.environ) -> bool:
    """MACROBATCH_DEBUG: whether commands show a traceback with their errors, as `--debug` does."""
    return environ.get("MACROBATCH_DEBUG", "").lower() in ("1", "true", "yes", "on")


def ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """This process's place among the ranks, from the variables that torchrun sets; alone if there are none.

    Raises:
        ArgumentError: some of them are missing or are not numbers that fit together.

    ```pycon
    >>> ranks({})
    Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)

    ```
    """
    given = {name: environ[name] for name in _RANK_VARIABLES if name in environ}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Ranks()
    try:
        rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank = int(given.get("LOCAL_RANK", rank))
        local_world_size = int(given.get("LOCAL_WORLD_SIZE", world_size))
    except (KeyError, ValueError):
        raise ArgumentError(
            "environment",
            given=given,
            expected="RANK and WORLD_SIZE as integers (LOCAL_RANK and LOCAL_WORLD_SIZE beside them)",
            fix="start the script with torchrun, or unset these variables",
        ) from None
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)


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
