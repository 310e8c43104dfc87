"""Which size of micro-batch to take, from a few that are tried: the largest that fits, then the fastest below it.

Memory grows along a line: what is there in any case, plus so much for each sample. The line through the two largest
sizes that were tried says which one would just fit; that one is tried next, until the line has nothing to add.

```text
peak(n) = fixed + n · per_unit ≤ limit        the largest n, found by trying 2, 4, 8 and where the line points
window(n) = ceil(N / n) · seconds(n)          the smallest, over sizes that cut N evenly
```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from macrobatch.checks import is_integer

__all__ = ["Survey", "Trial", "describe", "find_fastest", "find_largest", "memory_line"]

_FIRST = (2, 4, 8)  # BatchNorm refuses a single sample in training
_MAX_LEAP = 8  # times the largest size so far: the line through small sizes is not to be trusted far away
_MAX_TRIALS = 16
_MAX_TIMED = 6
_CLEARLY = 1.05


class Trial(NamedTuple):
    """One size that was tried.

    Attributes:
        size: samples in the micro-batch, or tokens.
        peak_bytes: most memory it took, all that was there included; None if it did not fit.
        seconds: of its forward and backward; None if that was not measured.
        compiled_s: the same, compiled, under capture="auto"; infinite if it ran out of memory or was not trusted.
    """

    size: int
    peak_bytes: int | None
    seconds: float | None = None
    compiled_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What was tried, and what was chosen.

    Attributes:
        trials: by size.
        unit: what a size counts, "samples" or "tokens".
        total: of the macro-batch (this rank's share of it), in that unit.
        limit_bytes: what a micro-batch may take; None if nobody knows.
        reserved_bytes: kept free for the optimizer's state, beside the limit.
        largest: size that fits.
        size: that was chosen.
        reason: for it, in a few words.
        compiled_s: of a micro-batch of that size when it is compiled, if that is clearly faster and was left to choose.
    """

    trials: Sequence[Trial]
    unit: str
    total: int
    limit_bytes: int | None
    reserved_bytes: int
    largest: int
    size: int
    reason: str
    compiled_s: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of a micro-batch of the chosen size, as it is going to be run."""
        return self.compiled_s or next(trial.seconds for trial in self.trials if trial.size == self.size)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return {name: getattr(self, name) for name in self.__slots__} | {"trials": [list(t) for t in self.trials]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Survey:
        """From what `as_dict` returned.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        trials = [Trial(int(size), _whole(peak), *map(_number, times)) for size, peak, *times in values["trials"]]
        fields: dict[str, Any] = {**values, "trials": trials}
        survey = cls(**fields)
        sizes = [trial.size for trial in trials]
        whole = (survey.size, survey.largest, survey.total, survey.reserved_bytes)
        if not all(type(number) is int and number >= 0 for number in whole) or survey.size not in sizes:
            raise ValueError("sizes that were never tried")
        if survey.unit not in ("samples", "tokens") or not isinstance(survey.reason, str) or survey.size < 1:
            raise ValueError("no survey")
        _whole(survey.limit_bytes)
        _number(survey.compiled_s)
        return survey


def describe(survey: Survey, *, is_remembered: bool = False) -> str:
    """One line about what was tried and chosen."""
    speed = f", {survey.size / survey.seconds:.4g} {survey.unit}/s" if survey.seconds else ""
    limit = "" if survey.limit_bytes is None else f" of a limit of {survey.limit_bytes / 1e6:,.4g} MB"
    source = "as remembered" if is_remembered else f"{len(survey.trials)} sizes tried"
    compiled = [str(trial.size) for trial in survey.trials if trial.compiled_s is not None]
    if compiled and not is_remembered:
        source += f", {' and '.join(compiled)} compiled" + " in vain" * (survey.compiled_s is None)
    return f"{survey.size} {survey.unit}{speed} ({survey.reason}; {survey.largest} would fit{limit}; {source})"


def memory_line(trials: Sequence[Trial]) -> tuple[float, float]:
    """Fixed bytes and bytes per unit, through the two largest trials that fitted.

    ```pycon
    >>> memory_line([Trial(2, 120), Trial(4, 140), Trial(8, None)])
    (100.0, 10.0)

    ```
    """
    points = sorted((trial.size, trial.peak_bytes) for trial in trials if trial.peak_bytes is not None)[-2:]
    if len(points) < 2:
        return (float(points[0][1]), 0.0) if points else (0.0, 0.0)
    (x0, y0), (x1, y1) = points
    slope = max((y1 - y0) / (x1 - x0), 0.0)
    return y1 - slope * x1, slope


def find_largest(peak_bytes: Callable[[int], int | None], *, smallest: int, total: int, limit_bytes: int | None) -> int:
    """The largest size that stays below a limit; 0 if none does.

    Args:
        peak_bytes: tries a size; None if there was not enough memory for it.
        smallest: size there is.
        total: the largest that makes sense: all of the macro-batch.
        limit_bytes: None if there is none.

    ```pycon
    >>> find_largest(lambda n: 100 + 7 * n, smallest=1, total=500, limit_bytes=1000)  # 100 + 7 · 128 = 996
    128

    ```
    """
    limit = math.inf if limit_bytes is None else limit_bytes
    trials: list[Trial] = []
    low, high = 0, total + 1

    def fits(size: int) -> bool:
        peak = peak_bytes(size)
        trials.append(Trial(size, peak))
        return peak is not None and peak <= limit

    for size in dict.fromkeys(min(max(first * smallest, smallest), total) for first in _FIRST):
        if not fits(size):
            high = size
            break
        low = size
    if not low and high > smallest:  # not even the first
        if fits(smallest):
            low = smallest
        else:
            high = smallest
    while low and high - low > 1 and len(trials) < _MAX_TRIALS:
        fixed, slope = memory_line([trial for trial in trials if trial.size <= low])
        predicted = total if slope == 0 or limit == math.inf else int((limit - fixed) // slope)
        size = min(max(predicted, low + 1), low * _MAX_LEAP, total)
        if size >= high:  # the line was wrong
            size = (low + high) // 2
        if fits(size):
            low = size
        else:
            high = size
    return low


def find_fastest(
    seconds: Callable[[int], float], *, largest: int, candidates: Iterator[tuple[int, int]], most: int = _MAX_TIMED
) -> tuple[dict[int, float], int]:
    """The size with which a window is over soonest, and the seconds of a micro-batch of each that was tried.

    Args:
        seconds: measures a micro-batch of a size.
        largest: what is taken if there is no candidate.
        candidates: sizes, each with its number of micro-batches in a window, the largest first. Asked for until they
            get clearly slower, twice in a row.
        most: of them to measure.
    """
    times: dict[int, float] = {}
    best, best_s, num_slower = largest, math.inf, 0
    for size, num in candidates:
        times[size] = seconds(size)
        window_s = num * times[size]
        num_slower = num_slower + 1 if window_s > _CLEARLY * best_s else 0
        if window_s < best_s:
            best, best_s = size, window_s
        if num_slower == 2 or len(times) == most:
            break
    return times, best


def _whole(number: Any) -> int | None:
    if number is not None and not is_integer(number, 0):
        raise ValueError(f"{number!r} is no number of bytes")
    return number


def _number(number: Any) -> float | None:
    return None if number is None else float(number)
