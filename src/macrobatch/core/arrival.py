"""Copies to the device that run beside the work on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from macrobatch import tree

__all__ = ["Arrival", "Arrivals"]


class Arrival(NamedTuple):
    """A batch on its way."""

    batch: Any
    wait: Callable[[], object] | None
    """Makes what is launched from now on wait for the copy; None if there is nothing to wait for."""

    def ready(self) -> Any:
        """The batch, for use on the current stream. The host does not wait."""
        if self.wait is not None:
            self.wait()
        return self.batch


class Arrivals:
    """Copies batches to a device: to a CUDA device, on a stream of its own.

    Args:
        device: where to. What is there already is left where it is, and for the host there is nothing to do.

    Source:
        https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html, and for memory that is made on one stream
        and used on another https://docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html

    ```pycon
    >>> Arrivals(torch.device("cpu")).start({"x": 1}).ready()
    {'x': 1}

    ```
    """

    def __init__(self, device: torch.device) -> None:
        # With its index, which "cuda" lacks.
        self._device = torch.empty(0, device=device).device if device.type == "cuda" else device
        self._stream: Any = None

    def start(self, batch: Any) -> Arrival:
        """Begin to copy."""
        if self._device.type != "cuda":
            return Arrival(tree.to_device(batch, self._device), None)
        if tree.is_on(batch, self._device):
            return Arrival(batch, None)  # a stream's context alone would cost a small micro-step a tenth of its time
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            copy = tree.to_device(batch, self._device)
            event = self._stream.record_event()

        def wait() -> None:
            # For the event and not the stream, which is busy with the next batch already.
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for leaf in tree.leaves(copy):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    leaf.record_stream(stream)

        return Arrival(copy, wait)
