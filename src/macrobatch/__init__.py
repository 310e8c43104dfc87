"""Say the batch you want; get exactly that batch's gradient."""

from macrobatch import errors as errors
from macrobatch.core.events import Event, Listener, MicroBatchDone, Skipped, Updated, on
from macrobatch.core.loss import Loss
from macrobatch.core.precision import Bf16, Fp16, Precision
from macrobatch.core.result import StepResult
from macrobatch.core.twopass import TwoPass
from macrobatch.core.weighting import Constant
from macrobatch.diagnose import Finding
from macrobatch.losses import cross_entropy
from macrobatch.observe.progress import track
from macrobatch.plan.split import Rows, Tokens
from macrobatch.train import TrainStep, accumulate
from macrobatch.verify import Report, verify

__version__ = "0.1.0"

__all__ = [
    "Bf16",
    "Constant",
    "Event",
    "Finding",
    "Fp16",
    "Listener",
    "Loss",
    "MicroBatchDone",
    "Precision",
    "Report",
    "Rows",
    "Skipped",
    "StepResult",
    "Tokens",
    "TrainStep",
    "TwoPass",
    "Updated",
    "accumulate",
    "cross_entropy",
    "errors",
    "on",
    "track",
    "verify",
]
