"""Where this process stands among all, as torch.distributed knows it, and the config of the run."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from macrobatch.checks import is_integer
from macrobatch.colossalai.context.config import Config, ConfigException
from macrobatch.colossalai.context.parallel_mode import ParallelMode
from macrobatch.errors import ArgumentError

__all__ = ["ParallelContext"]

_EVERYBODY = (ParallelMode.GLOBAL, ParallelMode.DATA)


class ParallelContext:
    """The config, and this process's ranks. There is one, `macrobatch.colossalai.core.global_context`.

    Ranks are those of torch.distributed at the time of the question: all processes are data parallel, and each is
    alone in every other mode. Without a process group there is one process.

    Attributes:
        verbose: whether `launch` and `initialize` log what they do.
    """

    def __init__(self) -> None:
        self.verbose = False
        self._config: Config | None = None
        self._own_group: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    @property
    def config(self) -> Any:
        """The config of the run, None before it is loaded."""
        return self._config

    def load_config(self, config: Mapping[str, Any] | str | Path) -> None:
        """Take over a config: a `Config`, a dict, or the path of a `.py` file.

        Raises:
            ConfigException: it is none of these, or cannot be read.
        """
        self._config = read_config(config)

    # --- ranks

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if _has_group() else 1

    @property
    def data_parallel_size(self) -> int:
        """Number of data-parallel processes: all."""
        return self.world_size

    @property
    def pipeline_parallel_size(self) -> int:
        """1: models are not cut into stages."""
        return 1

    @property
    def tensor_parallel_size(self) -> int:
        """1: layers are not cut."""
        return 1

    def get_global_rank(self) -> int:
        """This process's rank among all."""
        return dist.get_rank() if _has_group() else 0

    def get_local_rank(self, parallel_mode: ParallelMode) -> int:
        """This process's rank in the group of a mode."""
        return self.get_global_rank() if _checked(parallel_mode) in _EVERYBODY else 0

    def get_world_size(self, parallel_mode: ParallelMode) -> int:
        """Number of processes in the group of a mode."""
        return self.world_size if _checked(parallel_mode) in _EVERYBODY else 1

    def get_ranks_in_group(self, parallel_mode: ParallelMode) -> list[int]:
        """The global ranks in this process's group of a mode."""
        everybody = list(range(self.world_size))
        return everybody if _checked(parallel_mode) in _EVERYBODY else [self.get_global_rank()]

    def is_initialized(self, parallel_mode: ParallelMode) -> bool:
        """Whether the mode is in use: there is a process group, and models are not cut."""
        return _checked(parallel_mode) in (*_EVERYBODY, ParallelMode.MODEL) and _has_group()

    def is_first_rank(self, parallel_mode: ParallelMode) -> bool:
        """Whether this process is the first one in its group of a mode."""
        return self.get_local_rank(parallel_mode) == 0

    def is_last_rank(self, parallel_mode: ParallelMode) -> bool:
        """Whether this process is the last one in its group of a mode."""
        return self.get_local_rank(parallel_mode) == self.get_world_size(parallel_mode) - 1

    def get_next_global_rank(self, parallel_mode: ParallelMode) -> int:
        """The global rank of the next process in its group of a mode; of the first one after the last."""
        return self._neighbour(parallel_mode, 1)

    def get_prev_global_rank(self, parallel_mode: ParallelMode) -> int:
        """The global rank of the process before in its group of a mode; of the last one before the first."""
        return self._neighbour(parallel_mode, -1)

    def _neighbour(self, parallel_mode: ParallelMode, offset: int) -> int:
        ranks = self.get_ranks_in_group(parallel_mode)
        return ranks[(self.get_local_rank(parallel_mode) + offset) % len(ranks)]

    def is_pipeline_first_stage(self, ignore_virtual: bool = False) -> bool:
        """True: every process has the whole model."""
        return True

    def is_pipeline_last_stage(self, ignore_virtual: bool = False) -> bool:
        """True: every process has the whole model."""
        return True

    def get_group(self, parallel_mode: ParallelMode) -> dist.ProcessGroup:
        """The process group of a mode.

        Raises:
            ArgumentError: there is none before `launch`.
        """
        mode = _checked(parallel_mode)
        world = dist.group.WORLD if _has_group() else None
        if world is None:
            raise ArgumentError(
                "get_group", given=f"{mode} before launch", expected="a process group", fix="call launch first"
            )
        if mode in _EVERYBODY:
            return world
        if self._own_group is None or self._own_group[0] is not world:
            own: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            self._own_group = world, own
        return self._own_group[1]

    def get_cpu_group(self, parallel_mode: ParallelMode) -> dist.ProcessGroup:
        """The process group of a mode for tensors on the CPU: the same, its backend knows both."""
        return self.get_group(parallel_mode)

    # --- this process

    def set_seed(self, seed: int) -> None:
        """Seed Python's, NumPy's and torch's random numbers, on every process alike.

        Args:
            seed: an integer from 0 to 2^32 - 1.
        """
        random.seed(checked_seed(seed))
        np.random.seed(seed)
        torch.manual_seed(seed)

    def set_device(self, device_ordinal: int | None = None) -> None:
        """Make a GPU this process's own; by default the one of its rank, counted round. Without GPUs nothing."""
        num_gpus = torch.cuda.device_count()
        if num_gpus:
            torch.cuda.set_device(self.get_global_rank() % num_gpus if device_ordinal is None else device_ordinal)

    def destroy(self) -> None:
        """Leave the process group. `launch` can be called again."""
        self._own_group = None
        if _has_group():
            dist.destroy_process_group()


def read_config(config: Mapping[str, Any] | str | Path) -> Config:
    """The config that was meant: itself, or what is in the file.

    Raises:
        ConfigException: it is none.
    """
    if isinstance(config, str | Path):
        return Config.from_file(config)
    if isinstance(config, Mapping):
        return config if isinstance(config, Config) else Config(config)
    raise ConfigException(
        "config",
        given=repr(config),
        expected="a dict, a Config or the path of a .py file",
        fix="pass dict() for no features",
    )


def checked_seed(seed: Any) -> int:
    """The seed, if all three generators take it."""
    if not is_integer(seed, 0) or seed >= 2**32:
        raise ArgumentError("seed", given=repr(seed), expected="an integer from 0 to 2**32 - 1", fix="pass seed=1024")
    return seed


def _checked(mode: object) -> ParallelMode:
    if not isinstance(mode, ParallelMode):
        raise ArgumentError("parallel_mode", given=repr(mode), expected="a ParallelMode", fix="pass ParallelMode.DATA")
    return mode


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
