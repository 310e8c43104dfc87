"""How a macro-batch is cut into micro-batches: by rows or by tokens, the last part ragged.

The window's gradient does not depend on the cut, so it is chosen for memory and speed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from torch import Tensor

from macrobatch import tree
from macrobatch.checks import check_flag, check_integer, is_integer, is_number
from macrobatch.errors import ArgumentError, BatchError
from macrobatch.plan.memory import Memory

__all__ = ["Auto", "Rows", "Split", "Tokens", "make_split"]

Lengths = Callable[[Any], Tensor | Sequence[int]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Micro-batches of a number of samples; the last one takes what is left.

    Args:
        num_rows: samples per micro-batch, an integer >= 1.

    ```pycon
    >>> import torch
    >>> Rows(2).split(torch.arange(5))
    [(tensor([0, 1]), 2), (tensor([2, 3]), 2), (tensor([4]), 1)]

    ```
    """

    num_rows: int

    def __post_init__(self) -> None:
        check_integer("micro_batch", self.num_rows, "the samples in a micro-batch", fix="pass micro_batch=16")

    def split(self, batch: Any) -> list[tuple[Any, int]]:
        """The micro-batches of a macro-batch in order, each with its number of rows; views, not copies."""
        flat = tree.flatten(batch)
        full, rest = divmod(flat.num_rows, self.num_rows)
        sizes = [self.num_rows] * full + [rest] * bool(rest)
        return list(zip(flat.split(sizes), sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Micro-batches of consecutive samples that hold at most so many tokens when padded to their longest.

    Args:
        max_tokens: a hard cap on rows × longest row of a micro-batch, an integer >= 1.
        lengths: from a batch, its number of tokens per row, shape (rows,).
        trim: cuts padding off: from a micro-batch and the length of its longest row (at least 1), the micro-batch to
            run. None leaves it as wide as the macro-batch.

    ```pycon
    >>> import torch
    >>> ids = torch.tensor([[5, 0, 0, 0], [6, 0, 0, 0], [7, 8, 9, 9], [1, 2, 0, 0]])
    >>> tokens = Tokens(4, lengths=lambda ids: (ids != 0).sum(1), trim=lambda ids, width: ids[:, :width])
    >>> [part.tolist() for part, num_rows in tokens.split(ids)]
    [[[5], [6]], [[7, 8, 9, 9]], [[1, 2]]]

    ```
    """

    max_tokens: int
    lengths: Lengths
    trim: Callable[[Any, int], Any] | None = None

    def __post_init__(self) -> None:
        check_integer("Tokens.max_tokens", self.max_tokens, "the tokens in a micro-batch", fix="pass Tokens(4096, ...)")
        for name, function, expected, fix in (
            ("lengths", self.lengths, "a function of a batch", "lambda batch: batch['attention_mask'].sum(1)"),
            ("trim", self.trim, "a function of a micro-batch and a width", "lambda ids, width: ids[:, :width]"),
        ):
            if not callable(function) and (name == "lengths" or function is not None):
                raise ArgumentError(
                    f"Tokens.{name}", given=repr(function), expected=expected, fix=f"pass {name}={fix}, for example"
                )

    def split(self, batch: Any) -> list[tuple[Any, int]]:
        """The micro-batches of a macro-batch in order, each with its number of rows.

        Raises:
            BatchError: a single row is longer than the cap, or `lengths` does not fit the batch.
        """
        lengths = self.read_lengths(batch)
        for row, length in enumerate(lengths):
            if length > self.max_tokens:
                raise BatchError(
                    f"row {row}",
                    given=f"{length} tokens",
                    expected=f"at most max_tokens={self.max_tokens}",
                    fix="raise max_tokens, or truncate the sample",
                )
        sizes: list[int] = []
        longest: list[int] = []
        for length in (max(length, 1) for length in lengths):
            if sizes and (sizes[-1] + 1) * max(longest[-1], length) <= self.max_tokens:
                sizes[-1] += 1
                longest[-1] = max(longest[-1], length)
            else:
                sizes.append(1)
                longest.append(length)
        parts = tree.split(batch, sizes)
        if self.trim is not None:
            parts = [self.trim(part, width) for part, width in zip(parts, longest, strict=True)]
        return list(zip(parts, sizes, strict=True))

    def read_lengths(self, batch: Any) -> list[int]:
        """The number of tokens of each row, as `lengths` tells it."""
        lengths: Any = self.lengths(batch)
        values = lengths.tolist() if isinstance(lengths, Tensor | np.ndarray) else lengths
        rows = tree.num_rows(batch)
        if (
            not isinstance(values, list | tuple)
            or len(values) != rows
            or not all(is_integer(value, 0) for value in values)
        ):
            raise BatchError(
                "Tokens.lengths",
                given=f"{values!r:.60} from a batch of {rows} rows",
                expected=f"an integer >= 0 for each of the {rows} rows",
                fix="return one length per sample, for example batch['attention_mask'].sum(1)",
            )
        return list(values)


Split = Rows | Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Auto:
    """Micro-batches of the size that is fastest here, found out with the first macro-batch: `micro_batch="auto"`.

    The size is chosen once for a step; the first macro-batch should look like those that follow. Should a micro-batch
    not fit into memory later on, its window runs again in smaller ones, and the size grows back in time.

    Args:
        memory_fraction: of the memory there is, the most that a micro-batch may take, in (0, 1].
        lengths: as for `Tokens`; what is chosen then is the number of tokens in a micro-batch, not of samples.
        trim: as for `Tokens`.
        memory: what to measure and how much there is of it; None finds out.
        remembers: keep what was measured in a small file, for the next run (see `MACROBATCH_CACHE`).

    ```pycon
    >>> Auto().of(4), Auto(lengths=lambda ids: (ids != 0).sum(1)).of(4).max_tokens
    (Rows(num_rows=4), 4)

    ```
    """

    memory_fraction: float = 0.9
    lengths: Lengths | None = None
    trim: Callable[[Any, int], Any] | None = None
    memory: Memory | None = None
    remembers: bool = True

    def __post_init__(self) -> None:
        fraction: Any = self.memory_fraction
        if not is_number(fraction) or not 0 < fraction <= 1:
            raise ArgumentError(
                "memory_fraction", given=repr(fraction), expected="a number in (0, 1]", fix="leave it at 0.9"
            )
        check_flag("Auto.remembers", self.remembers, fix="pass remembers=False to measure anew in every run")
        if self.memory is not None and not isinstance(self.memory, Memory):
            raise ArgumentError("Auto.memory", given=repr(self.memory), expected="a Memory or None", fix="leave it out")
        if self.lengths is not None:
            self.of(1)
        elif self.trim is not None:
            raise ArgumentError(
                "Auto.trim", given="a function, without lengths", expected="both", fix="pass lengths=, see Tokens"
            )

    @property
    def unit(self) -> str:
        """What a size counts."""
        return "samples" if self.lengths is None else "tokens"

    def of(self, size: int) -> Split:
        """Micro-batches of a given size."""
        return Rows(size) if self.lengths is None else Tokens(size, lengths=self.lengths, trim=self.trim)

    def sizes(self, batch: Any, num_rows: int) -> tuple[int, int]:
        """The size of the whole batch and that of its largest sample."""
        if self.lengths is None:
            return num_rows, 1
        longest = max(1, *Tokens(1, lengths=self.lengths).read_lengths(batch))
        return num_rows * longest, longest


@overload
def make_split(micro_batch: object, *, autos: Literal[False] = False) -> Split: ...
@overload
def make_split(micro_batch: object, *, autos: Literal[True]) -> Split | Auto: ...
def make_split(micro_batch: object, *, autos: bool = False) -> Split | Auto:
    """How to cut for the argument `micro_batch`: an integer means `Rows`; "auto" means `Auto`, if `autos`.

    Raises:
        ArgumentError: not a positive integer, `Rows` or `Tokens`.
    """
    if isinstance(micro_batch, Rows | Tokens):
        return micro_batch
    is_auto = isinstance(micro_batch, str) and micro_batch == "auto"
    if autos and (is_auto or isinstance(micro_batch, Auto)):
        return Auto() if is_auto else micro_batch  # pyright: ignore[reportReturnType]
    if is_auto or isinstance(micro_batch, Auto):
        raise ArgumentError(
            "micro_batch",
            given=repr(micro_batch),
            expected="an integer, Rows(n) or Tokens(n, lengths=...); only a TrainStep finds its size out",
            fix="pass a number of samples that fits, for example micro_batch=16",
        )
    meaning = "the samples in a micro-batch" + ', or "auto"' * autos
    check_integer("micro_batch", micro_batch, meaning, fix="pass micro_batch=16")
    return Rows(micro_batch)  # pyright: ignore[reportArgumentType]
