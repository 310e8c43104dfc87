"""Generators are put back exactly, whichever NumPy draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from macrobatch.core.snapshot import Snapshot, rng_states, same_bits, set_rng_states

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


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_buffers_are_put_back_to_the_sign_of_a_zero(dtype: torch.dtype, shape: tuple[int, ...]):
    module = torch.nn.Module()
    module.register_buffer("zero", torch.zeros(shape, dtype=dtype))
    module.register_buffer("flag", torch.zeros(shape, dtype=torch.bool))
    before = [buffer.clone() for buffer in module.buffers()]
    snapshot = Snapshot(module, HOST)
    for buffer in module.buffers():
        buffer.logical_not_() if buffer.dtype == torch.bool else buffer.neg_()
    assert torch.equal(*(each[0] for each in (before, list(module.buffers()))))  # a zero is one, whatever its sign
    assert not any(map(same_bits, module.buffers(), before))
    snapshot.restore()
    assert all(map(same_bits, module.buffers(), before))


def test_what_has_not_changed_is_not_written():
    """A graph may still need it; a NaN has not changed if its bits have not."""
    module = torch.nn.Module()
    module.register_buffer("nan", torch.full((2,), torch.nan))
    module.register_buffer("sparse", torch.eye(2).to_sparse())
    version = module.nan._version
    Snapshot(module, HOST).restore()
    assert module.nan._version == version
