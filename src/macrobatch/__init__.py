"""Say the batch you want; get exactly that batch's gradient."""

from macrobatch import errors as errors
from macrobatch.core.events import Event, Listener, MicroBatchDone, Skipped, Updated, on
from macrobatch.core.precision import Bf16, Fp16, Precision
from macrobatch.core.result import StepResult
from macrobatch.core.weighting import Constant, Loss
from macrobatch.losses import cross_entropy
from macrobatch.plan.split import Rows, Tokens
from macrobatch.train import TrainStep, accumulate

__version__ = "0.1.0"

__all__ = [
    "Bf16",
    "Constant",
    "Event",
    "Fp16",
    "Listener",
    "Loss",
    "MicroBatchDone",
    "Precision",
    "Rows",
    "Skipped",
    "StepResult",
    "Tokens",
    "TrainStep",
    "Updated",
    "accumulate",
    "cross_entropy",
    "errors",
    "on",
]
