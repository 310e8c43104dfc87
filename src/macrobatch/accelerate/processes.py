"""What an accelerator knows of the processes it runs in, and how tensors go between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from macrobatch.accelerate.gradient_state import GradientState
from macrobatch.accelerate.state import AcceleratorState, PartialState
from macrobatch.accelerate.utils.operations import (
    gather,
    gather_object,
    pad_across_processes,
    recursively_apply,
    reduce,
)

__all__ = ["Processes"]


class Processes:
    """The part of `Accelerator` that concerns ranks. Counts and indices are those of torch.distributed."""

    state: AcceleratorState
    gradient_state: GradientState

    def __init__(self) -> None:
        self._processes = PartialState()
        self.flag_tensor: torch.Tensor | None = None

    @property
    def distributed_type(self) -> Any:
        """What kind of processes there are, a `DistributedType`."""
        return self.state.distributed_type

    @property
    def num_processes(self) -> int:
        """Number of ranks."""
        return self._processes.num_processes

    @property
    def process_index(self) -> int:
        """This rank."""
        return self._processes.process_index

    @property
    def local_process_index(self) -> int:
        """This rank's number on its machine."""
        return self._processes.local_process_index

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._processes.device

    @property
    def use_distributed(self) -> bool:
        """Whether there are several ranks, or one in a group."""
        return self._processes.use_distributed

    @property
    def multi_device(self) -> bool:
        """Whether there are several ranks, on CPUs too."""
        return self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        """Rank 0."""
        return self._processes.is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Rank 0 of its machine."""
        return self._processes.is_local_main_process

    @property
    def is_last_process(self) -> bool:
        """The highest rank."""
        return self._processes.is_last_process

    def wait_for_everyone(self) -> None:
        """Go on when all ranks are here."""
        self._processes.wait_for_everyone()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on the main process of each machine."""
        self._processes.print(*args, **kwargs)

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorator: the function runs on rank 0 only."""
        return self._processes.on_main_process(function)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorator: the function runs on rank 0 of each machine only."""
        return self._processes.on_local_main_process(function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function runs on the highest rank only."""
        return self._processes.on_last_process(function)

    def on_process(
        self, function: Callable[..., Any] | None = None, process_index: int | None = None
    ) -> Callable[..., Any]:
        """Decorator: the function runs on one rank only."""
        return self._processes.on_process(function, process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Callable[..., Any]:
        """Decorator: the function runs on one rank of each machine only."""
        return self._processes.on_local_process(function, local_process_index)

    def main_process_first(self) -> AbstractContextManager[Any]:
        """Context that rank 0 goes through before the others."""
        return self._processes.main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[Any]:
        """Context that rank 0 of each machine goes through before the others."""
        return self._processes.local_main_process_first()

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Context that yields this rank's share of a list, tuple, dict or tensor."""
        return self._processes.split_between_processes(inputs, apply_padding=apply_padding)

    def gather(self, tensor: Any) -> Any:
        """All ranks' tensors (of a tree of them), one after the other along dimension 0, on every rank."""
        return gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """`gather`, without the rows that the loader added to its last batch to make the ranks' shares equal.

        Args:
            input_data: tree of tensors with one row per sample, or of other objects, one per sample.
            use_gather_object: gather by pickling, for tensors of different sizes.
        """
        only_tensors = not use_gather_object and _holds_tensors_only(input_data)
        num_rows = self.gradient_state.remainder
        if not self.gradient_state.end_of_dataloader or num_rows <= 0:
            return self.gather(input_data) if only_tensors else gather_object(input_data)
        if not only_tensors:
            return gather_object(input_data)[:num_rows]
        num_own_rows = self.gradient_state.readings[-1].num_rows

        def gathered(tensor: torch.Tensor) -> torch.Tensor:
            # What is not one row per sample (one loss per rank, say) has no rows to drop.
            is_per_sample = tensor.ndim and (len(tensor) > 1 or num_own_rows == 1)
            return self.gather(tensor)[:num_rows] if is_per_sample else self.gather(tensor)

        return recursively_apply(gathered, input_data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """All ranks' tensors (of a tree of them) added up, or their mean, on every rank; "none" leaves them alone."""
        return reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Tensors made as long as the longest of all ranks, along one dimension."""
        return pad_across_processes(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def set_trigger(self) -> None:
        """Raise a flag on this rank that `check_trigger` sees on all of them."""
        self.flag_tensor = torch.ones(1, device=self.device)

    def check_trigger(self) -> bool:
        """Whether any rank has raised its flag since the last check; takes it down. All ranks have to call."""
        flag = torch.zeros(1, device=self.device) if self.flag_tensor is None else self.flag_tensor
        is_raised = bool(self.reduce(flag, "sum").item() >= 1)
        if is_raised:
            self.flag_tensor = None
        return is_raised


def _holds_tensors_only(tree: Any) -> bool:
    if isinstance(tree, torch.Tensor):
        return True
    children: Iterator[Any] | None = None
    if isinstance(tree, Mapping):
        children = iter(tree.values())
    elif isinstance(tree, list | tuple):
        children = iter(tree)
    return children is not None and all(map(_holds_tensors_only, children))
