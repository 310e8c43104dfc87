"""Megatron-LM is not part of macrobatch; asking for a name says what to use."""

from typing import Any

from macrobatch.accelerate.utils.absent import absent


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
