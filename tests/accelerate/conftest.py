"""What every test of this folder may ask for: accelerators, and none that is left from another test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.accelerate import doors


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    """Before and after each test, this process knows of no accelerator and of no state."""
    doors.reset()
    yield
    doors.reset()


@pytest.fixture
def build() -> Callable[..., Any]:
    """`build(**options)` is an accelerator on the CPU, the only one. Jobs on ranks import it from `doors`."""
    return doors.build
