"""The two notations in which Slurm writes lists: hosts as in `node[01-03,7],gpu2`, numbers per host as in `2(x3),1`."""

from __future__ import annotations

import re

from macrobatch.errors import ArgumentError

__all__ = ["first_host", "repeated"]

_SPAN = r"\d+(?:-\d+)?"
_HOST = rf"[^\[\],\s]*(?:\[{_SPAN}(?:,{_SPAN})*\][^\[\],\s]*)*"
_HOSTS = re.compile(rf"({_HOST})(?:,{_HOST})*")
_NUMBERS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def first_host(hosts: str) -> str:
    """The first host of a list.

    Raises:
        ArgumentError: it is empty, or its brackets do not fit.

    ```pycon
    >>> first_host("node[01-03,7],gpu2"), first_host("gpu7,n[01-02]"), first_host("rack[2-3]n[10-12]-ib")
    ('node01', 'gpu7', 'rack2n10-ib')

    ```
    """
    match = _HOSTS.fullmatch(hosts.strip())
    if match is None or not match[1]:
        raise ArgumentError(
            "the list of hosts",
            given=repr(hosts),
            expected='names as in "node[01-03,7],gpu2"',
            fix="export MASTER_ADDR with the name of rank 0's host",
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[1])


def repeated(numbers: str) -> list[tuple[int, int]]:
    """(number, how many times) for each part of a list of numbers.

    Raises:
        ArgumentError: it is not such a list.

    ```pycon
    >>> repeated("2(x3),1")
    [(2, 3), (1, 1)]

    ```
    """
    matches = [_NUMBERS.fullmatch(part.strip()) for part in numbers.split(",")]
    if None in matches:
        raise ArgumentError(
            "the number of tasks per node",
            given=repr(numbers),
            expected='numbers as in "2(x3),1"',
            fix="start the ranks with srun, which sets it",
        )
    return [(int(match[1]), int(match[2] or 1)) for match in matches if match is not None]
