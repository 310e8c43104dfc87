"""What a window's gradient is divided by: the policies.

A micro-batch contributes the gradient of `total`, a *sum* over `weight` items (samples, tokens, masked positions).
With the default policy the optimizer sees, for each term of the loss,

```text
g = Σ_i ∇ total_i / Σ_i weight_i          over all micro-batches i of the window
```

`core.tally` applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from macrobatch.checks import check_integer
from macrobatch.core.loss import Weight
from macrobatch.errors import ArgumentError

__all__ = ["Constant", "Exact", "Normalize", "Plan", "Uniform", "make_policy"]


@dataclass(frozen=True, slots=True)
class Exact:
    """Divide by the weight that the window really saw. The default; any split gives the same gradient."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every micro-batch counts 1: the mean of the micro-batches' means. Depends on the split."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The sum of the micro-batches' means over a fixed number, also when the window is shorter: what `loss / N` does.

    Args:
        num_micro_batches: N, an integer >= 1.
    """

    num_micro_batches: int

    def __post_init__(self) -> None:
        check_integer("Constant", self.num_micro_batches, fix="pass Constant(4) for loss / 4")


Normalize = Exact | Uniform | Constant


def make_policy(normalize: object) -> Normalize:
    """The policy for a name or a policy object.

    ```pycon
    >>> make_policy("exact"), make_policy(Constant(4))
    (Exact(), Constant(num_micro_batches=4))

    ```
    """
    if isinstance(normalize, Exact | Uniform | Constant):
        return normalize
    if normalize == "exact":
        return Exact()
    if normalize == "uniform":
        return Uniform()
    raise ArgumentError(
        "normalize", given=repr(normalize), expected='"exact", "uniform" or Constant(N)', fix='leave it at "exact"'
    )


class Plan(NamedTuple):
    """What is known of a window before its first backward.

    Attributes:
        num_micro_batches: how many, or None if that is not known.
        guess: the window's weight if nobody counted it; only fp16's range depends on it being near.
        expected: the window's weight, counted ahead, per term or for the only one.
        num_to_run: how many this rank has to run, if more than it has, with weight zero.
        spare: what to run then, if it has none.
        is_coupled: ranks work together before their first backward, so that all of them have to begin.
        repeats: the window can be run again in smaller micro-batches, should memory not suffice.
        num_idle: micro-batches to run at the end of it, with weight zero, however many there were.
        lends: whether it can run micro-batches that are not this rank's own; a loop of somebody else's cannot.
    """

    num_micro_batches: int | None
    guess: float
    expected: Mapping[str, Weight] | Weight | None = None
    num_to_run: int | None = None
    spare: Any = None
    is_coupled: bool = False
    repeats: bool = False
    num_idle: int = 0
    lends: bool = True
