"""Schedules of the learning rate: torch's, with the number of all steps as their second argument.

Source:
    https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate
"""

from macrobatch.colossalai.nn.lr_scheduler.cosine import (
    CosineAnnealingLR,
    CosineAnnealingWarmupLR,
    FlatAnnealingLR,
    FlatAnnealingWarmupLR,
)
from macrobatch.colossalai.nn.lr_scheduler.linear import LinearWarmupLR
from macrobatch.colossalai.nn.lr_scheduler.multistep import MultiStepLR, MultiStepWarmupLR
from macrobatch.colossalai.nn.lr_scheduler.onecycle import OneCycleLR
from macrobatch.colossalai.nn.lr_scheduler.poly import PolynomialLR, PolynomialWarmupLR
from macrobatch.colossalai.nn.lr_scheduler.torch import ExponentialLR, LambdaLR, MultiplicativeLR, StepLR

__all__ = [
    "CosineAnnealingLR",
    "CosineAnnealingWarmupLR",
    "ExponentialLR",
    "FlatAnnealingLR",
    "FlatAnnealingWarmupLR",
    "LambdaLR",
    "LinearWarmupLR",
    "MultiStepLR",
    "MultiStepWarmupLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "PolynomialWarmupLR",
    "StepLR",
]
