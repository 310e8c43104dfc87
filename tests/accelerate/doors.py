"""What tests share that run one script under `accelerate` and under `macrobatch.accelerate`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

BOTH = ["accelerate", "macrobatch.accelerate"]
ORIGINAL, OURS = BOTH


def reset() -> None:
    """Forget what either package knows of this process."""
    for package in BOTH:
        state = importlib.import_module(f"{package}.state")
        for kind in (state.AcceleratorState, state.PartialState, state.GradientState):
            kind._reset_state()


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
