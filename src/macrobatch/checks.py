"""Numbers and flags that arguments may be, each refused by its own name.

`True` is no number here, and 2.0 is no integer: both are slips more often than they are meant.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from macrobatch.errors import ArgumentError

__all__ = ["check_flag", "check_integer", "check_limit", "check_number", "is_integer", "is_number"]


def is_integer(value: Any, at_least: float = -math.inf) -> bool:
    """Whether it is an integer, and large enough.

    ```pycon
    >>> [is_integer(value, 0) for value in (0, 3, -1, 2.0, True, "3")]
    [True, True, False, False, False, False]

    ```
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold.

    ```pycon
    >>> [is_number(value) for value in (0, -2.5, math.nan, math.inf, 10**400, True, "3")]
    [True, True, False, False, False, False, False]

    ```
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_integer(
    what: str, value: object, meaning: str = "", *, fix: str, at_least: int = 1, or_none: bool = False
) -> None:
    """Refuse what is not an integer >= `at_least`.

    Args:
        meaning: what it is the number of, for the message.
        or_none: let None pass.

    Raises:
        ArgumentError: it is not.

    ```pycon
    >>> check_integer("num_parts", 0, "the parts to divide into", fix="pass num_parts=8")
    Traceback (most recent call last):
    macrobatch.errors.ArgumentError: num_parts: given 0; expected an integer >= 1, the parts to divide into. To fix it,
    pass num_parts=8.

    ```
    """
    if (or_none and value is None) or is_integer(value, at_least):
        return
    expected = f"an integer >= {at_least}" + " or None" * or_none + (meaning and f", {meaning}")
    raise ArgumentError(what, given=repr(value), expected=expected, fix=fix)


def check_number(what: str, value: Any, *, fix: str, is_positive: bool = False) -> None:
    """Refuse what is not a finite number >= 0, or > 0.

    Raises:
        ArgumentError: it is not.
    """
    if not is_number(value) or value < 0 or (is_positive and value == 0):
        raise ArgumentError(
            what, given=repr(value), expected=f"a finite number {'> 0' if is_positive else '>= 0'}", fix=fix
        )


def check_flag(what: str, value: object, *, fix: str | None = None) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ArgumentError: it is not.
    """
    if not isinstance(value, bool):
        raise ArgumentError(what, given=repr(value), expected="True or False", fix=fix or f"pass {what}=True")


def check_limit(what: str, value: Any) -> None:
    """Refuse what nothing can be clipped to: a negative limit turns gradients around, and NaN turns all of them NaN.

    Args:
        value: a number or a 0-d tensor, infinity among them.

    Raises:
        ArgumentError: it is negative, NaN or no number.
    """
    is_real = hasattr(value, "__float__") and not isinstance(value, bool)
    if not is_real or not float(value) >= 0:
        raise ArgumentError(what, given=repr(value), expected="a number >= 0, or infinity", fix=f"pass {what}=1.0")
