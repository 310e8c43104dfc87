"""Scripts in fresh processes that need not import torch: forks of one that has."""

from __future__ import annotations

import atexit
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from macrobatch.launch.ranks import Rendezvous
from macrobatch.ranks import Ranks
from macrobatch.testing.pool import warm_context

__all__ = ["Finished", "run_script", "without_launchers"]

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "PET_", "TORCHELASTIC_", "GROUP_")


class Finished(NamedTuple):
    """How a script ended: exit codes, and what was printed, by process."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]


def without_launchers() -> dict[str, str]:
    """This process's environment, but for the variables of torchrun, Slurm and MPI."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}


def run_script(
    path: str | Path,
    *arguments: str,
    num_ranks: int | None = None,
    processes: Sequence[Mapping[str, str]] = ({},),
    environ: Mapping[str, str] | None = None,
    folder: str | Path = ".",
    timeout_s: float = 300.0,
) -> Finished:
    """Run a script to its end, in one process or in several at once.

    Equivalent to `python path *arguments`, or to `torchrun --nproc_per_node num_ranks path *arguments`, in processes
    that have imported torch and macrobatch already, but have not used them. The ranks' rank 0 keeps the store.

    Args:
        path: of the script.
        arguments: of the script.
        num_ranks: how many processes that torchrun's variables make ranks.
        processes: if there is no such number: for each process, what it alone has in its environment.
        environ: what all of them have in their environment, beside what this one has from no launcher.
        folder: where to run it.
        timeout_s: after so many seconds what is left is killed.

    ```pycon
    >>> run_script("train.py", "--epochs", "1", num_ranks=2).codes  # doctest: +SKIP
    [0, 0]

    ```
    """
    context = warm_context()
    launched = processes if num_ranks is None else _launched(num_ranks)
    with tempfile.TemporaryDirectory(prefix="macrobatch-") as outputs:
        started = []
        for rank, variables in enumerate(launched):
            files = f"{outputs}/stdout-{rank}", f"{outputs}/stderr-{rank}"
            environment = {**without_launchers(), **(environ or {}), **variables}
            task = str(Path(path).absolute()), arguments, environment, str(folder), files
            started.append(context.Process(target=_main, args=task, daemon=False))
            started[-1].start()
        waiting = {process.sentinel for process in started}
        while waiting:
            ready = wait(list(waiting), timeout_s)
            if not ready:
                break
            waiting.difference_update(ready)  # pyright: ignore[reportArgumentType]
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()
        texts = [
            [Path(f"{outputs}/{name}-{rank}").read_text(encoding="utf-8") for rank in range(len(started))]
            for name in ("stdout", "stderr")
        ]
    return Finished([int(process.exitcode or 0) for process in started], *texts)


def _launched(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun tells its ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = int(free.getsockname()[1])
    sizes = {"world_size": num_ranks, "local_world_size": num_ranks}
    ranks = [Ranks(rank=rank, local_rank=rank, **sizes) for rank in range(num_ranks)]
    return [Rendezvous(ranks=each, launcher="torch", address="localhost", port=port).variables() for each in ranks]


def _main(path: str, arguments: Sequence[str], environ: Mapping[str, str], folder: str, files: Sequence[str]) -> None:
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    atexit._clear()  # pyright: ignore[reportPrivateUsage] # what the process that was forked is to do
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    code = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.last_value = error  # as the interpreter does before it leaves
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] # which processes of multiprocessing do not
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
