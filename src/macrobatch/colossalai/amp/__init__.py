"""Mixed precision: `fp16 = dict(mode=AMP_TYPE.TORCH)` in a config."""

from macrobatch.colossalai.amp.amp_type import AMP_TYPE

__all__ = ["AMP_TYPE"]
