"""The group of all ranks: made once, with the backend that fits, and ended cleanly."""

from __future__ import annotations

import atexit
import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from macrobatch.checks import is_number
from macrobatch.errors import ArgumentError, PeerError
from macrobatch.launch.ranks import detect
from macrobatch.ranks import Ranks

__all__ = ["init", "shutdown", "together"]

_KEY = "macrobatch/gpu/"


def init(backend: str | None = None, *, timeout_s: float | None = None) -> Ranks:
    """Join the other ranks, whoever started them, and take this rank's GPU. Alone, there is no group to make.

    Equivalent under torchrun, on GPUs:

    ```python
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", local_rank))
    atexit.register(dist.destroy_process_group)
    ```

    Under Slurm, OpenMPI and MPICH it also sets torch.distributed's environment variables that are missing. A second
    call, or one after your own `init_process_group`, only tells the ranks.

    Args:
        backend: of torch.distributed. By default NCCL for GPUs (and gloo beside it) if every rank has a GPU of its
            own; gloo if there are none, or fewer than ranks.
        timeout_s: seconds that ranks wait for each other, here and in every collective; torch's default if None.

    Raises:
        ArgumentError: what the environment says does not fit together, or an argument is out of its domain.
        PeerError: some ranks did not come.

    ```pycon
    >>> init()
    Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)

    ```
    """
    timeout = _checked_timeout(timeout_s)
    _check_backend(backend)
    if dist.is_initialized():
        return _ranks_of_group()
    found = detect()
    device = _take_gpu(found.ranks.local_rank)
    if found.ranks.world_size > 1:
        os.environ.update({name: value for name, value in found.variables().items() if not os.environ.get(name)})
        try:
            _make_group(backend, device, timeout)
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise PeerError(
                "launch.init",
                given=f"on rank {found.ranks.rank}: {str(error).strip()}",
                expected=f"all {found.ranks.world_size} ranks to meet at {found.address}:{found.port}",
                fix="check that every rank was started and reaches that address (MASTER_ADDR, MASTER_PORT)",
            ) from error
        atexit.unregister(_end)
        atexit.register(_end)
    return found.ranks


def shutdown() -> None:
    """Leave the group, if there is one. Called by itself when a script that called `init` ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together(
    what: str,
    *,
    expected: str = "no error on any rank",
    fix: str = "see what those say",
    all_ranks: bool = True,
) -> Generator[None]:
    """Context at whose end all ranks of the default group wait for each other, and hear whether it raised on one.

    Args:
        what: they do in it, for the error, as are `expected` and `fix`.
        all_ranks: whether they do; else this one is by itself.

    Raises:
        PeerError: it did, on another one.

    ```pycon
    >>> with together("nothing", all_ranks=False):
    ...     pass

    ```
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors: list[Any] = []
    if all_ranks:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    found = {rank: each for rank, each in enumerate(errors) if each is not None}
    if found:
        raise PeerError(what, given=f"by rank, {found!r:.500}", expected=expected, fix=fix)


def _make_group(backend: str | None, device: torch.device | None, timeout: timedelta | None) -> None:
    waits: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    store, rank, world_size = next(iter(rendezvous("env://", **waits)))
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if _has_own_gpu_everywhere(store, rank, world_size, device) else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("default_pg", store),
        rank=rank,
        world_size=world_size,
        device_id=device if "nccl" in backend else None,
        timeout=timeout,
    )


def _has_own_gpu_everywhere(store: Store, rank: int, world_size: int, device: torch.device | None) -> bool:
    """Whether no rank lacks a GPU and no two share one; the same answer on every rank.

    Numbers of devices do not tell: a scheduler may show each of four ranks its own GPU as the only one.
    """
    name = ""
    if device is not None and dist.is_nccl_available():
        name = f"{platform.node()}/{torch.cuda.get_device_properties(device).uuid}"
    store.set(f"{_KEY}{rank}", name)
    names = [bytes(each) for each in store.multi_get([f"{_KEY}{other}" for other in range(world_size)])]
    return all(names) and len(set(names)) == world_size


def _take_gpu(local_rank: int) -> torch.device | None:
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return None
    device = torch.device("cuda", local_rank % num_gpus)
    torch.cuda.set_device(device)
    return device


def _ranks_of_group() -> Ranks:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = detect().ranks
    if (ranks.rank, ranks.world_size) == (rank, world_size):
        return ranks
    return Ranks(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)


def _end() -> None:
    """At exit. After an error the other ranks should hear of it now: leaving the group would wait for them."""
    if getattr(sys, "last_value", None) is None:
        shutdown()


def _check_backend(backend: object) -> None:
    """Refuse what torch.distributed does not know, on a single process too: it would fail on several only."""
    kinds = [part.rpartition(":")[2] for part in backend.split(",")] if isinstance(backend, str) else [backend]
    if backend is None or all(kind in dist.Backend.backend_list for kind in kinds):
        return
    raise ArgumentError("backend", given=repr(backend), expected='"gloo", "nccl" for GPUs, or None', fix="leave it out")


def _checked_timeout(timeout_s: Any) -> timedelta | None:
    if timeout_s is None:
        return None
    if not is_number(timeout_s) or timeout_s <= 0:
        raise ArgumentError("timeout_s", given=repr(timeout_s), expected="seconds > 0, or None", fix="leave it out")
    return timedelta(seconds=timeout_s)
