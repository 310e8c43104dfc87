"""What samples of different lengths cost, and lengths that can be planned with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from macrobatch.checks import check_integer, check_number
from macrobatch.errors import ArgumentError, BatchError

__all__ = ["LengthCost", "Lengths", "checked_lengths", "nonnegative_fit"]

Lengths = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LengthCost:
    """What a sample of `n` tokens costs: `linear · n + quadratic · n²`, in any unit. The second term is attention's.

    All ranks of a job need the same coefficients: fit them on one and pass the numbers on.

    Args:
        linear: per token, > 0.
        quadratic: per pair of tokens, >= 0.

    ```pycon
    >>> cost = LengthCost.fit([128, 256, 512], [0.6e-3, 1.4e-3, 3.6e-3])
    >>> f"{cost.of_lengths([1024])[0]:.4f} s"
    '0.0104 s'

    ```
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def __post_init__(self) -> None:
        for name, value, is_positive in (("linear", self.linear, True), ("quadratic", self.quadratic, False)):
            fix = "leave it out, or measure it with LengthCost.fit"
            check_number(f"LengthCost.{name}", value, is_positive=is_positive, fix=fix)

    @classmethod
    def of_width(cls, width: int) -> LengthCost:
        """The arithmetic of a decoder layer of a width, with a perceptron of four times that: per token 24·width², per
        pair of tokens 2·width under a causal mask.

        Source:
            J. Kaplan et al., Scaling laws for neural language models (2020), table 1.
        """
        check_integer("width", width, fix="pass the model's hidden size")
        return cls(linear=12.0 * width, quadratic=1.0)

    @classmethod
    def fit(cls, lengths: Sequence[int], seconds: Sequence[float]) -> LengthCost:
        """Least squares through measured points; relative errors count, so that short samples do.

        A time that does not grow with the length (launches) belongs to the micro-batch and not to its samples: measure
        with enough samples that the device is busy, and divide by their number.

        Args:
            lengths: at least two different ones.
            seconds: the time of a forward and backward of one sample of that length.

        Raises:
            ArgumentError: too few points, or numbers out of their domain.
        """
        tokens, times = np.asarray(lengths, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
        is_usable = tokens.ndim == 1 and tokens.shape == times.shape and len(set(tokens.tolist())) >= 2
        if not is_usable or not bool(np.all(np.isfinite(tokens + times) & (tokens > 0) & (times > 0))):
            raise ArgumentError(
                "LengthCost.fit",
                given=f"lengths {lengths!r:.60}, seconds {seconds!r:.60}",
                expected="as many of both, finite and > 0, at two different lengths or more",
                fix="measure at 256, 512 and 1024 tokens",
            )
        linear, quadratic = nonnegative_fit(tokens, tokens**2, times)
        return cls(linear=max(linear, 1e-9 * quadratic), quadratic=quadratic)

    @classmethod
    def measure(
        cls, micro_step: Callable[[int], object], lengths: Sequence[int], *, num_samples: int = 1, num_times: int = 3
    ) -> LengthCost:
        """Time forwards and backwards of a few lengths, and fit. Over several ranks: on one of them.

        Args:
            micro_step: called with a length; runs the forward and the backward of `num_samples` samples of it.
            lengths: at least two different ones, from the shortest that matters to the longest.
            num_samples: as many as keep the device busy at the shortest length.
            num_times: timed calls of each length, of which the fastest counts, after one that warms up.

        Raises:
            ArgumentError: too few lengths, or counts that are not >= 1.

        ```pycon
        >>> layer = torch.nn.Linear(8, 8)
        >>> cost = LengthCost.measure(lambda length: layer(torch.ones(4, length, 8)).sum().backward(), [64, 512])
        >>> cost.linear > 0
        True

        ```
        """
        if not callable(micro_step):
            raise ArgumentError(
                "micro_step",
                given=repr(micro_step),
                expected="a function of a length",
                fix="pass one, not its result",
            )
        for name, value in (("num_samples", num_samples), ("num_times", num_times)):
            check_integer(name, value, fix=f"pass {name}=8")
        if len(set(lengths)) < 2:
            raise ArgumentError(
                "lengths", given=repr(lengths), expected="two different ones or more", fix="pass [256, 1024]"
            )
        fastest_s = [min(_seconds(micro_step, length) for _ in range(1 + num_times)) for length in lengths]
        return cls.fit(lengths, [seconds / num_samples for seconds in fastest_s])

    def of_lengths(self, lengths: Sequence[int] | Lengths) -> NDArray[np.float64]:
        """(N,) the cost of each sample."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return self.linear * tokens + self.quadratic * tokens**2


def _seconds(micro_step: Callable[[int], object], length: int) -> float:
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    micro_step(length)
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def nonnegative_fit(first: Any, second: Any, values: Any) -> tuple[float, float]:
    """The a, b >= 0 with the least relative squares of `a · first + b · second − values`; values > 0."""
    first, second, values = (np.asarray(part, dtype=np.float64) for part in (first, second, values))
    columns = np.stack([first / values, second / values], axis=1)
    ones = np.ones(len(columns))
    a, b = np.linalg.lstsq(columns, ones, rcond=None)[0].tolist()
    if a >= 0 and b >= 0:
        return a, b
    alone = [float(column @ ones / (column @ column)) for column in columns.T]
    misses = [float(np.square(weight * column - 1).sum()) for weight, column in zip(alone, columns.T, strict=True)]
    return (alone[0], 0.0) if misses[0] <= misses[1] else (0.0, alone[1])


def checked_lengths(lengths: object, max_tokens: int) -> Lengths:
    """(N,) lengths as int64.

    Raises:
        ArgumentError: not a flat row of integers, or none.
        BatchError: a sample that no micro-batch can hold, by its number.
    """
    try:
        values = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
    except ValueError:  # nested, of different lengths
        values = np.empty((0, 0))
    if values.ndim != 1 or len(values) == 0 or not np.issubdtype(values.dtype, np.integer):
        raise ArgumentError(
            "lengths",
            given=f"{lengths!r:.60}",
            expected="one integer for each sample, and at least one",
            fix="pass [len(sample) for sample in dataset]",
        )
    tokens = values.astype(np.int64)
    for sample in np.flatnonzero((tokens < 1) | (tokens > max_tokens))[:1].tolist():
        raise BatchError(
            f"sample {sample}",
            given=f"{tokens[sample]} tokens",
            expected=f"1 to max_tokens={max_tokens}",
            fix="truncate it or leave it out" + (", or raise max_tokens" if tokens[sample] > 0 else ""),
        )
    return tokens
