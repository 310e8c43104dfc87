"""A window whose micro-batches come one by one, from a loop that is not ours.

The loop says where a micro-batch begins and ends, calls `backward` in it, and asks for the gradient when it wants to
clip or to step; `core.step` is the counterpart that is handed a whole window. Both stand on the same parts.

```text
  enter ─▶ backward × n ─▶ leave        a micro-batch that is not the last: nothing else happens
  enter ─▶ backward × n ─▶ [finish ─▶ clip* ─▶ lend* ] ─▶ leave     the last: leave finishes if nobody did
  backward × n ─▶ finish …              outside of enter and leave: a window of one micro-batch
```
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch.core.autograd import backward
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.handover import check_saved, pending_of, restore
from macrobatch.core.loss import Loss, Weight
from macrobatch.core.precision import Precision
from macrobatch.core.tally import Seeds, Tally
from macrobatch.core.weighting import Normalize, Plan
from macrobatch.core.window import Window
from macrobatch.errors import LossError, WindowError
from macrobatch.sync.base import Sync

__all__ = ["Accumulation"]


class Accumulation:
    """One window after the other, driven from outside.

    Equivalent plain loop, if all micro-batches were alike: `(loss / window.size).backward()` for each of them, then
    `optimizer.step()` and `optimizer.zero_grad()`.

    Args:
        model: what is synchronised besides the gradients: its parameters at the start, its buffers.
        gradients: of all that the window trains.
        optimizers: called for those that the gradients are for, at the close of a window.
        window: its size and its counters.
        policy: called at the start of each window for what to divide by.
        precision: for its loss scale; autocast is the loop's own business.
        sync: how ranks agree.

    ```pycon
    >>> from macrobatch.core.weighting import Exact
    >>> model = nn.Linear(1, 1, bias=False)
    >>> parts = {"window": Window(2), "policy": Exact, "precision": Precision(), "sync": Sync()}
    >>> accumulation = Accumulation(model, GradientBuffer(model.parameters), optimizers=list, **parts)
    >>> for batch in (torch.tensor([[1.0]]), torch.tensor([[2.0], [6.0]])):
    ...     with accumulation.micro_batch():
    ...         accumulation.backward(model(batch).mean(), num_samples=len(batch))
    >>> model.weight.grad  # (1 + 2 + 6) / 3
    tensor([[3.]])

    ```
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: GradientBuffer,
        *,
        optimizers: Callable[[], Sequence[Optimizer]],
        window: Window,
        policy: Callable[[], Normalize],
        precision: Precision,
        sync: Sync,
    ) -> None:
        self.gradients = gradients
        self.window = window
        self.precision = precision
        precision.groups = gradients.groups
        self.sync = sync
        self.skip: str | None = None
        """Why the finished window must not become an update, if it must not: "no weight", "overflow", "given up"."""
        self._model = model
        self._optimizers = optimizers
        self._policy = policy
        self._seeds = Seeds()
        self._tally: Tally | None = None
        self._num_samples = 1
        self._plan: Plan | None = None
        self._is_weighted: bool | None = None
        self._num_backwards = 0
        self.is_inside = False
        """Whether a micro-batch has been entered and not left."""
        self.is_final = False
        """Whether every `.grad` is the window's gradient."""
        self._is_applied = False
        self._has_begun = False
        self._is_reducing = False
        self._context: AbstractContextManager[Any] | None = None

    @property
    def is_held(self) -> bool:
        """Whether a backward outside of a micro-batch is to be followed by more before the gradient is needed."""
        return False

    @property
    def is_last(self) -> bool:
        """Whether the current micro-batch is the last of its window."""
        return self.window.is_closed

    @property
    def is_pending(self) -> bool:
        """Whether a window has been begun and not finished."""
        return not self.is_final and self.window.num_pending > 0

    def begin(self) -> None:
        """Make the ranks equal, at the latest before the first micro-batch's forward."""
        if not self._has_begun:
            self.sync.begin(self._model, self.gradients)
            self._has_begun = True

    @contextmanager
    def micro_batch(self, *, end_of_data: bool = False) -> Generator[None]:
        """`enter`, then `leave` or `fail`."""
        self.enter(end_of_data=end_of_data)
        try:
            yield
        except BaseException:
            self.fail()
            raise
        self.leave()

    def enter(self, *, end_of_data: bool = False) -> bool:
        """A micro-batch begins. True if it is the last of its window. Raises WindowError if another has not ended."""
        if self.is_inside:
            raise WindowError(
                "a micro-batch",
                given="one that begins within another of the same window",
                expected="one after the other",
                fix="leave the first block before the second",
            )
        self.settle()
        is_last = self.window.admit(end_of_data=end_of_data)
        self.is_inside = True
        self._begin(is_last)
        return is_last

    def leave(self) -> None:
        """The micro-batch is over. If it was the last, the gradient is finished, used or not."""
        self.is_inside = False
        if self.is_last:
            self.finish()
        self._end_context()

    def fail(self) -> None:
        """The micro-batch ended in an error. What this rank has of the window is given up; the others hear of it if
        this was the last micro-batch, and else get a window without this rank's part."""
        self.is_inside = False
        self._end_context()
        if self.is_last and not self.is_final:
            self._opened(None, 1)
            self.sync.close(self.gradients, None)
        if self.is_last:
            self.window.discard()
        self._forget()
        self._give_up()

    def backward(self, loss: Tensor, *, weight: Weight | None = None, num_samples: int = 1, **options: Any) -> None:
        """Add the gradient of a loss.

        Several losses of one micro-batch add up as the losses would, and their samples count once.

        Args:
            loss: 0-d; a mean over the micro-batch's samples or, with a weight, a sum over `weight` items.
            weight: number of items, >= 0, a number or a 0-d tensor; of several losses, the weights add up.
            num_samples: of the micro-batch; ignored with a weight.
            options: as for `torch.autograd.backward`.

        Raises:
            LossError: not a loss, or one of the window's losses has a weight and another has not.
            WindowError: the window's gradient has been taken already.
        """
        self.settle()
        if self.is_final:
            raise WindowError(
                "backward",
                given="a loss for a window whose gradient has been clipped, or used in an update, already",
                expected="all backwards of a micro-batch before the optimizer's step and before clipping",
                fix="begin a new micro-batch for it: one accumulate block for each step of the optimizer",
            )
        if not self.window.num_pending:  # outside of a micro-batch: a window of its own
            self.window.admit(end_of_data=True)
            self._begin(is_last=not self.is_held)
        if self._is_weighted not in (None, weight is not None):
            raise LossError(
                "the loss",
                given="some losses of a window with a weight, and others without",
                expected="a weight with every one, or with none",
                fix="pass weight= to every backward of the window; 0 for a term over items that are counted already",
            )
        tally = self._opened(weight, num_samples)
        if weight is None and self._num_backwards:
            tensors, seeds = tally.join(loss)
        else:
            output: Any = loss if weight is None else Loss(loss, weight)
            tensors, seeds = tally.admit(output, self._num_samples)
        self._is_weighted = weight is not None
        self._num_backwards += 1
        seeds = self.precision.seeds(seeds)
        if tensors and options:
            torch.autograd.backward(tensors, seeds, **options)
        elif tensors:
            backward(tensors, seeds)

    def finish(self) -> None:
        """Make every `.grad` the window's gradient, over all ranks: once per window, at the first call.

        Raises:
            LossError: gradients, but no loss whose backward was counted.
            PeerError: another rank failed.
        """
        if self.is_final or not self.window.num_pending:
            return
        if self.is_inside and not self.is_last:
            raise WindowError(
                "the gradient",
                given="a request for it in a micro-batch that is not the last of its window",
                expected="one in the last micro-batch, or after it",
                fix="ask whether this micro-batch is the last before clipping or stepping",
            )
        self.window.finish()
        self._end_context()
        is_uncounted = self._tally is None and self.gradients.holds_strays()
        tally = self._opened(None, 1)
        if not self._is_reducing:  # nobody knew that its latest backward would be the last
            self.sync.bring_in(self.gradients, keeps=True)
            self.sync.take_up(self.gradients)
        self.sync.close(self.gradients, None if is_uncounted else tally)
        if is_uncounted:
            self.window.discard()
            self._forget()
            raise LossError(
                "the window",
                given="gradients of a backward that nobody counted",
                expected="every loss of the window to go through the same backward",
                fix="replace loss.backward() by the accelerator's, engine's or accumulation's backward(loss)",
            )
        self.is_final = True
        weights = tally.weights()
        used = any(slot.used for slot in self.gradients.slots)
        if not used or not any(map(float, weights.values())):  # of one on the device, the window's only wait
            self.skip = "no weight"
            return
        self.precision.unscale(self._optimizers())
        factor = tally.correction(weights)
        if isinstance(factor, Tensor) or factor != 1.0:
            self.gradients.scale_(factor)
        if self.precision.rescales and not torch.isfinite(self.gradients.norm()):
            self.skip = "overflow"

    def clip_norm(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Finish, and scale the gradient down to a norm of at most `max_norm`. Returns its norm before, 0-d."""
        self.finish()
        norm = self.gradients.norm(norm_type)
        self.gradients.scale_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    @contextmanager
    def lent_to(self, optimizers: Sequence[Optimizer]) -> Generator[bool]:
        """Finish, and give the gradients to these optimizers for the time of their step.

        Yields:
            Whether there is an update to make; False if the window is to be skipped.
        """
        self.finish()
        if self.skip is not None:
            yield False
            return
        with self.gradients.lent_to(optimizers):
            yield True
        self._is_applied = self.is_final

    def discard(self) -> None:
        """Give up what is pending: gradients, weights and the place in the window. A finished gradient is taken away.

        Inside a micro-batch the place in the window stays, so that it still ends on all ranks together.
        """
        if self.is_inside and not self.is_last:
            self._forget()
        elif self.is_inside:
            self.finish()
            self.skip = self.skip or "given up"
        elif not self.is_final:
            self._end_context()
            self.window.discard()
            self._forget()
        self._give_up()

    def empty(self, params: Collection[int]) -> None:
        """Take back what the window has added to some parameters, given by their `id`."""
        self.sync.bring_in(self.gradients, keeps=True)
        self.gradients.empty(params)

    def settle(self) -> None:
        """Count a finished window as what it became: an update, or skipped."""
        if not self.is_final or self.is_inside:
            return
        self.window.applied() if self._is_applied else self.window.skipped()
        self.precision.update()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The window under way, gradients included, as tensors and plain values of this rank. In a micro-batch, what
        its end will leave; a window that was used ends with the call.

        Raises:
            WindowError: the micro-batch's backward, or update, is still to come.
        """
        is_done = (self._is_applied or self.skip is not None) if self.is_last else self._num_backwards > 0
        if self.is_inside and not is_done:
            raise WindowError(
                "state_dict",
                given="a call from within a micro-batch whose backward or update is still to come",
                expected="one at its end, or between two micro-batches",
                fix="save after the optimizer's step, or after the block of the micro-batch",
            )
        self.is_inside = self.is_inside and not self.is_final
        self.settle()
        is_begun = self._tally is not None and self.is_pending
        self.sync.bring_in(self.gradients, keeps=is_begun)
        pending = None
        if self._tally is not None and is_begun:
            pending = pending_of(self._tally, self.gradients, is_weighted=self._is_weighted)
        return {"window": self.window.state_dict(), "precision": self.precision.state_dict(), "pending": pending}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise StateError for a state that `load_state_dict` could not take over."""
        self.settle()
        if self._tally is None:
            self.gradients.start()  # lays the buffer out, which the check needs
        check_saved(state, self.gradients)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved window was. Refused as a whole if a part does not fit.

        Raises:
            StateError: what is wrong with it.
        """
        self.check_state_dict(state)
        self.precision.load_state_dict(state["precision"])
        self._give_up()
        self.gradients.start()
        self.window.load_state_dict(state["window"])
        self._forget()
        if (pending := state["pending"]) is None:
            return
        self._tally = Tally(self._policy(), guess=1.0, num_micro_batches=self.window.size, seeds=self._seeds)
        self._tally.load_state_dict(pending["tally"], self.gradients.slots[0].local.device)
        self._is_weighted = pending["is_weighted"]
        restore(self.gradients, pending["gradients"])
        self.sync.take_up(self.gradients)

    def _opened(self, weight: Weight | None, num_samples: int) -> Tally:
        """The window's tally, begun with its first loss."""
        if not self._num_backwards:
            self._num_samples = num_samples
        if self._tally is None:
            typical = num_samples if weight is None or isinstance(weight, Tensor) else weight
            self._plan = self._plan or self.sync.plan(Plan(self.window.size, typical * self.window.size, lends=False))
            self.gradients.start()
            guess, num = self._plan.guess, self._plan.num_micro_batches
            self._tally = Tally(self._policy(), guess=guess, num_micro_batches=num, seeds=self._seeds)
        return self._tally

    def _give_up(self) -> None:
        """What this rank has added to the window is nowhere any longer."""
        self.sync.bring_in(self.gradients, keeps=False)
        self.gradients.clear()

    def _begin(self, is_last: bool) -> None:
        self.begin()
        self._num_backwards = 0
        self._is_reducing = is_last
        self._context = self.sync.micro_batch(self.gradients, is_last=is_last)
        self._context.__enter__()

    def _end_context(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            context.__exit__(None, None, None)

    def _forget(self) -> None:
        self._tally = self._is_weighted = self._plan = None
        self._num_backwards = 0
        self.is_final = self._is_applied = self._is_reducing = False
        self.skip = None
