"""Copies to the device that run beside the work on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from macrobatch import tree
from macrobatch.data.lookahead import lookahead
from macrobatch.data.source import Piece

__all__ = ["on_device"]


def on_device(pieces: Iterable[Piece], device: torch.device | None) -> Iterator[Piece]:
    """The pieces on a device. To a CUDA device one piece is copied ahead of its use, on a stream of its own.

    For the host, or None, there is nothing to do and nothing is drawn ahead.

    Source:
        https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html, and for memory that is made on one stream
        and used on another https://docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html
    """
    if device is None or device.type == "cpu":
        yield from pieces
    elif device.type == "cuda":
        yield from _beside(pieces, device)
    else:
        for piece in pieces:
            yield piece._replace(batch=tree.to_device(piece.batch, device))


def _beside(pieces: Iterable[Piece], device: torch.device) -> Iterator[Piece]:
    device = torch.empty(0, device=device).device  # with its index, which "cuda" lacks
    for (piece, arrived), _ in lookahead(_copies(pieces, device)):
        # An event and not the stream: the stream is busy with the next piece already.
        stream = torch.cuda.current_stream(device)
        stream.wait_event(arrived)
        for leaf in tree.leaves(piece.batch):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(stream)
        yield piece


def _copies(pieces: Iterable[Piece], device: torch.device) -> Iterator[tuple[Piece, Any]]:
    stream = torch.cuda.Stream(device)
    for piece in pieces:
        with torch.cuda.stream(stream):
            copy = piece._replace(batch=tree.to_device(piece.batch, device))
            arrived = stream.record_event()
        yield copy, arrived
