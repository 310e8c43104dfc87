"""How what a device does in a micro-step is recorded and replayed: the one place that knows of CUDA graphs.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["CudaRecorder", "Recorder", "Replay"]

_WAIT = "called a synchronizing CUDA operation"
_NOTICE = "Synchronization debug mode"

T = TypeVar("T")
Replay = Callable[[], None]


class Recorder(Protocol):
    """Records what a function asks of the device, to be replayed without the function.

    A replay reads and writes the very memory that the recorded function did, and draws other random numbers each time:
    those that the function would draw.
    """

    def window(self) -> AbstractContextManager[Any]:
        """Context of a window's forwards and backwards, in which all of the following is called."""
        ...

    def rehearse(self, run: Callable[[], object]) -> str | None:
        """Run the function for real. Returns what will stand in the way of recording it, if that can be seen: the rest
        of a sentence that begins with "since"."""
        ...

    def record(self, run: Callable[[], T]) -> tuple[T, Replay]:
        """Record a function that was rehearsed. When this is over, gradients, module buffers and generators are as if
        it had not run, whether it fails or not.

        Returns:
            What the function returned, tensors that every replay fills anew; and the replay.
        """
        ...

    def forget(self) -> None:
        """Nothing that was recorded so far will be replayed again."""
        ...


class CudaRecorder:
    """CUDA graphs of one device. They share one memory pool, since they run one after the other.

    All of a window runs on the stream on which it is recorded: cuBLAS has a workspace for each, and autograd runs a
    node on the stream on which it was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[Any] = []

    @contextmanager
    def window(self) -> Generator[None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def rehearse(self, run: Callable[[], object]) -> str | None:
        with _waits_noticed() as waits:
            run()
        if waits:
            return "it waits for the device (.item(), a condition on a tensor, a boolean index, a copy to the host)"
        return None

    def record(self, run: Callable[[], T]) -> tuple[T, Replay]:
        gc.collect()  # what is freed while recording may be a graph itself, which CUDA forbids
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like: NCCL's watchdog, a loader that pins memory.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            found = run()
            graph.capture_end()
        except BaseException:
            self._give_up(graph)
            raise
        return found, graph.replay

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def _give_up(self, graph: Any) -> None:
        """End a recording that failed. Where CUDA has invalidated it, PyTorch 2.11 leaves its allocator and its random
        number generator believing that it goes on, until another recording ends well."""
        try:
            graph.capture_end()
        except RuntimeError:
            self._failed.append(graph)  # the allocator may still ask it whether it is recording
            with suppress(RuntimeError):  # later versions have done this already
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)  # pyright: ignore[reportPrivateUsage]
            other = torch.cuda.CUDAGraph()
            other.capture_begin(capture_error_mode="thread_local")
            torch.ones(1, device=self._device).add_(1)
            other.capture_end()
            self._pool = torch.cuda.graph_pool_handle()


@contextmanager
def _waits_noticed() -> Generator[list[str]]:
    """The host's waits for the device within the context, as PyTorch's own debug mode sees them."""
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    if before:  # somebody watches already
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        for message in (_WAIT, _NOTICE):
            warnings.filterwarnings("always", message=message)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if text.startswith(_WAIT):
            waits.append(text)
        elif not text.startswith(_NOTICE):  # not ours: shown as it would have been
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
