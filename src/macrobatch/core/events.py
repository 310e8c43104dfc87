"""What a window tells those who listen: small frozen records, sent to any callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from macrobatch.errors import ArgumentError

__all__ = ["Event", "Listener", "MicroBatchDone", "Skipped", "Updated", "on"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchDone(Event):
    """The backward of one micro-batch is queued. `index` counts from 0 in its window."""

    index: int
    is_last: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Updated(Event):
    """The optimizer and the scheduler have moved. `result` is the window's `StepResult`; `num_updates` counts it."""

    result: Any
    num_updates: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped(Event):
    """The window was closed and no update was made; neither optimizer nor scheduler moved.

    `reason` is one of "no weight" (nothing to average over), "not finite" and "overflow" (fp16 loss scale too high).
    """

    result: Any
    reason: str


class Listener(Protocol):
    """Anything that takes an event. It is called in the training thread: reading a tensor there waits for it."""

    def __call__(self, event: Event, /) -> None: ...


E = TypeVar("E", bound=Event)


def on(kind: type[E], action: Callable[[E], object]) -> Listener:
    """A listener for one kind of event.

    Raises:
        ArgumentError: `kind` is no kind of event, or `action` no function.

    ```pycon
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    >>> listener = on(Updated, lambda event: average.update_parameters(model))  # an EMA that moves once per update

    ```
    """
    given: object = kind
    if not isinstance(given, type) or not issubclass(given, Event):
        raise ArgumentError("kind", given=repr(given), expected="a kind of event", fix="pass mb.Updated, for example")
    if not callable(action):
        raise ArgumentError("action", given=repr(action), expected="a function of an event", fix="pass print, to see")

    def listen(event: Event) -> None:
        if isinstance(event, kind):
            action(event)

    return listen
