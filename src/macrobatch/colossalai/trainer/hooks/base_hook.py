"""What a hook is: a method for each moment of training, all of which do nothing."""

from __future__ import annotations

from typing import Any

__all__ = ["BaseHook"]


class BaseHook:
    """Base of hooks.

    Args:
        priority: hooks are called from low to high; a subclass that does not say has 10.
    """

    priority = 10

    def __init__(self, priority: int = 10) -> None:
        self.priority = priority

    def after_hook_is_attached(self, trainer: Any) -> None:
        """The trainer has got all its hooks."""

    def before_train(self, trainer: Any) -> None:
        """Training begins."""

    def after_train(self, trainer: Any) -> None:
        """Training is over."""

    def before_train_epoch(self, trainer: Any) -> None:
        """An epoch begins."""

    def after_train_epoch(self, trainer: Any) -> None:
        """An epoch is over."""

    def before_train_iter(self, trainer: Any) -> None:
        """A micro-iteration begins."""

    def after_train_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        """A micro-iteration is over, and if it was the last of its window, the update was made."""

    def before_test(self, trainer: Any) -> None:
        """Testing begins."""

    def after_test(self, trainer: Any) -> None:
        """Testing is over."""

    def before_test_epoch(self, trainer: Any) -> None:
        """A pass over the test data begins."""

    def after_test_epoch(self, trainer: Any) -> None:
        """A pass over the test data is over."""

    def before_test_iter(self, trainer: Any) -> None:
        """A batch is about to be tested."""

    def after_test_iter(self, trainer: Any, output: Any, label: Any, loss: Any) -> None:
        """A batch was tested."""

    def init_runner_states(self, trainer: Any, key: str, val: Any) -> None:
        """Put something into `trainer.states`, unless it is there."""
        trainer.states.setdefault(key, val)
