"""What may be done to the gradient of a window before it is clipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from macrobatch.colossalai.context.config import ConfigException
from macrobatch.colossalai.registry import GRADIENT_HANDLER

__all__ = ["BaseGradientHandler", "DataParallelGradientHandler", "build_gradient_handlers"]


class BaseGradientHandler(ABC):
    """Base of your own handlers, which `@GRADIENT_HANDLER.register_module` makes known to configs.

    Args:
        model: whose parameters have the gradients.
        optimizer: that updates them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    @abstractmethod
    def handle_gradient(self) -> None:
        """Change the gradients in place. Called once for each window, when all its micro-batches are through."""


@GRADIENT_HANDLER.register_module
class DataParallelGradientHandler(BaseGradientHandler):
    """Asks for the mean over data-parallel ranks, which every window is given anyway, once, as it closes."""

    def handle_gradient(self) -> None:
        """Nothing is left to do."""


def build_gradient_handlers(
    configs: Sequence[Mapping[str, Any]] | None, model: nn.Module, optimizer: Optimizer
) -> list[BaseGradientHandler]:
    """The handlers that a config's `gradient_handler` names, each built with the other entries of its dict.

    Raises:
        ConfigException: one is not registered, or is not a BaseGradientHandler.

    ```pycon
    >>> from torch.optim import SGD
    >>> model = nn.Linear(1, 1)
    >>> config = [dict(type="DataParallelGradientHandler")]
    >>> [type(each).__name__ for each in build_gradient_handlers(config, model, SGD(model.parameters()))]
    ['DataParallelGradientHandler']

    ```
    """
    classes: list[tuple[Any, dict[str, Any]]] = []
    for config in configs or ():
        name = config["type"]
        found = GRADIENT_HANDLER.get_module(name) if GRADIENT_HANDLER.has(name) else None
        if found is None or not issubclass(found, BaseGradientHandler):
            raise ConfigException(
                "the config's gradient_handler",
                given=repr(name),
                expected="the name of a subclass of BaseGradientHandler that is registered",
                fix="write @GRADIENT_HANDLER.register_module above it, in a module that is imported; all ranks are "
                'data parallel, so of those that come with the package, "DataParallelGradientHandler" is the one',
            )
        classes.append((found, {key: value for key, value in config.items() if key != "type"}))
    return [found(model, optimizer, **arguments) for found, arguments in classes]
