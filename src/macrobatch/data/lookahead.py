"""Which item is the last? Known by looking at the next one, and no further."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["lookahead"]

T = TypeVar("T")


def lookahead(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one.

    Exactly one item more than was handed out has been drawn. An error in drawing it is raised instead of the item
    before it.

    ```pycon
    >>> list(lookahead("abc"))
    [('a', False), ('b', False), ('c', True)]

    ```
    """
    iterator = iter(items)
    try:
        current = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield current, False
        current = following
    yield current, True
