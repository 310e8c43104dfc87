"""Random numbers that are the same on every rank, and that leave the program's own alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["apart", "seed_of"]

T = TypeVar("T")


def seed_of(*key: int) -> int:
    """One well-mixed 64-bit seed from several integers >= 0: neighbouring keys have unrelated seeds.

    Source:
        https://numpy.org/doc/stable/reference/random/parallel.html

    ```pycon
    >>> seed_of(0, 1) == seed_of(1, 0)
    False

    ```
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def apart(items: Iterable[T], *key: int) -> Iterator[T]:
    """The items, drawn while the global generators of torch (of the CPU), NumPy and Python run on a track of their own.

    What the iterable draws at random is then a function of the key alone, and what the program draws between two items
    is as if the iterable drew nothing.

    ```pycon
    >>> list(apart((random.random() for _ in range(2)), 7)) == list(apart((random.random() for _ in range(2)), 7))
    True

    ```
    """
    seed = seed_of(*key)
    states: list[Any] = [
        torch.Generator().manual_seed(seed).get_state(),
        np.random.RandomState(seed % 2**32).get_state(),
        random.Random(seed).getstate(),
    ]
    iterator: Iterator[T] | None = None
    while True:
        outside = _states()
        _set_states(states)
        try:
            iterator = iter(items) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            states = _states()
            _set_states(outside)
        yield item


def _states() -> list[Any]:
    return [torch.get_rng_state(), np.random.get_state(), random.getstate()]


def _set_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
