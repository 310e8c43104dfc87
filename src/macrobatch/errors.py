"""What macrobatch raises. Every message says what was given, what was expected and what to do.

```text
MacrobatchError
├── ArgumentError            (also ValueError)     an argument is out of its domain
├── BatchError               (also ValueError)     a macro-batch that cannot be cut into micro-batches
├── LossError                (also ValueError)     what a loss function returned cannot be accumulated
│   └── NonFiniteError                             the window's loss or gradient is NaN or infinite
├── GradientError            (also RuntimeError)   gradients that cannot live in the flat buffer
├── NoMemoryError            (also torch.OutOfMemoryError)  not even one sample fits into memory
├── PeerError                (also RuntimeError)   another rank failed, or the ranks have come apart
├── WindowError              (also RuntimeError)   a step out of the window's order
├── StateError               (also ValueError)     a state_dict that does not fit
├── NotYetError              (also NotImplementedError)  planned, not there in this version
└── MissingDependencyError   (also ImportError)    an optional package is not installed
```
"""

from __future__ import annotations

from torch import OutOfMemoryError

__all__ = [
    "ArgumentError",
    "BatchError",
    "GradientError",
    "LossError",
    "MacrobatchError",
    "MissingDependencyError",
    "NoMemoryError",
    "NonFiniteError",
    "NotYetError",
    "PeerError",
    "StateError",
    "WindowError",
]


class MacrobatchError(Exception):
    """Base of all errors of this package.

    Args:
        what: the argument, object or step that is at fault.
        given: what macrobatch found there.
        expected: what would have been right.
        fix: what to do about it.

    ```pycon
    >>> print(MacrobatchError("micro_batch", given=0, expected="a positive integer", fix="pass micro_batch=16"))
    micro_batch: given 0; expected a positive integer. To fix it, pass micro_batch=16.

    ```
    """

    def __init__(self, what: str, *, given: object, expected: str, fix: str) -> None:
        shown = given if isinstance(given, str) else repr(given)
        super().__init__(f"{what}: given {shown}; expected {expected}. To fix it, {fix}.")
        self.what = what
        self.given = given
        self.expected = expected
        self.fix = fix


class ArgumentError(MacrobatchError, ValueError):
    """An argument is out of its domain."""


class BatchError(MacrobatchError, ValueError):
    """A macro-batch is empty, or its leaves do not agree on the number of samples."""


class LossError(MacrobatchError, ValueError):
    """A loss function returned something that cannot be accumulated."""


class NonFiniteError(LossError):
    """The loss or the gradient of a window is NaN or infinite; the update was not made."""


class GradientError(MacrobatchError, RuntimeError):
    """Gradients that cannot live in the flat buffer."""


class NoMemoryError(MacrobatchError, OutOfMemoryError):
    """Not even a single sample fits into memory; nothing was changed."""


class PeerError(MacrobatchError, RuntimeError):
    """Another rank failed in this window, or the ranks have come apart."""


class WindowError(MacrobatchError, RuntimeError):
    """A step was asked for out of the window's order."""


class StateError(MacrobatchError, ValueError):
    """A state_dict is incomplete or belongs to something else; nothing was loaded."""


class NotYetError(MacrobatchError, NotImplementedError):
    """Part of the plan, not there in this version."""


class MissingDependencyError(MacrobatchError, ImportError):
    """An optional package is not installed."""
