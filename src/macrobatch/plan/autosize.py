"""`micro_batch="auto"`: the size of micro-batches, found out by trying, and made smaller where memory runs out.

Found out with the first macro-batch of a step: `plan.survey` says what to try, `plan.rehearsal` tries it without a
trace, `plan.cache` remembers it. When a micro-batch does not fit after all, its window starts over with half the size:
it is a list of samples in hand, so what it did (gradients, generators, module buffers, counts) can be put back as a
whole. After some windows without trouble, twice the size is tried again, up to the one that was planned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from macrobatch import env, tree
from macrobatch.core.loss import Weight
from macrobatch.core.step import MicroBatch, Step
from macrobatch.core.twopass import TwoPass
from macrobatch.core.weighting import Exact
from macrobatch.errors import ArgumentError, LossError, NoMemoryError, PeerError
from macrobatch.plan.cache import Cache
from macrobatch.plan.capture import Compiled, Way
from macrobatch.plan.identity import identity_of
from macrobatch.plan.memory import memory_of
from macrobatch.plan.rehearsal import Rehearsal, pending_state_bytes
from macrobatch.plan.split import Auto, Split
from macrobatch.plan.survey import Survey, Trial, describe, find_fastest, find_largest

__all__ = ["Autosize", "Cut", "autosized"]

_PATIENCE, _MAX_PATIENCE = 16, 1024
_MAX_TIMED, _MAX_COMPILED = 6, 3  # sizes: to compile one may take a minute
_CLEARLY_FASTER, _CLOSE = 0.95, 1.1
_LOG = logging.getLogger("macrobatch")

Expected = Callable[[Any], Mapping[str, Weight] | Weight | None]


class Autosize:
    """The size of a step's micro-batches.

    Args:
        auto: what was asked for.
        step: whose micro-batches they are.
        expected: from a macro-batch, its weights counted ahead.
        capture: how its micro-steps are captured.
        other: a way to run them that is taken where it is clearly faster, and agrees.

    Raises:
        ArgumentError: the gradient would depend on the size, or ranks could not go on after an error of one.
    """

    def __init__(self, auto: Auto, step: Step, expected: Expected, capture: object, other: Way | None = None) -> None:
        is_coupled = isinstance(step.loss_fn, TwoPass) and step.sync.has_peers
        if step.policy != Exact() or not step.sync.repeats(step.model) or is_coupled:
            raise ArgumentError(
                "micro_batch",
                given=f'"auto" with {step.policy} and {type(step.sync).__name__}' + " and TwoPass" * is_coupled,
                expected='normalize="exact", and ranks that can run a window again',
                fix="pass a number of samples that fits, for example micro_batch=16",
            )
        self.auto = auto
        self.size: int | None = None
        """Largest micro-batch that is run, in samples (or tokens); None before the first macro-batch."""
        self.survey: Survey | None = None
        """What was tried and chosen; None before the first macro-batch."""
        self._step = step
        self._expected = expected
        self._capture = capture if isinstance(capture, str | None) else type(capture).__name__
        self._other = None if step.sync.in_step else other
        self._memory = auto.memory or memory_of(step.device)
        self._cache = Cache(env.cache_folder() if auto.remembers else None)
        self._ceiling = 0
        self._num_clean = 0
        self._patience = _PATIENCE
        self._has_grown = False

    def cut(self, batch: Any) -> Cut:
        """The micro-batches of a macro-batch; None has none. With the first one, the size is found out."""
        given = [] if batch is None else [(batch, tree.num_rows(batch))]
        if self.survey is None:
            self._plan(batch)
        return Cut(self, given, is_stream=False)

    def pieces(self, micro_batch: Any, num_rows: int) -> Iterable[MicroBatch]:
        """A micro-batch as it is, or cut to the present size."""
        if self.size is None:
            return [(micro_batch, num_rows)]
        whole, least = self.auto.sizes(micro_batch, num_rows)
        return (
            [(micro_batch, num_rows)] if whole <= self.size else self.auto.of(max(self.size, least)).split(micro_batch)
        )

    def shrink(
        self, error: torch.OutOfMemoryError | None, largest: int, least: int, problem: Exception | None = None
    ) -> None:
        """A micro-batch did not fit: half of the largest of its window from now on. Of ranks that run in step, every
        one calls this, and all take the least.

        Args:
            error: of this rank; None if it happened to others.
            largest: micro-batch of the window on this rank; 0 if it had none.
            least: size that its samples can be cut to.
            problem: why it cannot run again, if so; raised when others have heard of it.

        Raises:
            NoMemoryError: it was a single sample.
            PeerError: it was, on another rank.
        """
        before = self.size or largest
        wanted = (self.size or math.inf) if error is None else max(-(-largest // 2), least)
        if problem is None and error is not None and largest <= least:
            problem = _no_memory(self.auto.unit, largest, error)
        if not self._step.sync.in_step and error is None and problem is None:
            return
        size, ceiling = self._step.sync.agree([0 if problem else wanted, -max(self._ceiling, before)])
        if problem is not None:
            raise problem
        if size < 1:
            raise PeerError(
                "the window",
                given="memory that ran out, and a rank that cannot run it again in smaller micro-batches",
                expected="room for a single sample, and batches that stay as they are; nothing was changed here",
                fix="look at the error of the rank that failed",
            )
        self.size, self._ceiling, self._num_clean = round(size), round(-ceiling), 0
        if self._has_grown:
            self._patience = min(2 * self._patience, _MAX_PATIENCE)
        self._memory.release()
        _LOG.warning(
            "micro-batch: %d %s instead of %d, since memory ran out (%s)",
            self.size,
            self.auto.unit,
            before,
            "on another rank" if error is None else _first_line(error),
        )

    def clean(self) -> None:
        """A window went through. After some of them, a larger size is tried again."""
        if self.size is None or self.size >= self._ceiling:
            return
        self._num_clean += 1
        if self._num_clean >= self._patience:
            self.size, before = min(2 * self.size, self._ceiling), self.size
            self._num_clean, self._has_grown = 0, True
            _LOG.info(
                "micro-batch: %d %s instead of %d, tried again after %d windows",
                self.size,
                self.auto.unit,
                before,
                self._patience,
            )

    def _plan(self, batch: Any) -> None:
        total, least = (0, 0) if batch is None else self.auto.sizes(batch, tree.num_rows(batch))
        self._step.begin()
        total, least = self._agreed(total, -least)
        least = -least
        if total < 1:  # some rank has nothing to try; with the next macro-batch, then
            self.size = self.size or max(least, 1)
            return
        key = identity_of(self._step, self.auto, self._memory, self._capture, batch=batch, total=total)
        remembered = self._remembered(key)
        size = 0 if remembered is None else remembered.size
        low, high = self._agreed(size, -size)
        if remembered is None or low != -high:
            remembered = None
            self.survey = self._surveyed(batch, total, least)
            self._cache.store(key, self.survey.as_dict())
        else:
            self.survey = remembered
        self.size = self._ceiling = self.survey.size
        self._take_faster_way(batch, is_remembered=remembered is not None)
        _LOG.info("micro-batch: %s", describe(self.survey, is_remembered=remembered is not None))

    def _surveyed(self, batch: Any, total: int, least: int) -> Survey:
        rehearsal = Rehearsal(self._step, self._memory, self._expected(batch))
        reserved = pending_state_bytes(self._step.update.optimizers)
        capacity = self._memory.capacity_bytes()
        (limit,) = self._agreed(
            math.inf if capacity is None else max(int(self.auto.memory_fraction * capacity) - reserved, 0)
        )
        rehearsal.peak_bytes(self._trial(batch, min(2 * least, total)))  # libraries set themselves up in a first run

        peaks: dict[int, int | None] = {}

        def peak_bytes(size: int) -> int | None:
            if size not in peaks:
                peak = rehearsal.peak_bytes(self._trial(batch, size))
                (least,) = self._agreed(-math.inf if peak is None else -peak)
                peaks[size] = None if least is None else -least
            return peaks[size]

        def seconds(size: int) -> float:
            peak_bytes(size)
            (negative,) = self._step.sync.agree([-rehearsal.seconds(self._trial(batch, size))])
            return -negative

        largest = find_largest(peak_bytes, smallest=least, total=total, limit_bytes=limit)
        if not largest:
            raise _no_memory(self.auto.unit, least, None)
        nums: dict[int, int] = {}
        most = _MAX_COMPILED if isinstance(self._step.loss_fn, Compiled) else _MAX_TIMED
        candidates = self._candidates(batch, total, least, largest, nums)
        times, _ = find_fastest(seconds, largest=largest, candidates=candidates, most=most)
        windows_s = {each: nums[each] * time_s for each, time_s in times.items()}
        size, is_compiled, compiled = self._compiled(windows_s, nums, rehearsal, lambda size: self._trial(batch, size))
        return Survey(
            trials=[Trial(each, peaks[each], times.get(each), compiled.get(each)) for each in sorted(peaks)],
            unit=self.auto.unit,
            total=total,
            limit_bytes=limit,
            reserved_bytes=reserved,
            largest=largest,
            size=size,
            reason=("the fastest of what fits" if size < total else "the fastest: all at once")
            + ", compiled" * is_compiled,
            compiled_s=compiled[size] if is_compiled else None,
        )

    def _compiled(
        self, windows_s: Mapping[int, float], nums: Mapping[int, int], rehearsal: Rehearsal, trial: Callable[[int], Any]
    ) -> tuple[int, bool, dict[int, float]]:
        """The size with which a window is over soonest, whether it is to be compiled, and the seconds of a micro-batch
        of each that was compiled: those close to the best one, unless that one does not gain by it."""
        ranked = sorted(windows_s, key=lambda each: (windows_s[each], each))
        size = fastest = ranked[0]
        is_compiled, compiled = False, dict[int, float]()
        bound_s = _CLEARLY_FASTER * windows_s[fastest]
        for each in [each for each in ranked if windows_s[each] <= _CLOSE * windows_s[fastest]][:_MAX_COMPILED]:
            if self._other is None:
                break
            compiled[each] = self._seconds_of_other(rehearsal, trial(each))
            if nums[each] * compiled[each] < bound_s:
                bound_s, size, is_compiled = nums[each] * compiled[each], each, True
            elif not is_compiled:
                break
        return (fastest, False, compiled) if self._other is None else (size, is_compiled, compiled)

    def _seconds_of_other(self, rehearsal: Rehearsal, micro_batch: Any) -> float:
        """Of a micro-batch, run the other way; infinite if there is none, or it cannot be trusted."""
        if self._other is None or not self._is_trusted(rehearsal, micro_batch):
            return math.inf
        return rehearsal.seconds(micro_batch, self._other)

    def _is_trusted(self, rehearsal: Rehearsal, micro_batch: Any) -> bool:
        assert self._other is not None
        loss_fn, _ = self._other
        try:
            differs = rehearsal.disagreement(micro_batch, loss_fn)
        except torch.OutOfMemoryError:
            self._memory.release()
            return False
        if differs is not None:
            _LOG.warning("capture: is not compiled, since %s", differs)
        if differs is not None or not getattr(loss_fn, "is_compiled", True):
            self._other = None
        return self._other is not None

    def _take_faster_way(self, batch: Any, *, is_remembered: bool) -> None:
        """Run micro-batches the other way, if that was chosen, now or in an earlier run."""
        assert self.survey is not None
        if self.survey.compiled_s is None or self._other is None:
            return
        rehearsal = Rehearsal(self._step, self._memory, self._expected(batch))
        if is_remembered and not self._is_trusted(rehearsal, self._trial(batch, self.survey.size)):
            return
        self._step.loss_fn, micro_step = self._other
        self._step.use(micro_step)

    def _agreed(self, *numbers: float) -> list[Any]:
        """The least of each over ranks that run in step, as integers; None for an infinite one."""
        return [int(n) if math.isfinite(n) else None for n in self._step.sync.agree(numbers)]

    def _candidates(
        self, batch: Any, total: int, least: int, largest: int, nums: dict[int, int]
    ) -> Iterator[tuple[int, int]]:
        """Sizes, the largest first, and how many micro-batches they make of the batch: twice as many each time. What
        was asked for is noted in `nums`."""
        num = -(-total // largest)
        seen: set[int] = set()
        while (size := min(max(-(-total // num), least), largest)) not in seen:
            seen.add(size)
            num_in_all = num if self.auto.lengths is None else len(self.auto.of(size).split(batch))
            (negative,) = self._agreed(-num_in_all)
            nums[size] = -negative
            yield size, nums[size]
            num *= 2

    def _trial(self, batch: Any, size: int) -> Any:
        """A micro-batch of a size, as a copy: a loss function may change what it is given."""
        if self.auto.lengths is None:
            return tree.select(batch, [*range(size)])
        part, _ = max(self.auto.of(size).split(batch), key=lambda each: self.auto.sizes(*each)[0])
        return tree.select(part, [*range(tree.num_rows(part))])

    def _remembered(self, key: Mapping[str, Any]) -> Survey | None:
        value = self._cache.load(key)
        if value is None:
            return None
        try:
            return Survey.from_dict(value)
        except (ValueError, TypeError, KeyError) as error:
            self._cache.complain(key, error)
            return None


class Cut:
    """A window's samples, to be run in micro-batches that fit. Each pass over it is the window from its beginning.

    Args:
        autosize: knows the size.
        given: micro-batches of any size.
        is_stream: they are read as they are needed, and what was read is kept.
    """

    def __init__(self, autosize: Autosize, given: Iterable[MicroBatch], *, is_stream: bool) -> None:
        self._autosize = autosize
        self._is_stream = is_stream
        self._rest = iter(given)
        self._kept: list[MicroBatch] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._largest = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        self._largest = 0
        for given in self._kept:
            yield from self._pieces(*given)
        for given in self._rest:
            self._kept.append(given)
            self._versions += [(leaf, leaf._version) for leaf in tree.leaves(given[0]) if _has_version(leaf)]
            yield from self._pieces(*given)

    def smaller(self, error: torch.OutOfMemoryError | None) -> Iterable[MicroBatch]:
        """The same window in smaller micro-batches: a list, or, of a stream, what it gave and then the rest of it. As
        it was, if there was no error.

        Raises:
            NoMemoryError: it had single samples already.
            LossError: the loss function has changed the samples in place.
        """
        problem = None
        if any(leaf._version != version for leaf, version in self._versions):
            problem = LossError(
                "loss_fn",
                given="a batch that it changes in place",
                expected="a batch that stays as it is: memory ran out, and this window has to run again",
                fix="work on a copy, x = x / 255 instead of x.div_(255)",
            )
        least = max([self._autosize.auto.sizes(*given)[1] for given in self._kept], default=1)
        self._autosize.shrink(error, self._largest, least, problem)
        return self if self._is_stream else [*self]

    def clean(self) -> None:
        """The window went through."""
        self._autosize.clean()

    def _pieces(self, micro_batch: Any, num_rows: int) -> Iterator[MicroBatch]:
        for piece, rows in self._autosize.pieces(micro_batch, num_rows):
            self._largest = max(self._largest, self._autosize.auto.sizes(piece, rows)[0])
            yield piece, rows


def autosized(
    split: Split | Auto, step: Step, expected: Expected, capture: object, other: Way | None
) -> Split | Autosize:
    """What cuts a step's macro-batches."""
    return Autosize(split, step, expected, capture, other) if isinstance(split, Auto) else split


def _no_memory(unit: str, size: int, error: BaseException | None) -> NoMemoryError:
    what = "a single sample" if unit == "samples" else f"a single sample of {size} tokens"
    return NoMemoryError(
        "the micro-batch",
        given=f"{what}, which does not fit into memory" + (f" ({_first_line(error)})" if error else ""),
        expected="room for one; nothing was changed",
        fix='make less of it: precision="bf16", torch.utils.checkpoint in the model, shorter samples, a smaller model',
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]


def _has_version(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_inference()
