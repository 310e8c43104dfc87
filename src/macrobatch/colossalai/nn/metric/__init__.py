"""What can be counted of a model's outputs."""

from macrobatch.colossalai.nn.metric.accuracy import Accuracy

__all__ = ["Accuracy"]
