"""A warm pool of ranks: processes with a gloo group that stay, so that a test over ranks costs milliseconds.

A job is a function at the top of a module and is found again by its file, so that test modules need not be importable.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import multiprocessing
import multiprocessing.context
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["RankError", "RankPool", "warm_context"]

_START_S = 60.0
# torch imports _dynamo with the first optimizer: a second and more, which each new process would spend again.
_NEEDED = (
    "torch.distributed.fsdp",
    "torch._dynamo",
    "macrobatch.accelerate",
    "macrobatch.colossalai",
    "macrobatch.testing.scripts",
)
_USED = ("accelerate", "hypothesis", "pytest", "sklearn.datasets", "transformers.models.gpt2.modeling_gpt2")


def warm_context() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported torch, macrobatch, and of the packages for tests those that this one has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_NEEDED, *(name for name in _USED if name.split(".")[0] in sys.modules)])
    return context


class RankError(AssertionError):
    """A job failed on one or more ranks; the text has their tracebacks."""


class RankPool:
    """`world_size` processes, ranks of one group.

    Equivalent to starting the job under torchrun, without the seconds that importing torch takes each time.

    Args:
        world_size: number of ranks, >= 1.
        timeout_s: longest a job or a collective may take. After a failure the processes are replaced by new ones.
        backend: "gloo", or "nccl" with a GPU for each rank.

    ```pycon
    >>> with RankPool(2) as pool:  # doctest: +SKIP
    ...     pool.run(job, 1.0)
    [3.0, 3.0]

    ```
    """

    def __init__(self, world_size: int, *, timeout_s: float = 120.0, backend: str = "gloo") -> None:
        self.world_size = world_size
        self._backend = backend
        self._timeout_s = timeout_s
        self._members: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """`job(*args)` on every rank, inside the group; the results by rank.

        Raises:
            RankError: it raised on a rank, or took too long.
        """
        outcomes = self.outcomes(job, *args)
        failed = [f"--- rank {rank}\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
        if failed:
            raise RankError("\n".join(failed))
        return [value for _, value in outcomes]

    def outcomes(self, job: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """As `run`, but by rank either (True, result) or (False, traceback)."""
        if not self._members:
            self._open()
        for _, pipe in self._members:
            pipe.send((job.__code__.co_filename, job.__name__, args))
        outcomes: list[tuple[bool, Any]] = [(False, f"no answer within {self._timeout_s} s")] * self.world_size
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._members)}
        while waiting:
            ready = wait(list(waiting), self._timeout_s)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # pyright: ignore[reportArgumentType]
                try:
                    outcomes[rank] = pipe.recv()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
                except EOFError:
                    outcomes[rank] = (False, "the process died")
        if not all(ok for ok, _ in outcomes):
            self.close()  # a rank that failed in the middle of a collective leaves the group unusable
        return outcomes

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._members:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self._members = []
        if self._folder is not None:
            self._folder.cleanup()
        atexit.unregister(self.close)

    def _open(self) -> None:
        context = warm_context()
        self._folder = tempfile.TemporaryDirectory(prefix="macrobatch-")
        meeting = Path(self._folder.name) / "ranks"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, meeting, self._timeout_s, self._backend, theirs)
            process = context.Process(target=_serve, args=args, daemon=False)  # so that it may have DataLoader workers
            process.start()
            theirs.close()
            self._members.append((process, ours))
        atexit.register(self.close)  # runs before multiprocessing waits for what is left
        for _, pipe in self._members:  # on a busy machine, longer than a job may take
            if not pipe.poll(2 * _START_S) or pipe.recv() is not None:
                raise RankError(f"no group of {self.world_size} ranks within {2 * _START_S:.0f} s")


def _serve(rank: int, world_size: int, meeting: Path, timeout_s: float, backend: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # no collection need go through what was imported, which can take a second each time
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(meeting), world_size)  # pyright: ignore[reportPrivateImportUsage]
    store.set(f"started {rank}", "")
    store.wait([f"started {other}" for other in range(world_size)], timedelta(seconds=_START_S))
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s / 2),
    )
    pipe.send(None)
    modules: dict[str, ModuleType] = {}
    num_imported = len(sys.modules)
    while True:
        try:
            task: tuple[str, str, Sequence[Any]] | None = pipe.recv()
        except EOFError:  # the parent is gone
            task = None
        if task is None:
            os._exit(0)  # without waiting for peers that may be gone
        path, name, args = task
        try:
            job = getattr(_loaded(path, modules), name)
            if len(sys.modules) != num_imported:
                gc.collect()
                gc.freeze()
                num_imported = len(sys.modules)
            torch.manual_seed(rank)
            pipe.send((True, job(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _loaded(path: str, modules: dict[str, ModuleType]) -> ModuleType:
    if path not in modules:
        spec = importlib.util.spec_from_file_location(f"job_{len(modules)}", path)
        assert spec is not None
        assert spec.loader is not None
        modules[path] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modules[path]
        spec.loader.exec_module(modules[path])
    return modules[path]
