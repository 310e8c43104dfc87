"""A progress bar over macro-batches: window loss, learning rate, throughput, memory."""

from __future__ import annotations

import math
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

__all__ = ["open_bar", "track"]

T = TypeVar("T")
Unit = Literal["samples", "tokens"]

_REFRESH_S = 0.5
_LINES_S = 30.0  # a log of a day has to stay readable
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


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
    refresh_s: float | None = None,
    **options: Any,
) -> Iterator[T]:
    """Iterate over macro-batches with a bar that follows a step.

    It looks at the loss at most every `refresh_s` seconds, so that watching costs no wait per update. Leaving the loop
    early, by `break` or by an exception, closes the bar. Where there is no terminal, in a log file for one, it writes
    plain lines instead, seldom.

    Args:
        loader: macro-batches.
        step: the `TrainStep` they are given to; without one, the bar knows samples and memory only.
        unit: "samples" counts rows; "tokens" counts what the loss was averaged over (its weight).
        desc: a word in front.
        refresh_s: seconds between looks, > 0; by default 0.5, and 30 where there is no terminal.
        **options: passed on to `tqdm` (https://tqdm.github.io/docs/tqdm/).

    Raises:
        ArgumentError: an argument is out of its domain.

    ```pycon
    >>> from macrobatch import TrainStep
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = TrainStep(model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=4)
    >>> for batch in track([torch.ones(8, 2)] * 3, step, disable=True):
    ...     result = step(batch)

    ```
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ArgumentError(
            "loader", given=repr(loader), expected="an iterable of macro-batches", fix="pass the DataLoader itself"
        )
    if unit not in get_args(Unit):
        raise ArgumentError("unit", given=repr(unit), expected='"samples" or "tokens"', fix='pass unit="samples"')
    if refresh_s is None:
        refresh_s = _REFRESH_S if _overwrites(options.get("file") or sys.stderr) else _LINES_S
    elif isinstance(refresh_s, bool) or not isinstance(refresh_s, int | float) or not refresh_s > 0:
        raise ArgumentError("refresh_s", given=repr(refresh_s), expected="a number > 0, in seconds", fix="leave it out")
    if step is not None and not hasattr(step, "listeners"):
        raise ArgumentError("step", given=type(step).__name__, expected="a TrainStep or None", fix="pass the TrainStep")
    options.setdefault("total", _length(loader))
    if not _overwrites(options.get("file") or sys.stderr):
        options.setdefault("mininterval", math.inf)  # a line is written by the meter only, with all that it knows
    return _tracked(loader, step, _Meter(step, unit, refresh_s), open_bar(desc=desc, **options))


def open_bar(iterable: Iterable[Any] | None = None, *, file: Any = None, **options: Any) -> tqdm[Any]:
    """tqdm's bar over windows; where `file` (stderr by default) is not a terminal, plain lines, seldom."""
    file = file or sys.stderr
    if not _overwrites(file):
        lines: dict[str, Any] = {"mininterval": _LINES_S, "maxinterval": _LINES_S, "delay": 1e-9, "position": 0}
        lines["bar_format"] = _LINE if options.get("desc") else _LINE.removeprefix("{desc}: ")
        options, file = lines | options, _Lines(file)
    return tqdm(iterable, file=file, unit="window", **options)


def _overwrites(file: Any) -> bool:
    """Whether a carriage return takes what is written back to the start of its line: terminals, and notebooks."""
    isatty = getattr(file, "isatty", None)
    return (isatty is not None and isatty()) or type(file).__module__.startswith("ipykernel.")


class _Lines:
    """A file in which each state of a bar is a line of its own."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """What tqdm writes begins with a carriage return, and ends with blanks over what was longer before."""
        text = text.strip()
        if text:
            self._file.write(f"{text}\n")

    def flush(self) -> None:
        if hasattr(self._file, "flush"):
            self._file.flush()

    def isatty(self) -> bool:
        return False


def _tracked(loader: Iterable[T], step: Tracked | None, meter: _Meter, bar: tqdm[Any]) -> Iterator[T]:
    if step is not None and not bar.disable:
        step.listeners.append(meter)
    try:
        for batch in loader:
            yield batch
            if step is None and batch is not None:  # an empty share
                meter.num_samples += tree.num_rows(batch)
            bar.update()
            meter.show(bar)
    finally:
        if meter in (() if step is None else step.listeners):
            step.listeners.remove(meter)  # pyright: ignore[reportOptionalMemberAccess]
        meter.show(bar, at_end=True)
        bar.close()


class _Meter:
    """Listens to a step and turns what it heard into the bar's text."""

    def __init__(self, step: Tracked | None, unit: Unit, refresh_s: float) -> None:
        self._step = step
        self._unit = unit
        self._refresh_s = refresh_s
        self._last: StepResult | None = None
        self._unread: list[StepResult] = []
        self._num_tokens = 0.0
        self._num_skipped = 0
        self._began_s = self._shown_s = time.perf_counter()
        self.num_samples = 0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Updated | Skipped):
            return
        self._num_skipped += isinstance(event, Skipped)
        self.num_samples += event.result.num_samples
        self._last = event.result
        if self._unit == "tokens":
            self._unread.append(event.result)
            if len(self._unread) >= 64:  # a bar that is hardly ever refreshed does not keep them all
                self._count_tokens()

    def show(self, bar: tqdm[Any], *, at_end: bool = False) -> None:
        """Refresh the bar, if it is time; at the end, leave that to its closing."""
        at_s = time.perf_counter()
        if bar.disable or (at_s - self._shown_s < self._refresh_s and not at_end):
            return
        self._shown_s = at_s
        shown: list[str] = []
        if self._last is not None:
            shown.append(f"loss={self._last.loss:.4g}")
        if self._step is not None:
            shown.append(f"lr={float(self._step.optimizers[0].param_groups[0]['lr']):.3g}")
        self._count_tokens()
        count = self._num_tokens if self._unit == "tokens" else self.num_samples
        shown.append(f"{_short(count / max(at_s - self._began_s, 1e-9))} {self._unit}/s")
        shown.append(f"{_short(_peak_bytes(self._step))}B")
        if self._num_skipped:
            shown.append(f"{self._num_skipped} skipped")
        bar.set_postfix_str(", ".join(shown), refresh=not at_end)

    def _count_tokens(self) -> None:
        self._num_tokens += sum(result.weight for result in self._unread)
        self._unread.clear()


def _length(loader: object) -> int | None:
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:  # a DataLoader has a __len__ that raises where its dataset has none
        return None


def _short(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        text = f"{value:.3g}"
        if float(text) < 1000 or prefix == "T":
            return text + prefix
        value /= 1000
    raise AssertionError


def _peak_bytes(step: Tracked | None) -> int:
    """Most memory in use so far: on the device that is trained on, else of this process."""
    groups = [] if step is None else step.optimizers[0].param_groups
    for device in {param.device for group in groups for param in group["params"] if param.is_cuda}:
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
