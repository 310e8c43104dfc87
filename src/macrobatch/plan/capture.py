"""Micro-steps whose forward and backward run compiled, on top of the persistent gradient buffer.

With `mode="reduce-overhead"` on a GPU, torch.compile replays CUDA graphs, which read and write fixed addresses.
Gradients that are None between windows then raise "accessing tensor output of CUDAGraphs that has been overwritten",
or are summed wrongly (https://github.com/pytorch/pytorch/issues/169545). The views of the flat buffer stay where they
are, so autograd adds into them in place, whatever made the addend. What a replay returns is overwritten by the next
one: losses and weights are copied out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from macrobatch.core.autograd import wider_aside
from macrobatch.core.twopass import TwoPass
from macrobatch.errors import ArgumentError, LossError
from macrobatch.tree import map_tensors

__all__ = ["Capture", "Compiled", "captured"]

Capture = Literal["compile"]
LossFn = Callable[[Any, Any], Any]
_LOG = logging.getLogger("macrobatch")


def captured(loss_fn: LossFn, capture: object, device: torch.device) -> LossFn:
    """A loss function that runs as `capture` says: None, as it is; "compile", compiled.

    ```pycon
    >>> captured(len, None, torch.device("cpu")) is len
    True

    ```
    """
    if capture is None:
        return loss_fn
    if isinstance(loss_fn, TwoPass):
        raise ArgumentError(
            "capture",
            given=f"{capture!r} for a TwoPass",
            expected="None: its second pass depends on all of the first",
            fix="compile the encoders themselves, with torch.compile(model)",
        )
    if capture == "compile":
        return Compiled(loss_fn, device)
    raise ArgumentError("capture", given=capture, expected='None or "compile"', fix="leave it out to run eagerly")


class Compiled:
    """A loss function that torch.compile has compiled: with CUDA graphs on a GPU, without on a CPU.

    Shapes are compiled one by one, so micro-batches of a few sizes are best. If it cannot be compiled, it runs as it
    is, and one line in the log says why. torch.compile draws other random numbers than eager PyTorch does.
    """

    def __init__(self, loss_fn: LossFn, device: torch.device) -> None:
        self._eager = loss_fn
        self._replays = device.type == "cuda"
        self._narrow: list[Tensor] | None = None
        self._compiled: LossFn | None = torch.compile(
            loss_fn, mode="reduce-overhead" if self._replays else None, dynamic=False
        )

    def __call__(self, model: Any, micro_batch: Any) -> Any:
        if self._compiled is None:
            return self._eager(model, micro_batch)
        if self._replays:
            torch.compiler.cudagraph_mark_step_begin()
        if self._narrow is None:
            self._narrow = [param for param in model.parameters() if param.itemsize < 4]
        try:
            with wider_aside(self._narrow):
                output = self._compiled(model, micro_batch)
        except (LossError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not _is_compilers(error):
                raise
            self._compiled = None
            _LOG.warning("capture: runs eagerly, since torch.compile failed: %s", str(error).partition("\n")[0])
            return self._eager(model, micro_batch)
        return map_tensors(Tensor.clone, output) if self._replays else output


def _is_compilers(error: BaseException) -> bool:
    """Whether an error is the compiler's and not the loss function's own."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch.fx"))
