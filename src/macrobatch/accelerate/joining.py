"""Ranks that run out of data at different times: who has none left takes part in the others' windows with nothing."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from macrobatch.accelerate.windows import FedWindow, Windows
from macrobatch.core.weighting import Plan
from macrobatch.errors import ArgumentError
from macrobatch.sync.peers import Peers

__all__ = ["evened", "joined"]


class _Roll:
    """Calls the roll at the start of every window: is there a rank that still has data?"""

    def __init__(self, window: FedWindow) -> None:
        self._window = window
        self._plan = window.sync.plan
        self._is_here = True

    def call(self) -> bool:
        """Whether any rank is here. All ranks call together."""
        here = torch.tensor(float(self._is_here), device=self._window.parameters()[0].device)
        dist.all_reduce(here)
        return bool(here.item())

    def plan(self, plan: Plan) -> Plan:
        """In place of the sync's own."""
        if self._is_here:
            self.call()
        return self._plan(plan)

    def follow(self) -> None:
        """Without data: take part in windows until nobody has any."""
        self._window.settle()
        self._window.discard()
        self._is_here = False
        while self.call():
            self._window.enter(end_of_data=True)
            self._window.leave()


@contextmanager
def joined(windows: Windows, loaders: Sequence[Any], accelerator: Any, *, even_batches: bool | None) -> Generator[None]:
    """The context of `Accelerator.join_uneven_inputs`.

    At its end the rank that made the most updates hands on parameters, module buffers, and the state of optimizers and
    schedulers, so that all go on from one state.

    Raises:
        ArgumentError: the model's forward is a collective itself.
    """
    if accelerator.num_processes == 1:
        yield
        return
    window = windows.of(())
    window.begin()
    if not window.sync.streams:
        raise ArgumentError(
            "join_uneven_inputs",
            given="a model that is wrapped in DistributedDataParallel, or sharded: a rank without data would have to "
            "run its forward",
            expected="the model as prepare returns it by default",
            fix="leave DistributedDataParallelKwargs or the FSDP plugin out, or keep even_batches=True",
        )
    roll = _Roll(window)
    window.sync.plan = roll.plan
    try:
        with evened(loaders, even_batches):
            yield
            roll.follow()
            _level(window, accelerator)
    finally:
        del window.sync.plan


@contextmanager
def evened(loaders: Sequence[Any], even_batches: bool | None) -> Generator[None]:
    """Context in which loaders fill up their last batches, or do not; None leaves them as they are."""
    samplers: list[Any] = [getattr(loader, "batch_sampler", None) for loader in loaders]
    settable = [sampler for sampler in samplers if even_batches is not None and hasattr(sampler, "even_batches")]
    if even_batches is not None and len(settable) < len(loaders):
        warnings.warn(
            "join_uneven_inputs: given even_batches with a loader that has no such setting; expected loaders of "
            "indices, as it is only supported for map-style datasets. To fix it, leave even_batches out.",
            stacklevel=6,
        )
    before = [sampler.even_batches for sampler in settable]
    for sampler in settable:
        sampler.even_batches = even_batches
    try:
        yield
    finally:
        for sampler, was_even in zip(settable, before, strict=True):
            sampler.even_batches = was_even


def _level(window: FedWindow, accelerator: Any) -> None:
    window.settle()
    counts: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(counts, window.window.num_updates)
    source = counts.index(max(counts))
    model_tensors = [tensor for model in window.models for tensor in (*model.parameters(), *model.buffers())]
    Peers(None, accelerator.device).broadcast([*window.parameters(), *model_tensors], source=source)
    holders = [*accelerator._optimizers, *accelerator._schedulers]
    states = [[holder.state_dict() for holder in holders] if accelerator.process_index == source else None]
    dist.broadcast_object_list(states, source)
    if accelerator.process_index != source and states[0] is not None:
        for holder, state in zip(holders, states[0], strict=True):
            holder.load_state_dict(state)
    window.window.num_updates = counts[source]
