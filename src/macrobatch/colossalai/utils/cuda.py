"""This process's GPU, if it has one."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

__all__ = ["empty_cache", "get_current_device", "set_to_cuda", "synchronize"]

M = TypeVar("M", bound=nn.Module | Tensor)


def get_current_device() -> torch.device:
    """This process's GPU, or the CPU where there are none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait for what the GPU is doing, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give unused memory of the GPU back, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_to_cuda(models: M) -> M:
    """A module or tensor on this process's GPU, or as it is where there are none."""
    return cast(M, models.to(get_current_device())) if torch.cuda.is_available() else models
