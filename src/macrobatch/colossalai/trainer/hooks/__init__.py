"""What a trainer may be given to do around its iterations and epochs."""

from macrobatch.colossalai.trainer.hooks.base_hook import BaseHook
from macrobatch.colossalai.trainer.hooks.checkpoint_hook import SaveCheckpointHook
from macrobatch.colossalai.trainer.hooks.log_hook import (
    LogMemoryByEpochHook,
    LogMetricByEpochHook,
    LogMetricByStepHook,
    LogTimingByEpochHook,
    TensorboardHook,
)
from macrobatch.colossalai.trainer.hooks.lr_scheduler_hook import LRSchedulerHook
from macrobatch.colossalai.trainer.hooks.metric_hook import AccuracyHook, LossHook, MetricHook, ThroughputHook

__all__ = [
    "AccuracyHook",
    "BaseHook",
    "LRSchedulerHook",
    "LogMemoryByEpochHook",
    "LogMetricByEpochHook",
    "LogMetricByStepHook",
    "LogTimingByEpochHook",
    "LossHook",
    "MetricHook",
    "SaveCheckpointHook",
    "TensorboardHook",
    "ThroughputHook",
]
