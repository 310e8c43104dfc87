"""What a forward changes besides gradients: module buffers and random number generators, to be put back when a window
is refused or replayed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RngStates", "Snapshot", "rng_states", "set_rng_states"]

RngStates = tuple[Tensor, Tensor | None]


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

    __slots__ = ("_buffers", "_device", "_rng")

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._rng = rng_states(device)

    def restore(self) -> None:
        """Put everything back as it was, buffers that were replaced by others included."""
        with torch.no_grad():
            for module, name, buffer, saved in self._buffers:
                buffer.copy_(saved)
                setattr(module, name, buffer)
        set_rng_states(self._device, self._rng)


def rng_states(device: torch.device) -> RngStates:
    """States of the host's default generator and of the device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_rng_states(device: torch.device, states: RngStates) -> None:
    """Put the default generators back."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
