"""A progress bar over macro-batches: window loss, learning rate, throughput, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from tqdm import tqdm

from macrobatch import tree
from macrobatch.core.events import Event, Listener, Skipped, Updated
from macrobatch.core.result import StepResult
from macrobatch.errors import ArgumentError

__all__ = ["track"]

T = TypeVar("T")
Unit = Literal["samples", "tokens"]


class Tracked(Protocol):
    """What `track` needs of a step; `TrainStep` has it."""

    optimizers: Any

    @property
    def listeners(self) -> list[Listener]: ...


def track(
    loader: Iterable[T],
    step: Tracked | None = None,
    *,
    unit: Unit = "samples",
    desc: str | None = None,
    refresh_s: float = 0.5,
    **options: Any,
) -> Iterator[T]:
    """Iterate over macro-batches with a bar that follows a step.

    It looks at the loss at most every `refresh_s` seconds, so that watching costs no wait per update. Leaving the loop
    early, by `break` or by an exception, closes the bar.

    Args:
        loader: macro-batches.
        step: the `TrainStep` they are given to; without one, the bar knows samples and memory only.
        unit: "samples" counts rows; "tokens" counts what the loss was averaged over (its weight).
        desc: a word in front.
        refresh_s: seconds between looks, > 0.
        **options: passed on to `tqdm` (https://tqdm.github.io/docs/tqdm/).

    ```pycon
    >>> from macrobatch import TrainStep
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = TrainStep(model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=4)
    >>> for batch in track([torch.ones(8, 2)] * 3, step, disable=True):
    ...     result = step(batch)

    ```
    """
    if unit not in get_args(Unit):
        raise ArgumentError("unit", given=unit, expected='"samples" or "tokens"', fix='pass unit="samples"')
    return _tracked(loader, step, _Meter(step, unit, refresh_s), tqdm(loader, desc=desc, unit="window", **options))


def _tracked(loader: Iterable[T], step: Tracked | None, meter: _Meter, bar: tqdm[T]) -> Iterator[T]:
    if step is not None:
        step.listeners.append(meter)
    try:
        for batch in bar:
            yield batch
            if step is None:
                meter.num_samples += tree.num_rows(batch)
            meter.show(bar)
        meter.show(bar, now=True)
    finally:
        if step is not None:
            step.listeners.remove(meter)
        bar.close()


class _Meter:
    """Listens to a step and turns what it heard into the bar's text."""

    def __init__(self, step: Tracked | None, unit: Unit, refresh_s: float) -> None:
        self._step = step
        self._unit = unit
        self._refresh_s = refresh_s
        self._unread: list[StepResult] = []
        self._num_tokens = 0.0
        self._num_skipped = 0
        self._began_s = self._shown_s = time.perf_counter()
        self.num_samples = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Updated | Skipped):
            self._num_skipped += isinstance(event, Skipped)
            self.num_samples += event.result.num_samples
            if self._unit == "samples":
                self._unread.clear()  # of the loss, only the last is shown
            self._unread.append(event.result)

    def show(self, bar: tqdm[Any], *, now: bool = False) -> None:
        """Refresh the bar, if it is time."""
        at_s = time.perf_counter()
        if bar.disable or (at_s - self._shown_s < self._refresh_s and not now):
            return
        self._shown_s = at_s
        shown: dict[str, str] = {}
        if self._unread:
            shown["loss"] = f"{self._unread[-1].loss:.4g}"
        if self._unit == "tokens":
            self._num_tokens += sum(result.weight for result in self._unread)
            self._unread = self._unread[-1:] if now else []
        if self._step is not None:
            shown["lr"] = f"{float(self._step.optimizers[0].param_groups[0]['lr']):.3g}"
        count = self._num_tokens if self._unit == "tokens" else self.num_samples
        shown[f"{self._unit}/s"] = _short(count / max(at_s - self._began_s, 1e-9))
        shown["mem"] = f"{_short(_peak_bytes())}B"
        if self._num_skipped:
            shown["skipped"] = str(self._num_skipped)
        bar.set_postfix(shown)


def _short(value: float) -> str:
    prefixes = iter("kMGT")
    prefix = ""
    while value >= 1000:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g}{prefix}"


def _peak_bytes() -> int:
    """Most memory in use so far: on the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
