"""Say the batch you want; get exactly that batch's gradient."""

from macrobatch import errors as errors
from macrobatch import launch as launch
from macrobatch.core.events import Event, Listener, MicroBatchDone, Skipped, Updated, on
from macrobatch.core.loss import Loss
from macrobatch.core.precision import Bf16, Fp16, Precision
from macrobatch.core.result import StepResult
from macrobatch.core.twopass import TwoPass
from macrobatch.core.weighting import Constant
from macrobatch.data import MacroBatchLoader, shard
from macrobatch.diagnose import Finding
from macrobatch.losses import cross_entropy
from macrobatch.observe.progress import track
from macrobatch.plan.split import Auto, Rows, Tokens
from macrobatch.sync import LocalSync, Policy, ReplicatedSync, ShardedSync, Sync, WrappedSync
from macrobatch.train import TrainStep, accumulate
from macrobatch.verify import Report, verify

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Bf16",
    "Constant",
    "Event",
    "Finding",
    "Fp16",
    "Listener",
    "LocalSync",
    "Loss",
    "MacroBatchLoader",
    "MicroBatchDone",
    "Policy",
    "Precision",
    "ReplicatedSync",
    "Report",
    "Rows",
    "ShardedSync",
    "Skipped",
    "StepResult",
    "Sync",
    "Tokens",
    "TrainStep",
    "TwoPass",
    "Updated",
    "WrappedSync",
    "accumulate",
    "cross_entropy",
    "errors",
    "launch",
    "on",
    "shard",
    "track",
    "verify",
]
