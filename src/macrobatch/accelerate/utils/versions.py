"""Comparing versions of packages."""

from __future__ import annotations

import operator
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version, parse

from macrobatch.errors import ArgumentError

__all__ = ["compare_versions", "is_torch_version"]

_OPERATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


def compare_versions(library_or_version: str | Version, operation: str, requirement_version: str) -> bool:
    """Whether a package (by name), or a version, stands in a relation to another version.

    ```pycon
    >>> compare_versions("torch", ">=", "2.0")
    True

    ```
    """
    if operation not in _OPERATIONS:
        raise ArgumentError("operation", given=repr(operation), expected=f"one of {list(_OPERATIONS)}", fix='pass ">="')
    found = library_or_version
    if isinstance(found, str):
        found = parse(metadata.version(found))
    return _OPERATIONS[operation](found, parse(requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Whether torch's version stands in a relation to another."""
    return compare_versions(Version(parse(torch.__version__).base_version), operation, version)
