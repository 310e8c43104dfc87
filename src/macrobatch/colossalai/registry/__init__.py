"""Classes by name, for configs."""

from macrobatch.colossalai.registry.registry import GRADIENT_HANDLER, Registry

__all__ = ["GRADIENT_HANDLER", "Registry"]
