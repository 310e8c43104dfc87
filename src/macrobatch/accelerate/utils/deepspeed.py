"""DeepSpeed is not part of macrobatch; asking for a name says what to use."""

from macrobatch.accelerate.utils.absent import refusing

__getattr__ = refusing(__name__)
