"""In which precision a micro-batch is computed. The base class is full precision and does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from macrobatch.checks import is_number
from macrobatch.errors import ArgumentError, StateError

__all__ = ["Bf16", "Fp16", "Precision", "make_precision"]


class Precision:
    """Full precision: everything runs in the model's own dtypes.

    A subclass may change how a forward runs (`forward`), what a backward starts from (`seeds`), what is done to the
    finished gradient (`unscale`), and what happens when the window's fate is known (`update`).
    """

    name = "fp32"
    autocast: torch.dtype | None = None
    """The dtype that forwards compute in under autocast, where they do."""
    rescales = False
    """Whether an infinite gradient is this precision's own doing (its loss scale), to be skipped and learnt from."""
    groups: Callable[[], Iterable[dist.ProcessGroup]] = staticmethod(tuple)
    """Ranks that have other pieces of the same gradients; set by the step."""

    def forward(self) -> AbstractContextManager[Any]:
        """Context of one micro-batch's forward, its loss included; its backward runs outside of it."""
        return nullcontext()

    def seeds(self, seeds: list[Tensor]) -> list[Tensor]:
        """The gradients that one backward starts from."""
        return seeds

    def unscale(self, optimizers: Sequence[Optimizer]) -> None:
        """Undo, once per window, what `seeds` did, on the gradients of these optimizers."""

    def update(self) -> None:
        """The window is over, applied or skipped."""

    def cancel(self) -> None:
        """The window is given up; as if it had never begun."""

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        if state != {}:
            raise StateError(
                f"precision {self.name!r}",
                given=repr(state),
                expected="none: this precision keeps no state",
                fix='build the TrainStep with the precision it was saved with, for instance precision="fp16"',
            )


class Bf16(Precision):
    """bfloat16 autocast (https://docs.pytorch.org/docs/stable/amp.html). Weights and gradients keep their dtype."""

    name = "bf16"
    autocast = torch.bfloat16

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def forward(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device_type, self.autocast)


class Fp16(Precision):
    """float16 autocast with a dynamic loss scale, constant within a window, taken out once at its end.

    Args:
        device_type: "cuda" or "cpu".
        scaler: a scaler of your own settings; by default torch's with torch's settings
            (https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling).
    """

    name = "fp16"
    autocast = torch.float16
    rescales = True

    def __init__(self, device_type: str, scaler: torch.amp.GradScaler | None = None) -> None:
        self._device_type = device_type
        self.scaler = torch.amp.GradScaler(device_type) if scaler is None else scaler
        self._unscaled = False

    def forward(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device_type, self.autocast)

    def seeds(self, seeds: list[Tensor]) -> list[Tensor]:
        # In fp32: the product of a scale of 2^16 and a weight would overflow a 16-bit seed.
        return [self.scaler.scale(seed.float()).to(seed.dtype) for seed in seeds]

    def unscale(self, optimizers: Sequence[Optimizer]) -> None:
        self.scaler.scale(torch.zeros((), device=self._device_type))  # sets it up where no loss has been scaled yet
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        for group in self.groups():  # an infinity in one rank's piece lowers the scale of all
            for state in self.scaler._per_optimizer_states.values():  # pyright: ignore[reportPrivateUsage]
                for found in state["found_inf_per_device"].values():
                    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        self._unscaled = True

    def update(self) -> None:
        if self._unscaled:  # a window without weight says nothing about the scale
            self.scaler.update()
        self._unscaled = False

    def cancel(self) -> None:
        if self._unscaled:
            self.scaler.update(self.scaler.get_scale())
        self._unscaled = False

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected = self.scaler.state_dict()
        if (
            not isinstance(state, Mapping)
            or state.keys() != expected.keys()
            or not all(is_number(value) and value >= 0 for value in state.values())
        ):
            raise StateError(
                'precision "fp16"',
                given=repr(state),
                expected=f"the loss scaler's state: finite numbers >= 0 for {sorted(expected)}",
                fix='load a state that was saved with precision="fp16"',
            )
        self.scaler.load_state_dict(dict(state))


def make_precision(precision: object, device: torch.device) -> Precision:
    """The precision for a name or a `Precision` object.

    ```pycon
    >>> make_precision("bf16", torch.device("cpu")).name
    'bf16'

    ```
    """
    if isinstance(precision, Precision):
        return precision
    if precision == "fp32":
        return Precision()
    if precision == "bf16":
        return Bf16(device.type)
    if precision == "fp16":
        return Fp16(device.type)
    raise ArgumentError(
        "precision",
        given=repr(precision),
        expected='"fp32" (the model\'s own dtypes), "bf16", "fp16" or a Precision object',
        fix='pass precision="bf16" for bfloat16 autocast',
    )
