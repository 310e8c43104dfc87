"""How often a window goes over its flat gradient buffer besides the backwards: once per thing that there is to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import macrobatch as mb


class Passes(TorchDispatchMode):
    """Operations that read or write a whole buffer."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self._numbers = numbers
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = [arg for arg in args if isinstance(arg, Tensor) and arg.numel() >= self._numbers.numel()]
        place = self._numbers.untyped_storage().data_ptr()
        if not func.is_view and any(arg.untyped_storage().data_ptr() == place for arg in whole):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["zero_", "linalg_vector_norm"]),
        ({"nonfinite": "ignore"}, ["zero_", "linalg_vector_norm"]),
        ({"clip_norm": 1e9}, ["zero_", "linalg_vector_norm"]),  # nothing to clip
        ({"clip_norm": 1e-9}, ["zero_", "linalg_vector_norm", "mul_"]),
        ({"clip_norm": 1e-9, "nonfinite": "ignore"}, ["zero_", "linalg_vector_norm", "mul_"]),
        ({"clip_value": 1e-9}, ["zero_", "linalg_vector_norm", "clamp_"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("micro_batch", [4, 5])  # 12 = 3 × 4 = 5 + 5 + 2
def test_zeroing_norm_and_scaling_are_one_pass_each(options, expected, micro_batch):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mb.TrainStep(model, optimizer, lambda m, x: m(x).square().mean(), micro_batch=micro_batch, **options)
    batch = torch.randn(12, 8)
    step(batch)
    with Passes(step.gradients.flats[0].numbers) as passes:
        step(batch)
    assert passes.names == expected


def test_correction_and_clipping_are_one_pass():
    """The window turns out to weigh half of what was expected: both factors are applied at once."""
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: Any, x: Tensor) -> mb.Loss:
        return mb.Loss(model(x).square().sum(), len(x) / 2)

    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=4, clip_norm=1e-9)
    step(torch.randn(12, 8))
    with Passes(step.gradients.flats[0].numbers) as passes:
        step(torch.randn(12, 8))
    assert passes.names == ["zero_", "linalg_vector_norm", "mul_"]
