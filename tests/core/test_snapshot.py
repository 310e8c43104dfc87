"""Generators are put back exactly, whichever NumPy draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from macrobatch.core.snapshot import rng_states, set_rng_states

HOST = torch.device("cpu")


def draws() -> list[Any]:
    return [random.random(), torch.rand(2).tolist(), np.random.randn(3).tolist(), np.random.randint(9, size=3).tolist()]


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_states_are_put_back(kind):
    usual: Any = np.random
    before = usual.get_bit_generator()
    usual.set_bit_generator(kind(3))
    try:
        np.random.randn(1)  # one of a pair: the other is kept for the next call
        states = rng_states(HOST)
        first = draws()
        assert draws() != first  # the control
        set_rng_states(HOST, states)
        assert draws() == first
    finally:
        usual.set_bit_generator(before)
