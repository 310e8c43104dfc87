"""Schedules of the learning rate, and metrics."""

from macrobatch.colossalai.nn import lr_scheduler, metric

__all__ = ["lr_scheduler", "metric"]
