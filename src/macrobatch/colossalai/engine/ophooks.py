"""Hooks into the modules of a model: called before and after each one's forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.errors import ArgumentError
from macrobatch.tree import map_tensors

__all__ = ["BaseOpHook", "OpHooks"]


class BaseOpHook:
    """Base of hooks for `Engine(ophook_list=...)` and `Engine.add_hook`. Each method does nothing here.

    They are called for every module with parameters of its own, with its positional inputs as a tuple. What a hook of
    the backward is given is detached.
    """

    def pre_fwd_exec(self, module: nn.Module, *args: Any) -> None:
        """A module is about to run on `args[0]`, its inputs."""

    def post_fwd_exec(self, module: nn.Module, *args: Any) -> None:
        """A module has run: `args` are its inputs and its output."""

    def pre_bwd_exec(self, module: nn.Module, input: Any, output: Any) -> None:
        """The gradient of one of the module's outputs is there."""

    def post_bwd_exec(self, module: nn.Module, input: Any) -> None:
        """The gradient of one of the module's inputs is there. Not called for inputs that need none, such as data."""

    def post_iter(self) -> None:
        """A backward of the engine is over."""


class OpHooks:
    """The hooks of an engine, registered with its model while there are any."""

    def __init__(self, model: nn.Module, hooks: Sequence[BaseOpHook]) -> None:
        self.active: list[BaseOpHook] = []
        self._model = model
        self._handles: list[Any] = []
        for hook in hooks:
            self.add(hook)

    def add(self, hook: BaseOpHook) -> None:
        """Call this one too.

        Raises:
            ArgumentError: it is no BaseOpHook.
        """
        if not isinstance(hook, BaseOpHook):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(
                "an ophook",
                given=type(hook).__name__,
                expected="a BaseOpHook",
                fix="derive it from macrobatch.colossalai.engine.ophooks.BaseOpHook; a trainer's hooks go to fit()",
            )
        if any(type(hook) is type(known) for known in self.active):
            get_dist_logger().warning(f"duplicate hooks, at least two instances of {type(hook).__name__}")
        if not self.active:
            for module in self._model.modules():
                if next(module.parameters(recurse=False), None) is not None:
                    self._handles += [
                        module.register_forward_pre_hook(self._before),
                        module.register_forward_hook(self._after),
                    ]
        self.active.append(hook)

    def remove(self, hook: BaseOpHook) -> None:
        """Call it no longer."""
        self.active = [known for known in self.active if known is not hook]
        if not self.active:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def post_iter(self) -> None:
        """A backward is over."""
        for hook in self.active:
            hook.post_iter()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        for hook in self.active:
            hook.pre_fwd_exec(module, inputs)
        detached = map_tensors(Tensor.detach, inputs)

        def after_backward(_: Tensor) -> None:
            for hook in self.active:
                hook.post_bwd_exec(module, detached)

        _on_gradient(inputs, after_backward)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        for hook in self.active:
            hook.post_fwd_exec(module, inputs, output)
        detached = map_tensors(Tensor.detach, (inputs, output))  # the tensors themselves would keep their own graph

        def before_backward(_: Tensor) -> None:
            for hook in self.active:
                hook.pre_bwd_exec(module, *detached)

        _on_gradient(output, before_backward)


def _on_gradient(values: Any, function: Callable[[Tensor], None]) -> None:
    def register(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            tensor.register_hook(function)
        return tensor

    map_tensors(register, values)
