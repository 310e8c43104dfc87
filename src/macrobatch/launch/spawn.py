"""Ranks as processes of this machine, from within Python: for notebooks, scripts and debugging."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

from macrobatch import env
from macrobatch.checks import check_integer
from macrobatch.errors import ArgumentError, PeerError
from macrobatch.launch.group import init, shutdown
from macrobatch.launch.ranks import Rendezvous, detect
from macrobatch.ranks import Ranks

__all__ = ["spawn"]

T = TypeVar("T")
StartMethod = Literal["auto", "spawn", "fork"]

_GRACE_S = 3.0  # what the other ranks get to end by themselves after one has failed, and again before they are killed


def spawn(
    function: Callable[..., T],
    args: Iterable[Any] = (),
    num_processes: int | None = None,
    *,
    backend: str | None = None,
    timeout_s: float | None = None,
    start_method: StartMethod = "auto",
) -> list[T]:
    """`function(*args)` on each of `num_processes` ranks of this machine, inside a group; the results by rank.

    Equivalent to a script under `macrobatch launch --nproc N` that calls `launch.init()` and then the function. With
    one process it is the plain call `[function(*args)]`, which a debugger can follow.

    A function from a module, or from a script under `if __name__ == "__main__"`, is started in fresh interpreters; one
    that was defined in a notebook, in forks of this process, each with one torch thread. Forks need a parent that has
    not used a GPU.

    Args:
        function: what each rank does. `launch.init()` tells it its `Ranks`.
        args: its arguments; like the results, they have to be picklable.
        num_processes: number of ranks; by default one per GPU, one if there is none.
        backend: as for `init`.
        timeout_s: as for `init`.
        start_method: "auto", or "spawn" for fresh interpreters and "fork" for forks.

    Raises:
        ArgumentError: an argument is out of its domain, or this process is a rank already.
        PeerError: a rank failed; with its traceback. The other ranks are ended within seconds.

    ```pycon
    >>> import operator
    >>> spawn(operator.add, (1, 2), num_processes=1)
    [3]

    ```
    """
    arguments = tuple(args)
    num_processes = (torch.cuda.device_count() or 1) if num_processes is None else num_processes
    check_integer("num_processes", num_processes, fix="leave it out")
    if not callable(function):
        raise ArgumentError("function", given=repr(function), expected="a function", fix="pass it without calling it")
    _refuse_ranks()
    if num_processes == 1:
        return [function(*arguments)]
    method = _checked_method(function, start_method)
    # The meeting point is on a port that nobody else has, and this process serves it, as torchrun's agent does.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    job = _Job(
        function=function,
        args=arguments,
        num_processes=num_processes,
        port=store.port,
        backend=backend,
        timeout_s=timeout_s,
        method=method,
    )
    with tempfile.TemporaryDirectory(prefix="macrobatch-") as folder:
        _run(job, Path(folder))
        return [_loaded(Path(folder), rank) for rank in range(num_processes)]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every rank is sent."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    num_processes: int
    port: int
    backend: str | None
    timeout_s: float | None
    method: str

    def rendezvous(self, rank: int) -> Rendezvous:
        ranks = Ranks(rank=rank, world_size=self.num_processes, local_rank=rank, local_world_size=self.num_processes)
        return Rendezvous(ranks=ranks, address="127.0.0.1", port=self.port)


def _run(job: _Job, folder: Path) -> None:
    with warnings.catch_warnings():
        # Python 3.12 warns of forks where threads run; the forks here keep to one thread of their own.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        context = start_processes(
            _be_rank, (job, folder), nprocs=job.num_processes, join=False, start_method=job.method
        )
    assert context is not None
    processes: list[Any] = context.processes
    try:
        while not context.join(grace_period=_GRACE_S):
            pass
    except ProcessException as error:
        raise _failure(error, job, folder) from None
    finally:
        for process in processes:
            if process.is_alive():  # the wait was interrupted
                process.kill()
                process.join()


def _be_rank(rank: int, job: _Job, folder: Path) -> None:
    if job.method == "fork":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not what the parent does about it
        num_threads = 1  # OpenMP's threads do not survive a fork, and waiting for them would never end
    else:
        num_threads = max(1, env.num_cores() // job.num_processes)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)
    os.environ.update(job.rendezvous(rank).variables())
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="macrobatch")
    try:
        init(job.backend, timeout_s=job.timeout_s)
        result = job.function(*job.args)
        torch.save(result, folder / f"{rank}.result")
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    shutdown()


def _loaded(folder: Path, rank: int) -> Any:
    """What a rank returned, of any class; None after sys.exit(0). The file is from a child of this process, in a folder
    that nobody else can write to."""
    path = folder / f"{rank}.result"
    return torch.load(path, weights_only=False) if path.exists() else None


def _failure(error: ProcessException, job: _Job, folder: Path) -> PeerError:
    """The failure that came first: the others mostly are its consequences."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    rank, given, shown = str(error.error_index), error.msg, ""  # it died without a word,
    if (folder / f"{rank}.error").exists():  # ... or it did not
        rank, text = errors[0].stem, errors[0].read_text(encoding="utf-8").strip()
        given, shown = text.splitlines()[-1], f":\n\n{text}\n"
    return PeerError(
        f"rank {rank} of {job.num_processes}",
        given=given,
        expected="every rank to return; the others were ended",
        fix=f"look at what happened there{shown}",
    )


def _refuse_ranks() -> None:
    if dist.is_initialized() or detect().ranks.world_size > 1:
        raise ArgumentError(
            "launch.spawn",
            given="a process that is one of several ranks already",
            expected="a process that is alone",
            fix="call the function itself; its ranks are those of torchrun, Slurm or mpirun",
        )


def _checked_method(function: Callable[..., Any], method: str) -> str:
    if method not in get_args(StartMethod):
        raise ArgumentError(
            "start_method", given=repr(method), expected='"auto", "spawn" or "fork"', fix="leave it out"
        )
    if method == "auto":
        is_interactive = not hasattr(sys.modules["__main__"], "__file__")
        method = "fork" if function.__module__ == "__main__" and is_interactive else "spawn"
    if method == "fork" and torch.cuda.is_initialized():
        raise ArgumentError(
            "launch.spawn",
            given="a process that has used a GPU, which its forks then cannot",
            expected="a process that has not",
            fix="restart the notebook and spawn before anything is on a GPU, or move the function into a module",
        )
    if method == "spawn":
        try:
            pickle.dumps(function)
        except Exception as error:
            raise ArgumentError(
                "function",
                given=f"{function} ({error})",
                expected="a function that fresh interpreters find by its name",
                fix='define it at the top of a module, or pass start_method="fork"',
            ) from None
    return method
