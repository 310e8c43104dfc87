"""Small helpers that know the ranks."""

from __future__ import annotations

import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from macrobatch.colossalai.context import ParallelMode
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.logging import DistributedLogger

__all__ = [
    "conditional_context",
    "ensure_path_exists",
    "free_port",
    "is_ddp_ignored",
    "is_dp_rank_0",
    "is_no_pp_or_last_stage",
    "is_tp_rank_0",
    "is_using_ddp",
    "is_using_pp",
    "is_using_sequence",
    "print_rank_0",
    "sync_model_param",
]


def print_rank_0(msg: object, logger: DistributedLogger | None = None) -> None:
    """Print a message on the first rank, or log it there."""
    if gpc.get_global_rank() != 0:
        return
    if logger is None:
        sys.stdout.write(f"{msg}\n")
        sys.stdout.flush()
    else:
        logger.info(msg)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def ensure_path_exists(filename: str | Path) -> None:
    """Make the folder of a file, if it is not there."""
    Path(filename).parent.mkdir(parents=True, exist_ok=True)


def conditional_context(
    context_manager: AbstractContextManager[Any], enable: bool = True
) -> AbstractContextManager[Any]:
    """The context if it is wanted, otherwise one that does nothing."""
    return context_manager if enable else nullcontext()


def is_dp_rank_0() -> bool:
    """Whether this is the first data-parallel rank."""
    return gpc.is_first_rank(ParallelMode.DATA)


def is_tp_rank_0() -> bool:
    """Whether this is the first rank that layers are cut over: True, they are not."""
    return gpc.is_first_rank(ParallelMode.TENSOR)


def is_no_pp_or_last_stage() -> bool:
    """Whether the loss is computed here: True, every rank has the whole model."""
    return gpc.is_pipeline_last_stage()


def is_using_ddp() -> bool:
    """Whether there are several data-parallel ranks."""
    return gpc.is_initialized(ParallelMode.DATA) and gpc.get_world_size(ParallelMode.DATA) > 1


def is_using_pp() -> bool:
    """Whether models are cut into stages: False."""
    return False


def is_using_sequence() -> bool:
    """Whether sequences are cut over ranks: False."""
    return False


def is_ddp_ignored(p: Tensor) -> bool:
    """Whether a parameter is marked as not to be synchronised."""
    return getattr(p, "_ddp_to_ignore", False)


@torch.no_grad()
def sync_model_param(model: nn.Module, parallel_mode: ParallelMode = ParallelMode.DATA) -> None:
    """Give all ranks of a mode the parameters and buffers of its first one. A collective."""
    if gpc.get_world_size(parallel_mode) > 1:
        source, group = gpc.get_ranks_in_group(parallel_mode)[0], gpc.get_group(parallel_mode)
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=source, group=group)
