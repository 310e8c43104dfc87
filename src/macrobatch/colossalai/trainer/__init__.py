"""The trainer, which runs the loop, and the hooks that it calls."""

from macrobatch.colossalai.trainer.trainer import Trainer

__all__ = ["Trainer"]
