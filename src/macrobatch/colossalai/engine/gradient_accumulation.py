"""The optimizer, loader, scheduler and handler of accumulation: views of one window, which the optimizer has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from macrobatch.core.accumulation import Accumulation
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.precision import Precision
from macrobatch.core.weighting import make_policy
from macrobatch.core.window import Tail, Window
from macrobatch.data.lookahead import lookahead
from macrobatch.errors import ArgumentError, MacrobatchError
from macrobatch.sync import make_sync
from macrobatch.tree import num_rows

__all__ = [
    "GradAccumDataloader",
    "GradAccumGradientHandler",
    "GradAccumLrSchedulerByStep",
    "GradAccumOptimizer",
    "accumulate_gradient",
]


class GradAccumOptimizer(Optimizer):
    """An optimizer that steps when its window is full; otherwise the one that it wraps.

    A micro-iteration begins with the first of `zero_grad`, a forward of the engine and `backward`, and ends with
    `step`. Whether it is the last of its window is known when it begins. Every attribute of the wrapped optimizer is
    there.

    Args:
        optim: to wrap.
        accumulate_size: micro-iterations of a full window, an integer >= 1.
        model: what is trained; synchronised over ranks, if there are several.
        precision: for its loss scale.
        replays: whether the model is compiled into CUDA graphs.
    """

    def __init__(
        self,
        optim: Optimizer,
        accumulate_size: int,
        model: nn.Module | None = None,
        precision: Precision | None = None,
        *,
        replays: bool = False,
    ) -> None:
        # Optimizer.__init__ is left out: parameters and state are the wrapped optimizer's.
        self.optim = optim
        module = nn.Module() if model is None else model
        sync = make_sync("auto", module, overlaps=not replays)
        self._replays = replays
        self.window = Window(accumulate_size)
        self.accumulation = Accumulation(
            module,
            GradientBuffer(self._parameters, header=sync.header, widens=sync.widens),
            optimizers=lambda: [optim],
            window=self.window,
            policy=lambda: make_policy("exact"),
            precision=Precision() if precision is None else precision,
            sync=sync,
        )
        self.num_samples: int | None = None
        """Of the batch at hand: what its loss is a mean over; None if nobody has told."""
        self.is_end_of_data = False
        """Whether the batch at hand is the last one."""
        self.is_training = True
        """Whether passes over a loader are for training: others leave the window alone."""
        self.is_resumed = False
        """Whether the next pass over a loader goes on with the window under way, instead of giving it up."""
        self.has_updated = False
        """Whether the last micro-iteration ended in an update."""
        self.has_closed = False
        """Whether the last micro-iteration was the last of its window, in which ranks meet and hosts wait anyway."""
        self.num_iterations = 0
        """Micro-iterations so far."""
        self.accumulation.begin()

    def __getattr__(self, name: str) -> Any:
        if name == "optim":
            raise AttributeError(name)
        return getattr(self.optim, name)

    def __repr__(self) -> str:
        return repr(self.optim)

    @property
    def accumulate_size(self) -> int:
        """Micro-iterations of a full window."""
        return self.window.size

    @property
    def accumulate_step(self) -> int:
        """Micro-iterations in the window so far."""
        self.accumulation.settle()
        return self.window.num_pending

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's."""
        return self.optim.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's."""
        return self.optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's."""
        return self.optim.defaults

    def begin(self) -> None:
        """A micro-iteration begins, unless it has."""
        if not self.accumulation.is_inside:
            if self._replays:  # what earlier ones returned has been copied out
                torch.compiler.cudagraph_mark_step_begin()
            self.accumulation.enter(end_of_data=self.is_end_of_data)

    def zero_grad(self, *_: Any, **__: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A micro-iteration begins. Gradients are cleared when a window does."""
        self.begin()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a mean over the batch's samples. Several of one micro-iteration add up as losses do.

        If it fails half-way, as for lack of memory, this rank's part of the window is given up: the next
        micro-iteration goes on with the rest of the window.
        """
        self.begin()
        try:
            self.accumulation.backward(loss, num_samples=self.num_samples or 1)
        except MacrobatchError:  # refused before anything was added
            raise
        except BaseException:
            self.fail()
            raise

    def backward_by_grad(self, tensor: Tensor, grad: Tensor) -> None:
        """Add the gradient of the loss whose gradient with respect to `tensor` is `grad`."""
        self.backward((tensor * grad.detach()).sum())

    def clip_grad_norm(self, model: nn.Module | None, max_norm: float) -> Tensor | None:
        """Clip the window's gradient, when it is complete; 0 does not clip. Returns the norm before, 0-d."""
        if not self.accumulation.is_last or not max_norm:
            return None
        return self.accumulation.clip_norm(max_norm)

    def step(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The micro-iteration is over; after the last one of a window, update.

        Returns:
            What the wrapped optimizer returns; None if there was no update.
        """
        accumulation = self.accumulation
        if not accumulation.is_inside:
            return self.optim.step(*args)
        result, self.has_updated, self.has_closed = None, False, accumulation.is_last
        try:
            if accumulation.is_last:
                with accumulation.lent_to([self.optim]) as self.has_updated:
                    if self.has_updated:
                        result = self.optim.step(*args)
        except BaseException:
            self.fail()
            raise
        accumulation.leave()
        self.num_iterations += 1
        self.num_samples = None
        return result

    def fail(self) -> None:
        """The micro-iteration ended in an error: what this rank has of the window is given up."""
        self.accumulation.fail()
        self.num_samples = None

    def start_pass(self) -> None:
        """A pass over the data begins. A window that a `break` has left behind is given up, a resumed one is not."""
        if not self.is_resumed:
            self.discard()
        self.is_resumed = False

    def discard(self) -> None:
        """Give up the window under way."""
        if self.accumulation.is_inside:
            self.fail()
        self.accumulation.settle()
        if self.window.num_pending:
            self.accumulation.discard()
        self.num_samples, self.is_end_of_data = None, False

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the wrapped optimizer."""
        self.optim.load_state_dict(state_dict)

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.optim.param_groups for param in group["params"]]


class GradAccumDataloader:
    """A loader that tells windows which batch is its last, and how many samples each has.

    A pass over it while the engine evaluates is one over the wrapped loader, and nothing else.

    Args:
        dataloader: any iterable of batches. One of this class is shared: it tells its own optimizers and this one.
        accumulate_size: micro-iterations of a full window.
        optimizer: whose window it feeds.
        tail: what becomes of the last batches, if they do not fill a window: "apply" them as a short one, with its
            own exact mean, or "drop" them.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        accumulate_size: int,
        optimizer: GradAccumOptimizer | None = None,
        tail: Tail = "apply",
    ) -> None:
        if tail not in ("apply", "drop"):
            raise ArgumentError("tail", given=repr(tail), expected='"apply" or "drop"', fix='leave it at "apply"')
        self._optimizers = [] if optimizer is None else [optimizer]
        if isinstance(dataloader, GradAccumDataloader):
            self._optimizers += dataloader._optimizers
            dataloader = dataloader.dataloader
        self.dataloader = dataloader
        self.accumulate_size = Window(accumulate_size).size
        self.tail = tail

    def __getattr__(self, name: str) -> Any:
        if name == "dataloader":
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch that are trained on."""
        num = len(self.dataloader)  # pyright: ignore[reportArgumentType]
        return num - num % self.accumulate_size if self.tail == "drop" else num

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        told = [optimizer for optimizer in self._optimizers if optimizer.is_training]
        if self._optimizers and not told:
            yield from self.dataloader
            return
        for optimizer in told:
            optimizer.start_pass()
        batches = self._full_windows() if self.tail == "drop" else lookahead(self.dataloader)
        try:
            for batch, is_last in batches:
                for optimizer in told:
                    optimizer.num_samples, optimizer.is_end_of_data = samples_of(batch), is_last
                yield batch
        finally:
            for optimizer in told:
                optimizer.is_end_of_data = False

    def _full_windows(self) -> Iterator[tuple[Any, bool]]:
        held: list[Any] = []
        for batch in self.dataloader:
            held.append(batch)
            if len(held) == self.accumulate_size:
                yield from ((each, False) for each in held)
                held = []


class GradAccumLrSchedulerByStep:
    """A scheduler that moves with updates if it is stepped in every micro-iteration, and else with every call.

    A call after one micro-iteration since the call before is one of a loop over batches: it counts if that
    micro-iteration made an update. A call after several, or none, is one of a loop over epochs, and counts as it is.
    """

    def __init__(self, lr_scheduler: Any, accumulate_size: int, optimizer: GradAccumOptimizer | None = None) -> None:
        self.lr_scheduler = lr_scheduler
        self.accumulate_size = Window(accumulate_size).size
        self._optimizer = optimizer
        self._num_iterations = 0
        self._num_calls = 0

    def __getattr__(self, name: str) -> Any:
        if name == "lr_scheduler":
            raise AttributeError(name)
        return getattr(self.lr_scheduler, name)

    @staticmethod
    def compute_effective_steps_per_epoch(dataloader: Any, accumulate_size: int) -> int:
        """Updates of an epoch: what `total_steps` counts for a scheduler that is stepped in every micro-iteration."""
        num = len(dataloader)
        return num // accumulate_size if getattr(dataloader, "tail", "apply") == "drop" else -(-num // accumulate_size)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move, if it is time."""
        if self._optimizer is None:
            self._num_calls += 1
            is_due = self._num_calls % self.accumulate_size == 0
        else:
            passed = self._optimizer.num_iterations - self._num_iterations
            self._num_iterations = self._optimizer.num_iterations
            is_due = passed != 1 or self._optimizer.has_updated
        if is_due:
            self.lr_scheduler.step(*args, **kwargs)

    def get_lr(self) -> Any:
        """The wrapped scheduler's."""
        return self.lr_scheduler.get_lr()

    def get_last_lr(self) -> list[float]:
        """Learning rates in use."""
        return self.lr_scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped scheduler's."""
        return self.lr_scheduler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Into the wrapped scheduler."""
        self.lr_scheduler.load_state_dict(state_dict)


class GradAccumGradientHandler:
    """A handler of gradients that is called once per window."""

    def __init__(self, grad_handler: Any, accumulate_size: int, optimizer: GradAccumOptimizer | None = None) -> None:
        self.grad_handler = grad_handler
        self.accumulate_size = Window(accumulate_size).size
        self._optimizer = optimizer
        self._num_calls = 0

    def handle_gradient(self) -> None:
        """Pass the call on, if the window is complete."""
        self._num_calls += 1
        if self._optimizer is None:
            is_due = self._num_calls % self.accumulate_size == 0
        else:
            is_due = self._optimizer.accumulation.is_last
            if is_due:
                self._optimizer.accumulation.finish()
        if is_due:
            self.grad_handler.handle_gradient()


def accumulate_gradient(
    model: nn.Module,
    optimizer: Optimizer,
    dataloader: Iterable[Any] | None,
    accumulate_size: int,
    gradient_handlers: Sequence[Any] | None = None,
    lr_scheduler: Any = None,
) -> tuple[GradAccumOptimizer, Any, list[Any] | None, Any]:
    """Optimizer, loader, gradient handlers and scheduler, as views of one window.

    Args:
        model: what is trained.
        accumulate_size: micro-iterations of a full window, an integer >= 1.
    """
    accumulating = GradAccumOptimizer(optimizer, accumulate_size, model)
    handlers = None
    if gradient_handlers is not None:
        handlers = [GradAccumGradientHandler(each, accumulate_size, accumulating) for each in gradient_handlers]
    loader = None if dataloader is None else GradAccumDataloader(dataloader, accumulate_size, accumulating)
    scheduler = lr_scheduler
    if lr_scheduler is not None:
        scheduler = GradAccumLrSchedulerByStep(lr_scheduler, accumulate_size, accumulating)
    return accumulating, loader, handlers, scheduler


def samples_of(batch: Any) -> int:
    """How many samples a batch has; 1 if it does not say."""
    try:
        return num_rows(batch)
    except Exception:
        first = batch[0] if isinstance(batch, list | tuple) and batch else batch
        return len(first) if isinstance(first, torch.Tensor) and first.ndim else 1
