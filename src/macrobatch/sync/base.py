"""What a window asks of the ranks. The base class is one process: there is nobody to agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.tally import Tally
from macrobatch.core.twopass import Alone
from macrobatch.core.weighting import Plan
from macrobatch.ranks import Ranks

__all__ = ["Again", "LocalSync", "Sync"]


class Again(Exception):
    """The window has to be run once more: a micro-batch did not fit into memory, on this rank or on another.

    Args:
        micro_batches: what to run; None if it was on another rank, and this one runs the same again.
    """

    def __init__(self, micro_batches: Any = None) -> None:
        super().__init__("out of memory")
        self.micro_batches = micro_batches


class Sync:
    """A strategy that makes one gradient of what the ranks have. This one is for a single process.

    A subclass overrides what differs. In the order in which a window calls them:

    1. `begin`, once, before the first window;
    2. `plan`, at the start of every window;
    3. `micro_batch`, around the forward and the backward of every micro-batch;
    4. `close`, after the last backward, or after an error; `catch_up` and `again`, if the window is to run once more.

    Sums travel: gradients and weights are added up over ranks and divided once, by the caller.
    """

    has_peers = False
    """Whether other ranks take part, so that this one's share of a window may be empty."""

    overlaps = True
    """Whether it may work during the last backward; not where that may be a replay, which autograd knows nothing of."""

    streams = True
    """Whether a rank may begin a window without knowing how many micro-batches it has."""

    among = Alone()
    """How ranks put their representations together, where a loss couples the macro-batch."""

    widens = True
    """Whether 16-bit parameters may have gradients in float32."""

    in_step = False
    """Whether no rank runs a micro-batch without the others, so that all of them run a window again together."""

    substitutes = False
    """Whether forwards may use other tensors in place of the parameters, so that autograd knows those instead."""

    def ranks(self, model: nn.Module) -> Ranks:
        """This process among those that share a macro-batch."""
        return Ranks()

    def repeats(self, model: nn.Module) -> bool:
        """Whether a window can be run again after a micro-batch that did not fit into memory."""
        return True

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The least of each number over ranks that run in step; the numbers as they are, where each runs for itself.

        Raises:
            PeerError: another rank has failed.
        """
        return list(numbers)

    def begin(self, model: nn.Module, gradients: GradientBuffer) -> None:
        """Make parameters and module buffers equal on all ranks."""

    def header(self, num_parameters: int) -> int:
        """How many numbers travel in front of the gradients."""
        return 0

    def plan(self, plan: Plan) -> Plan:
        """What all ranks together know of a window, from what this rank knows of its share."""
        return plan

    def micro_batch(self, gradients: GradientBuffer, *, is_last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch."""
        return _NOTHING

    def bring_in(self, gradients: GradientBuffer, *, keeps: bool) -> None:
        """Between two micro-batches, before parameters and buffer are saved or the window closes unforeseen: what is
        held elsewhere comes into them. All ranks call it.

        Args:
            keeps: what there is of a window; else there is none, or this rank gives it up.
        """

    def take_up(self, gradients: GradientBuffer) -> None:
        """Between two micro-batches: the buffer has what was saved of a window, perhaps by another process."""

    def stand_ins(self) -> dict[int, Tensor]:
        """From the `id` of what a model shows in a parameter's place at times, the parameter."""
        return {}

    def close(self, gradients: GradientBuffer, tally: Tally | None) -> None:
        """Add up gradients and tally over ranks, and find which parameters any rank used.

        Args:
            gradients: collected on this rank.
            tally: of this rank; None if it failed, which the others then hear.

        Raises:
            PeerError: another rank failed; no rank's window counts.
            Again: another rank has called `again` after some of its gradients had left.
        """
        if tally is not None:
            gradients.collect()

    def catch_up(self, gradients: GradientBuffer, rest: Callable[[], object]) -> None:
        """A micro-batch of this rank has run out of memory. Where the others wait for it, do what they wait for.

        Args:
            gradients: the window's, of no use any longer.
            rest: runs that micro-batch again, and those after it, with next to nothing in them.
        """

    def again(self, gradients: GradientBuffer) -> None:
        """This rank's micro-batches are too large and it will run the window again; the others need to hear of it
        only if they have gradients of it already, or run in step."""


LocalSync = Sync

_NOTHING = nullcontext()
