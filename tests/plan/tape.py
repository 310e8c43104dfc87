"""What a CUDA graph does, on a CPU: the operations of a function, recorded with the memory they read and write.

A replay runs no Python of the function's. It reads and writes the recorded memory, draws new random numbers and leaves
version counters alone, as a CUDA graph does; and as there, a recording runs nothing: what it changed is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class StreamCaptureUnsupported(RuntimeError):
    pass


class Watch(TorchDispatchMode):
    """Notices what on a GPU would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func in WAITS
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.written: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS:
            raise StreamCaptureUnsupported("operation not permitted when stream is capturing")
        schema = func._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written or argument.name in ("running_mean", "running_var"):  # of which the schema says nothing
                for tensor in filter(torch.is_tensor, tree_leaves(value)):
                    self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        output = func(*args, **kwargs)
        is_fresh = all(result.alias_info is None for result in schema.returns)
        fresh = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)] if is_fresh else []
        self.operations.append((func, args, kwargs, fresh))
        return output

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, value in reversed(self.before.values()):
                tensor.detach().copy_(value)
        self.written, self.before = [tensor for tensor, _ in self.before.values()], {}

    @torch.no_grad()
    def replay(self) -> None:
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(self.written)):
            for func, args, kwargs, fresh in self.operations:
                output = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for old, new in zip(fresh, output, strict=False):
                    old.detach().copy_(new)


class Tape:
    """A recorder for `macrobatch.plan.graphs.Graphs`."""

    def __init__(self) -> None:
        self.num_forgotten = 0
        self.num_replays = 0

    def window(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rehearse(self, run: Callable[[], object]) -> str | None:
        with Watch() as watch:
            run()
        return "it waits for the device" if watch.waits else None

    def record(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        recording = Recording()
        state = torch.get_rng_state()
        try:
            with recording:
                found = run()
        finally:
            recording.undo()
            torch.set_rng_state(state)

        def replay() -> None:
            self.num_replays += 1
            recording.replay()

        return found, replay

    def forget(self) -> None:
        self.num_forgotten += 1
