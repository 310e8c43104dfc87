"""The engine, and the parts that accumulation is made of."""

from macrobatch.colossalai.engine.engine import Engine
from macrobatch.colossalai.engine.gradient_handler import BaseGradientHandler

__all__ = ["BaseGradientHandler", "Engine"]
