"""What a forward changes besides gradients: module buffers and random number generators, to be put back when a window
is refused or replayed; and whether its micro-batches are still what they were."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.errors import LossError, WindowError

__all__ = ["RngStates", "Snapshot", "check_unchanged", "rng_states", "same_bits", "set_rng_states", "versions_of"]


TorchStates = tuple[Tensor, Tensor | None]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RngStates(NamedTuple):
    """States of all default generators that a forward may draw from."""

    torch: TorchStates
    python: tuple[Any, ...]
    numpy: Any


class Snapshot:
    """A model's buffers (BatchNorm statistics, for one) and the generators of its device at one moment.

    ```pycon
    >>> norm = nn.BatchNorm1d(2)
    >>> before = Snapshot(norm, torch.device("cpu"))
    >>> _ = norm(torch.randn(4, 2))
    >>> before.restore()
    >>> int(norm.num_batches_tracked)
    0

    ```
    """

    __slots__ = ("_buffers", "_device", "_torch")

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()  # pyright: ignore[reportPrivateUsage]
        ]
        self._torch = torch_states(device)

    def restore(self) -> None:
        """Put everything back as it was."""
        self.restore_buffers()
        set_torch_states(self._device, self._torch)

    def restore_buffers(self) -> None:
        """Put the buffers back, those that were replaced by others included."""
        with torch.no_grad():
            for module, name, buffer, saved in self._buffers:
                # One that did not change is left alone: a graph may still need it, and not every tensor can be written.
                if buffer is None or saved is None:
                    pass
                elif buffer.shape != saved.shape:
                    buffer.set_(saved.clone())  # pyright: ignore[reportArgumentType]
                elif not same_bits(buffer, saved):
                    buffer.copy_(saved)
                setattr(module, name, buffer)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are alike to the last bit: 0.0 is not -0.0, and a NaN is itself.

    ```pycon
    >>> zero, nan = torch.tensor(0.0), torch.tensor(torch.nan)
    >>> same_bits(zero, -zero), same_bits(nan, nan.clone())
    (False, True)

    ```
    """
    if a.layout is not torch.strided:  # torch.equal knows no other
        return False
    pair = [torch.view_as_real(each.detach().resolve_conj()) if each.is_complex() else each.detach() for each in (a, b)]
    if all(type(each) is Tensor and not each.is_quantized for each in pair):
        pair = [each.view(_BITS[each.element_size()]) for each in pair]
    return torch.equal(*pair)


def torch_states(device: torch.device) -> TorchStates:
    """States of torch's default generators, the host's and the device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_torch_states(device: torch.device, states: TorchStates) -> None:
    """Put torch's default generators back."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


def rng_states(device: torch.device) -> RngStates:
    """States of the default generators of torch, Python and NumPy: all that a replay has to draw again from."""
    generator = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
    has_tuple = isinstance(generator, np.random.MT19937)  # which takes half of a dict's 80 us
    return RngStates(torch_states(device), random.getstate(), np.random.get_state(legacy=has_tuple))


def set_rng_states(device: torch.device, states: RngStates) -> None:
    """Put all default generators back."""
    set_torch_states(device, states.torch)
    random.setstate(states.python)
    np.random.set_state(states.numpy)


def versions_of(micro_batches: Iterable[tuple[Any, int]]) -> list[int]:
    """How often each tensor of the micro-batches has been changed in place."""
    leaves = [leaf for micro_batch, _ in micro_batches for leaf in tree.leaves(micro_batch)]
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def check_unchanged(micro_batches: Iterable[tuple[Any, int]], versions: list[int] | None) -> None:
    """Refuse to run micro-batches once more that are gone, or are not what they were.

    Args:
        versions: what `versions_of` said before; None if nobody asked.

    Raises:
        WindowError: they were a stream.
        LossError: the loss function has changed them in place.
    """
    if not isinstance(micro_batches, list):
        raise WindowError(
            "the window",
            given="a stream of micro-batches",
            expected="a list: memory ran out on another rank, and all ranks have to run the window again",
            fix="pass a list of micro-batches, or the same micro_batch to the steps of all ranks",
        )
    if versions is not None and versions != versions_of(micro_batches):
        raise LossError(
            "loss_fn",
            given="a batch that it changes in place",
            expected="a batch that stays as it is: this window runs it more than once",
            fix="work on a copy, x = x / 255 instead of x.div_(255)",
        )
