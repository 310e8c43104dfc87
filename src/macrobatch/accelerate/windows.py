"""Which window a micro-batch belongs to: what is trained together has one, fed by the loaders that are being read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch.accelerate.gradient_state import GradientState, Reading
from macrobatch.core.accumulation import Accumulation
from macrobatch.core.autograd import set_gradient
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.leaves import reaches
from macrobatch.core.precision import Precision
from macrobatch.core.weighting import Constant, Normalize, make_policy
from macrobatch.core.window import Window
from macrobatch.errors import WindowError
from macrobatch.sync import make_sync

__all__ = ["FedWindow", "Windows", "restricted"]


_FORGOTTEN = (
    "optimizer.step: given one backward outside of any accumulate block; expected, with "
    "gradient_accumulation_steps={}, `with accelerator.accumulate(model):` around each micro-batch. To fix it, put the "
    "loop's body into such a block, or leave gradient_accumulation_steps at 1. This step was made with the whole "
    "gradient of its one micro-batch."
)


class FedWindow(Accumulation):
    """A window, and what it knows of the loaders that feed it. As a context, one micro-batch of it."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        *,
        state: GradientState,
        precision: Precision,
        world_size: int,
        overlaps: bool,
    ) -> None:
        model = models[0] if len(models) == 1 else nn.ModuleList(models)
        sync = make_sync("auto", model, overlaps=overlaps, is_lean=state.sync_each_batch)
        self.optimizers = list(optimizers)
        self.models = list(models)
        self.state = state
        self.num_rows = 1
        self.num_holds = 0
        self._world_size = world_size
        self._serial = self._serial_before = 0
        self._num_entries = 0
        self._num_entries_before = 1.0
        """Micro-batches made of each row of the loader's batch before: more than one if the loop cuts it up."""
        self._is_by_hand = False
        """Whether the pending window is of backwards outside of any block, added up as they are and divided by N."""
        self._adds_up_by_hand = False
        """Whether the loop has ever done more than one backward for a step outside of any block."""
        self._kept = self._unused()
        super().__init__(
            model,
            GradientBuffer(
                self.parameters, header=sync.header, widens=sync.widens and (state.widens or sync.has_peers)
            ),
            optimizers=lambda: self.optimizers,
            window=Window(state.num_steps),
            policy=self._normalize,
            precision=precision,
            sync=sync,
        )

    def parameters(self) -> list[Tensor]:
        """Those of its optimizers or, without one, of its models."""
        if self.optimizers:
            return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        return [param for model in self.models for param in model.parameters()]

    @property
    def is_held(self) -> bool:
        """More is to come in `no_sync`, while `sync_gradients` is set to False, or for another optimizer."""
        return self.num_holds > 0 or self.state.is_held or len(self.optimizers) > 1

    @property
    def is_accumulating(self) -> bool:
        """Whether there is more to come before a step, which would do nothing now."""
        return (self.is_pending and not self.window.is_closed) or self.state.is_held

    @property
    def has_lost_its_loader(self) -> bool:
        """Whether the loader that fed the pending micro-batches is not being read any more."""
        return self._serial > 0 and not any(reading.serial >= self._serial for reading in self.state.readings)

    def __enter__(self) -> FedWindow:
        self.take_batch()
        self.window.size = self.state.num_steps
        try:
            is_last = self.enter(end_of_data=self.state.sync_with_dataloader and self._ends_here())
        except WindowError as error:
            raise self._waiting(error) from None
        self.state.show(is_last)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.leave()
        else:
            self.fail()

    def _waiting(self, error: WindowError) -> WindowError:
        """Why a block cannot begin: in the words of a script, if a backward before it is the cause."""
        if self.is_inside or not (self.is_pending and self.window.is_closed):
            return error
        self._num_entries -= 1  # as if this block had not been
        return WindowError(
            "accumulate",
            given="a block while the gradients of a backward outside of any block are waiting for their step",
            expected="these used, or given up, before a window begins",
            fix="call optimizer.step() or optimizer.zero_grad() first, or move that backward into a block",
        )

    def begin_outside(self, *, is_weighted: bool) -> None:
        """A window begins with a backward outside of any block: of a loop that decides by itself when to step."""
        self.settle()
        self.take_batch()
        self._is_by_hand = not is_weighted and (self.state.num_steps > 1 or self.num_holds > 0 or self.state.is_held)

    def settle(self) -> None:
        """As its base; but gradients that a script's own optimizer has not used yet are kept, to be added to."""
        if self.is_final and not self.is_inside:
            self._kept = self._unused()
        super().settle()

    def release(self) -> None:
        """Give the parameters back to whoever trains them next. What a script's own optimizer has not used yet stays
        in their `.grad`: on this rank, if it was not reduced.

        Raises:
            WindowError: the window is under way.
        """
        self.settle()
        if self.is_inside or (self.is_pending and (self.optimizers or not self._is_by_hand)):
            raise WindowError(
                "accumulate",
                given="models that belong to another window, which is under way, too",
                expected="windows that share nothing, or one after the other",
                fix="name the same models in every accumulate block, or call optimizer.zero_grad() in between",
            )
        scale = self._world_size if self.is_pending and self.sync.has_peers else 1
        unused = self._unused()
        self.gradients.release()
        for param, gradient in unused:
            set_gradient(param, gradient.mul_(scale).to(param.dtype))

    def _unused(self) -> list[tuple[Tensor, Tensor]]:
        """Gradients that a script's own optimizer may still want."""
        params = [] if self.optimizers else self.parameters()
        return [(param, param.grad.clone()) for param in params if param.grad is not None]

    def finish(self) -> None:
        """As its base; outside of blocks, the sum of the backwards is divided by N, as the original does. A loop with
        one backward for each step, in which `accumulate` was forgotten, gets that whole, and is told so."""
        if self.is_final or not self.window.num_pending:
            return
        num_backwards, is_by_hand = self._num_backwards, self._is_by_hand and not self.is_inside
        super().finish()
        self._is_by_hand = False
        if is_by_hand and self.optimizers and self.state.num_steps > 1:
            self._adds_up_by_hand = self._adds_up_by_hand or num_backwards > 1
            if not self._adds_up_by_hand and self.state.normalize != "constant":
                warnings.warn(_FORGOTTEN.format(self.state.num_steps), stacklevel=4)
                self.gradients.scale_(float(self.state.num_steps))
        for param, gradient in self._kept:
            param.grad = gradient if param.grad is None else param.grad.add_(gradient)
        self._kept = []

    def state_dict(self) -> dict[str, Any]:
        """As its base, and how the window is counted."""
        return {**super().state_dict(), "is_by_hand": self._is_by_hand}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """As its base."""
        own = isinstance(state, Mapping) and "is_by_hand" in state  # pyright: ignore[reportUnnecessaryIsInstance]
        super().check_state_dict({name: state[name] for name in state if name != "is_by_hand"} if own else state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As its base."""
        self.check_state_dict(state)
        self._is_by_hand = bool(state.get("is_by_hand", False))  # which the policy goes by
        super().load_state_dict({name: value for name, value in state.items() if name != "is_by_hand"})

    def take_batch(self) -> None:
        """Notice which batch is at hand, and how often it has been used."""
        fresh = self._fresh()
        if fresh:
            self._num_entries_before = max(self._num_entries, 1) / max(self.num_rows, 1)
            if not self._serial:
                self._num_entries_before = 0.0
            self._num_entries = 0
            self._serial_before = self._serial
            self._serial = max(reading.serial for reading in fresh)
            self.num_rows = max(fresh[0].num_rows, 1)
        self._num_entries += 1

    def _fresh(self) -> list[Reading]:
        return [reading for reading in self.state.readings if reading.serial > self._serial]

    def _ends_here(self) -> bool:
        """Whether this micro-batch is the last of a loader: of its last batch or, if the loop cuts batches up, of as
        many as the batch before was cut into."""
        current = [reading for reading in self.state.readings if reading.serial > self._serial_before]
        expected = math.ceil(self._num_entries_before * self.num_rows)
        return self._num_entries >= expected and any(reading.is_at_end for reading in current)

    def _normalize(self) -> Normalize:
        normalize = self.state.normalize
        if normalize == "constant" or self._is_by_hand:
            return Constant(self.state.num_steps * (self._world_size if self.sync.has_peers else 1))
        return make_policy(normalize)


class Windows:
    """The windows of one accelerator: one for all that is trained, or one for each set of models named together.

    Args:
        state: settings of accumulation.
        precision: called for the loss scale of a new window, with whether it is the first.
        world_size: number of processes.
        overlaps: reduce during the last backward. Not for replayed ones, which add into fixed addresses.
    """

    def __init__(
        self, state: GradientState, precision: Callable[[bool], Precision], world_size: int, *, overlaps: bool = True
    ) -> None:
        self.state = state
        self.models: list[nn.Module] = []
        self.optimizers: list[Optimizer] = []
        self._precision = precision
        self._world_size = world_size
        self._overlaps = overlaps
        self.made: dict[frozenset[int], FedWindow] = {}
        """Those that exist, by the ids of their optimizers."""
        self._known: dict[tuple[int, ...], FedWindow] = {}
        self._by_optimizer: dict[int, FedWindow] = {}
        self._own: set[int] = set()
        """Ids of what is trained, as of a window's first micro-batch."""
        self._way: list[int] = []
        """From the latest loss to one of these."""

    @property
    def all(self) -> list[FedWindow]:
        """Those that exist."""
        return list(self.made.values())

    def add(self, *, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Something more is trained. What windows there are stay for as long as they are asked for."""
        if model is not None and not any(model is known for known in self.models):
            self.models.append(model)
        if optimizer is not None and not any(optimizer is known for known in self.optimizers):
            self.optimizers.append(optimizer)
        self._forget_answers()

    def of(self, models: tuple[Any, ...]) -> FedWindow:
        """The window of these models and of the optimizers that train them; without models, of everything."""
        key = tuple(map(id, models))
        if key not in self._known:
            self._known[key] = self._find(models)
        return self._known[key]

    def trains(self, loss: Tensor, inside: FedWindow | None) -> bool:
        """Whether a loss is a window's business: not if it adds to nothing that was prepared, nor, outside of blocks
        and in one process, if the script steps an optimizer of its own.

        Args:
            inside: the window of the block around its backward, if there is one.
        """
        if inside is None and not (self.optimizers or (self._world_size > 1 and (self.models or self.made))):
            return False
        window = inside or self.of(())
        for each in self.made.values():
            if each.sync.substitutes:
                return True
        if not self._own or window.window.num_pending <= 1:
            params = (id(param) for each in self.all for param in each.parameters())
            self._own = _ids_of(*self.optimizers) or set(params)
        return reaches(loss, self._own, self._way)

    def of_optimizer(self, optimizer: Optimizer) -> FedWindow:
        """The window that an optimizer steps for."""
        window = self._by_optimizer.get(id(optimizer))
        if window is None:
            steps = (w for w in self.made.values() if any(optimizer is known for known in w.optimizers))
            window = self._by_optimizer[id(optimizer)] = next(steps, None) or self.of(())
        return window

    def clear(self) -> None:
        """Forget all models, optimizers and windows; gradients are given back."""
        for window in self.made.values():
            window.gradients.release()
        self.made.clear()
        self._forget_answers()
        self.models.clear()
        self.optimizers.clear()

    def _forget_answers(self) -> None:
        self._known.clear()
        self._by_optimizer.clear()
        self._own.clear()

    def _find(self, models: tuple[Any, ...]) -> FedWindow:
        named = [model for model in models if isinstance(model, nn.Module)]
        ids = {id(param) for model in named for param in model.parameters()}
        optimizers = [optimizer for optimizer in self.optimizers if ids & _ids_of(optimizer)]
        if not optimizers:
            optimizers = self.optimizers
        if len(optimizers) == len(self.optimizers):
            named = self.models or named
        key = frozenset(map(id, optimizers or named))
        if key not in self.made:
            for other in [other for other in self.made if other & key or not other or not key]:
                self._retire(other)
            self.made[key] = FedWindow(
                named,
                optimizers,
                state=self.state,
                precision=self._precision(not self.made),
                world_size=self._world_size,
                overlaps=self._overlaps,
            )
            self.made[key].begin()
            self._by_optimizer.clear()
            self._own.clear()
        return self.made[key]

    def _retire(self, key: frozenset[int]) -> None:
        self.made[key].release()
        del self.made[key]
        self._forget_answers()


def _ids_of(*optimizers: Optimizer) -> set[int]:
    return {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}


def restricted(window: FedWindow, windows: Windows) -> dict[str, Any]:
    """What keeps a backward out of the gradients of other windows, if there are others."""
    if len(windows.made) < 2:
        return {}
    params = [param for param in window.parameters() if param.requires_grad]
    return {"inputs": params} if params else {}
