"""Bringing the processes of a run together: `launch`, and its forms for those who started them."""

from __future__ import annotations

import argparse
import atexit
import ipaddress
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from macrobatch.checks import check_integer, is_integer
from macrobatch.colossalai import environment
from macrobatch.colossalai.context import Config, ParallelMode
from macrobatch.colossalai.context.parallel_context import checked_seed, read_config
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.environment import LaunchError
from macrobatch.colossalai.keys import check_config, hidden_features
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.errors import ArgumentError

__all__ = [
    "LaunchError",
    "get_default_parser",
    "launch",
    "launch_from_openmpi",
    "launch_from_slurm",
    "launch_from_torch",
]

ConfigLike = Mapping[str, Any] | str | Path


def get_default_parser() -> argparse.ArgumentParser:
    """A parser of what `launch` takes, to which a script adds its own arguments.

    It knows `--local-rank`, which `python -m torch.distributed.launch` passes to every script, in both spellings.

    ```pycon
    >>> get_default_parser().parse_args(["--local-rank=1", "--config", "config.py"])
    Namespace(config='config.py', host=None, port=None, world_size=None, rank=None, local_rank=1, backend='nccl')

    ```
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=str, help="path of the config file")
    parser.add_argument("--host", type=str, help="address of rank 0")
    parser.add_argument("--port", type=int, help="port of rank 0")
    parser.add_argument("--world_size", "--world-size", type=int, help="number of processes")
    parser.add_argument("--rank", type=int, help="rank of this process")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="rank of this process on its machine")
    parser.add_argument("--backend", type=str, default="nccl", help="nccl, which is gloo without GPUs, or gloo")
    return parser


def launch(
    config: ConfigLike,
    rank: int,
    world_size: int,
    host: str,
    port: int,
    backend: str = "nccl",
    local_rank: int | None = None,
    seed: int = 1024,
    verbose: bool = True,
) -> None:
    """Load the config, meet the other processes, take a GPU if there are any, and seed all random numbers.

    All arguments and the config are checked before anything is done. A process that is alone needs no network.

    Args:
        config: path of a `.py` file, or a dict.
        rank: of this process, 0 <= rank < world_size.
        world_size: number of processes, an integer >= 1.
        host: where rank 0 runs: a name, an IPv4 or an IPv6 address.
        port: a free port there, from 1 to 65535.
        backend: "nccl", which is gloo (and one line in the log) where there are no GPUs, or "gloo".
        local_rank: number of this process's GPU, counted round where it sees fewer; by default the rank.
        seed: an integer from 0 to 2^32 - 1, the same on every rank.
        verbose: whether to log what was done.

    Raises:
        ConfigException: the config cannot be read, or has a key that is not right.
        ArgumentError: another argument is out of its domain.
        LaunchError: there is a process group already, as after another `launch`; or some processes did not come.

    ```pycon
    >>> launch(dict(BATCH_SIZE=128), rank=0, world_size=1, host="localhost", port=29500, verbose=False)
    >>> gpc.config.BATCH_SIZE, gpc.world_size
    (128, 1)
    >>> gpc.destroy()

    ```
    """
    loaded = read_config(config)
    check_config(loaded)
    _check_place(rank, world_size, local_rank)
    address = _address(host, port)
    checked_seed(seed)
    chosen = _checked_backend(backend)
    if dist.is_initialized():
        raise LaunchError(
            "launch",
            given="a second call, or one after init_process_group",
            expected="one for each process",
            fix="remove one of them; between two runs in one process, call gpc.destroy()",
        )
    gpc.verbose = verbose
    gpc.load_config(loaded)
    gpc.set_device((rank if local_rank is None else local_rank) % max(1, torch.cuda.device_count()))
    _make_group(chosen, rank, world_size, address)
    gpc.set_seed(seed)
    _tell(loaded, backend, chosen, seed)


def launch_from_torch(config: ConfigLike, backend: str = "nccl", seed: int = 1024, verbose: bool = True) -> None:
    """`launch` under torchrun or `python -m torch.distributed.launch`.

    Raises:
        LaunchError: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT is not set, and as for `launch`.
    """
    starter = "torchrun"
    launch(
        config,
        rank=environment.integer(starter, "RANK"),
        local_rank=environment.integer(starter, "LOCAL_RANK"),
        world_size=environment.integer(starter, "WORLD_SIZE"),
        host=environment.text(starter, "MASTER_ADDR"),
        port=environment.integer(starter, "MASTER_PORT"),
        backend=backend,
        seed=seed,
        verbose=verbose,
    )


def launch_from_slurm(
    config: ConfigLike, host: str, port: int, backend: str = "nccl", seed: int = 1024, verbose: bool = True
) -> None:
    """`launch` under Slurm's srun.

    Raises:
        LaunchError: SLURM_PROCID or SLURM_NPROCS (SLURM_NTASKS) is not set, and as for `launch`.
    """
    starter = "srun"
    launch(
        config,
        rank=environment.integer(starter, "SLURM_PROCID"),
        local_rank=environment.integer(starter, "SLURM_LOCALID") if environment.has("SLURM_LOCALID") else None,
        world_size=environment.integer(starter, "SLURM_NPROCS", "SLURM_NTASKS"),
        host=host,
        port=port,
        backend=backend,
        seed=seed,
        verbose=verbose,
    )


def launch_from_openmpi(
    config: ConfigLike, host: str, port: int, backend: str = "nccl", seed: int = 1024, verbose: bool = True
) -> None:
    """`launch` under OpenMPI's mpirun.

    Raises:
        LaunchError: OMPI_COMM_WORLD_RANK, _LOCAL_RANK or _SIZE is not set, and as for `launch`.
    """
    starter = "mpirun"
    launch(
        config,
        rank=environment.integer(starter, "OMPI_COMM_WORLD_RANK"),
        local_rank=environment.integer(starter, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=environment.integer(starter, "OMPI_COMM_WORLD_SIZE"),
        host=host,
        port=port,
        backend=backend,
        seed=seed,
        verbose=verbose,
    )


def _make_group(backend: str, rank: int, world_size: int, address: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else None
    meeting: dict[str, Any] = {"init_method": address}
    if world_size == 1:
        meeting = {"store": dist.HashStore()}  # pyright: ignore[reportPrivateImportUsage]
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size, device_id=device, **meeting)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise LaunchError(
            "launch",
            given=f"on rank {rank}: {str(error).strip()}",
            expected=f"all {world_size} ranks to meet at {address}",
            fix="check that every rank was started and reaches that address, and that its port is free",
        ) from error
    atexit.unregister(_end)
    atexit.register(_end)


def _end() -> None:
    """At exit. After an error the other ranks should hear of it now: leaving the group would wait for them."""
    if getattr(sys, "last_value", None) is None:
        gpc.destroy()


def _tell(config: Config, asked: str, chosen: str, seed: int) -> None:
    logger = get_dist_logger()
    if asked == "nccl" and chosen == "gloo":
        logger.info("no GPU here: the backend is gloo instead of nccl", ranks=[0])
    hidden = hidden_features(config)
    if hidden:
        logger.warning(
            f"without effect in the config: {', '.join(hidden)}; to switch a feature on, give it at the top level",
            ranks=[0],
        )
    if config.get("seed", seed) != seed:
        logger.warning(
            f"without effect in the config: seed = {config['seed']}; the seed is {seed}, launch(seed=...) sets it",
            ranks=[0],
        )
    if gpc.verbose:
        size = gpc.get_world_size(ParallelMode.DATA)
        logger.info(f"launched: data parallel size {size}, backend {chosen}, seed {seed}", ranks=[0])


def _check_place(rank: object, world_size: object, local_rank: object) -> None:
    for name, value in (("rank", rank), ("world_size", world_size), ("local_rank", local_rank)):
        if name == "local_rank" and value is None:
            continue
        fix = "pass it, or call launch_from_torch, which reads it from the environment"
        check_integer(f"launch's {name}", value, at_least=int(name == "world_size"), fix=fix)
    if isinstance(rank, int) and isinstance(world_size, int) and rank >= world_size:
        raise ArgumentError(
            "launch's rank", given=f"{rank} of {world_size}", expected="rank < world_size", fix="count ranks from 0"
        )


def _address(host: object, port: Any) -> str:
    """The meeting point as a URL, in which an IPv6 address, and nothing else, has brackets around it.

    ```pycon
    >>> _address("localhost", 29500), _address("10.0.0.1", 1), _address("::1", 2), _address("[::1]", 2)
    ('tcp://localhost:29500', 'tcp://10.0.0.1:1', 'tcp://[::1]:2', 'tcp://[::1]:2')

    ```
    """
    if not isinstance(host, str) or not host.strip("[]") or any(sign in host for sign in "/ @?#"):
        raise ArgumentError(
            "launch's host", given=repr(host), expected="a host's name or IP address", fix='pass host="localhost"'
        )
    if not is_integer(port, 1) or port > 65535:
        raise ArgumentError(
            "launch's port", given=repr(port), expected="an integer from 1 to 65535", fix="pass port=29500"
        )
    name = host.removeprefix("[").removesuffix("]")
    try:
        is_ipv6 = ipaddress.ip_address(name).version == 6
    except ValueError:
        is_ipv6 = False
    return f"tcp://[{name}]:{port}" if is_ipv6 else f"tcp://{name}:{port}"


def _checked_backend(backend: object) -> str:
    """The backend of the group: for GPUs and CPUs where there are GPUs."""
    if backend == "gloo":
        return "gloo"
    if backend != "nccl":
        raise ArgumentError("launch's backend", given=repr(backend), expected='"nccl" or "gloo"', fix="leave it out")
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
