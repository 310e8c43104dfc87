"""Copies to the device that run beside the work on it, one piece ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from macrobatch.core.arrival import Arrivals
from macrobatch.data.lookahead import lookahead
from macrobatch.data.source import Piece

__all__ = ["on_device"]


def on_device(pieces: Iterable[Piece], device: torch.device | None) -> Iterator[Piece]:
    """The pieces on a device. To a CUDA device one piece is copied ahead of its use, on a stream of its own.

    For the host, or None, there is nothing to do and nothing is drawn ahead.
    """
    if device is None or device.type == "cpu":
        yield from pieces
        return
    arrivals = Arrivals(device)
    copies = ((piece, arrivals.start(piece.batch)) for piece in pieces)
    for piece, arrival in (each for each, _ in lookahead(copies)) if device.type == "cuda" else copies:
        yield piece._replace(batch=arrival.ready())
