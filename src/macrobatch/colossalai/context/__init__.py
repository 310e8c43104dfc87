"""What a script is told once: its config, and where its process stands among all."""

from macrobatch.colossalai.context.config import Config, ConfigException
from macrobatch.colossalai.context.parallel_context import ParallelContext
from macrobatch.colossalai.context.parallel_mode import ParallelMode

__all__ = ["Config", "ConfigException", "ParallelContext", "ParallelMode"]
