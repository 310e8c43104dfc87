"""Seeds and states of random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from macrobatch.accelerate.utils.enums import RNGType
from macrobatch.errors import ArgumentError

__all__ = ["set_seed", "synchronize_rng_state", "synchronize_rng_states"]


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch.

    Args:
        device_specific: another seed on every rank.
        deterministic: use deterministic algorithms only.

    Raises:
        ArgumentError: NumPy could not take the seed; nothing was seeded.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**32:
        raise ArgumentError(
            "seed", given=repr(seed), expected="an integer, 0 <= seed < 2**32", fix="pass 42, for example"
        )
    if device_specific and dist.is_available() and dist.is_initialized():
        seed += dist.get_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_state(rng_type: Any = None, generator: torch.Generator | None = None) -> None:
    """Give rank 0's state of one generator to all ranks."""
    if not dist.is_available() or not dist.is_initialized():
        return
    kind = str(getattr(rng_type, "value", rng_type))
    if kind not in RNGType.list():
        raise ArgumentError("rng_type", given=repr(rng_type), expected=f"one of {RNGType.list()}", fix='"generator"')
    if kind == "generator" and generator is None:
        raise ArgumentError("generator", given=None, expected="a torch.Generator", fix="pass the sampler's")
    if kind == "torch":
        state = torch.get_rng_state()
    elif kind == "cuda":
        state = torch.cuda.get_rng_state()
    else:
        assert generator is not None
        state = generator.get_state()
    on = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    shared = state.to(on)
    dist.broadcast(shared, 0)
    state = shared.cpu()
    if kind == "torch":
        torch.set_rng_state(state)
    elif kind == "cuda":
        torch.cuda.set_rng_state(state)
    elif generator is not None:
        generator.set_state(state)


def synchronize_rng_states(rng_types: Iterable[Any], generator: torch.Generator | None = None) -> None:
    """Give rank 0's states of several generators to all ranks."""
    for rng_type in rng_types:
        synchronize_rng_state(rng_type, generator=generator)
