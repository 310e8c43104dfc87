"""What tests share that run one script under `accelerate` and under `macrobatch.accelerate`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

BOTH = ["accelerate", "macrobatch.accelerate"]
ORIGINAL, OURS = BOTH


def reset() -> None:
    """Forget what either package knows of this process."""
    for state in [sys.modules[f"{package}.state"] for package in BOTH if f"{package}.state" in sys.modules]:
        for kind in (state.AcceleratorState, state.PartialState, state.GradientState):
            kind._reset_state()


def build(package: str = OURS, **options: Any) -> Any:
    """An accelerator on the CPU, and nothing left of one before."""
    reset()
    return importlib.import_module(package).Accelerator(cpu=True, **options)


@contextmanager
def entered(package: str) -> Generator[Any]:
    """The package, with no state before and after. The original asks the environment for the ranks, not the group."""
    reset()
    before = dict(os.environ)
    if dist.is_initialized():
        rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    try:
        yield importlib.import_module(package)
    finally:
        os.environ.clear()
        os.environ.update(before)
        reset()


def of_both(ranks: Any, num_ranks: int, job: Callable[..., Any], *arguments: Any) -> tuple[list[Any], list[Any]]:
    """What all ranks of the original return, and all of ours; a single one is this process."""
    theirs, ours = (
        ranks(num_ranks).run(job, package, *arguments) if num_ranks > 1 else [job(package, *arguments)]
        for package in BOTH
    )
    return theirs, ours
