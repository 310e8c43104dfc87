"""Macro-batches of a data set, divided over ranks without a sample twice or left out."""

from macrobatch.data.loader import MacroBatchLoader, ShareLoader
from macrobatch.data.planned import WindowLoader, WindowSampler
from macrobatch.data.sampler import MacroBatchSampler
from macrobatch.data.shard import shard

__all__ = ["MacroBatchLoader", "MacroBatchSampler", "ShareLoader", "WindowLoader", "WindowSampler", "shard"]
