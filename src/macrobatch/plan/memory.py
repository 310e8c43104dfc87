"""How much memory a device has and how much some work takes at its peak: of a GPU, or of the host.

The host has no such counters. `HostMemory` counts there what PyTorch's operators allocate, and can hold them to a
limit, so that all that is planned for a GPU runs the same way without one.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from macrobatch import env
from macrobatch.checks import check_integer

__all__ = ["CudaMemory", "HostMemory", "Memory", "Peak", "memory_of"]


class Peak:
    """The most that was allocated while something ran, in bytes, what was there before included."""

    def __init__(self) -> None:
        self.num_bytes = 0


class Memory:
    """A device's memory, as far as this process may have it. The base class knows no limit and counts nothing."""

    def capacity_bytes(self) -> int | None:
        """What this process may use altogether, what it holds included; None if there is no telling."""
        return None

    def held_bytes(self) -> int:
        """What is allocated now, as `measured` counts it."""
        return 0

    @contextmanager
    def measured(self) -> Generator[Peak]:
        """Measures the peak of what runs inside of it; to be read after it."""
        yield Peak()

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done."""

    def release(self) -> None:
        """Give back what nothing refers to any longer, reference cycles included."""
        gc.collect()


class CudaMemory(Memory):
    """The memory of a GPU, as PyTorch's allocator counts it. To measure, it resets the allocator's peak."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capacity_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        share = torch.cuda.get_per_process_memory_fraction(self._device)
        return min(free + torch.cuda.memory_reserved(self._device), int(share * total))

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    @contextmanager
    def measured(self) -> Generator[Peak]:
        peak = Peak()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield peak
        finally:
            self.synchronize()
            peak.num_bytes = torch.cuda.max_memory_allocated(self._device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        gc.collect()
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


class HostMemory(TorchDispatchMode, Memory):
    """The memory that PyTorch's operators allocate for their results while this context is entered.

    With a limit, an operator whose result goes beyond it raises `torch.OutOfMemoryError`, in a forward as in a
    backward: a small GPU, made of host memory. What was allocated before the context was entered does not count.

    Args:
        limit_bytes: what may be held at once, an integer >= 1. None: as much as the host has.

    ```pycon
    >>> with HostMemory(limit_bytes=1000) as memory:
    ...     x = torch.zeros(100)
    ...     print(memory.num_bytes)
    ...     y = torch.zeros(200)
    Traceback (most recent call last):
        ...
    torch.OutOfMemoryError: out of memory: 400 of 1000 bytes were in use, aten.zeros.default asked for 800 more

    ```
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        check_integer("limit_bytes", limit_bytes, or_none=True, fix="pass limit_bytes=2**30")
        super().__init__()
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        """Allocated inside the context and still alive."""
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        self._depth = 0

    def __enter__(self) -> HostMemory:
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self._sizes:
                self._count(storage, func)
        return result

    def capacity_bytes(self) -> int | None:
        return env.free_memory_bytes() if self.limit_bytes is None else self.limit_bytes

    def held_bytes(self) -> int:
        return self.num_bytes

    @contextmanager
    def measured(self) -> Generator[Peak]:
        peak = Peak()
        if not self._depth:
            with self, self.measured() as inside:
                yield peak
            peak.num_bytes = inside.num_bytes
            return
        self.peak_bytes = self.num_bytes
        try:
            yield peak
        finally:
            peak.num_bytes = self.peak_bytes

    def _count(self, storage: Any, func: Any) -> None:
        size = storage.nbytes()
        if self.limit_bytes is not None and self.num_bytes + size > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"out of memory: {self.num_bytes} of {self.limit_bytes} bytes were in use, {func} asked for {size} more"
            )
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        self._sizes[id(storage)] = size
        weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, key: int) -> None:
        self.num_bytes -= self._sizes.pop(key)


def memory_of(device: torch.device) -> Memory:
    """The memory to plan for on a device.

    ```pycon
    >>> type(memory_of(torch.device("cpu"))).__name__
    'HostMemory'

    ```
    """
    if device.type == "cuda":
        return CudaMemory(device)
    return HostMemory() if device.type == "cpu" else Memory()


def _storages(tree: Any) -> list[Any]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]  # pyright: ignore[reportPrivateUsage]
    return [t.untyped_storage() for t in local if t.layout is torch.strided and t.device.type != "meta"]
