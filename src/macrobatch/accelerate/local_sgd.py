"""Local SGD: ranks train apart and average their parameters every so many updates.

Source: Stich 2019, https://arxiv.org/abs/1805.09767
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from macrobatch.checks import check_integer

__all__ = ["LocalSGD"]


class LocalSGD:
    """Context in which gradients stay on their rank, and parameters are averaged.

    Args:
        accelerator: whose ranks.
        model: whose parameters.
        local_sgd_steps: `step` calls between two averages, an integer >= 1.
        enabled: False does nothing.
    """

    def __init__(self, accelerator: Any, model: nn.Module, local_sgd_steps: int, enabled: bool = True) -> None:
        check_integer("local_sgd_steps", local_sgd_steps, fix="pass 8")
        self.accelerator = accelerator
        self.model = model
        self.local_sgd_steps = local_sgd_steps
        self.enabled = enabled and accelerator.num_processes > 1
        self.num_steps = 0
        self._context: Any = None

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            self._context = self.accelerator.kept_apart()
            self._context.__enter__()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if self.enabled:
            if kind is None:
                self._average()
            self._context.__exit__(kind, value, trace)

    def step(self) -> None:
        """Count one step of the optimizer; average when it is time."""
        self.num_steps += 1
        if self.enabled and self.num_steps % self.local_sgd_steps == 0:
            self._average()

    def _average(self) -> None:
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for param in self.model.parameters():
            by_type.setdefault(param.dtype, []).append(param.detach())
        for dtype, params in by_type.items():
            wide = torch.promote_types(dtype, torch.float32)  # sums of 16-bit numbers would lose digits
            whole = torch.cat([param.reshape(-1).to(wide) for param in params])
            dist.all_reduce(whole)
            whole /= self.accelerator.num_processes
            for param, part in zip(params, whole.split([param.numel() for param in params]), strict=True):
                param.copy_(part.view(param.shape))
