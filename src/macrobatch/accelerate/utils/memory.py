"""Freeing memory, and finding a batch size that fits by trying."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

from macrobatch.checks import check_integer

__all__ = [
    "clear_device_cache",
    "find_executable_batch_size",
    "release_memory",
    "should_reduce_batch_size",
]

_SIGNS = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory")


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give cached blocks back to the device."""
    if garbage_collection:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_memory(*objects: Any) -> list[Any]:
    """As many None as objects were given, to assign to their names; their memory is given back.

    ```pycon
    >>> a = torch.ones(10)
    >>> (a,) = release_memory(a)
    >>> a is None
    True

    ```
    """
    released: list[Any] = [None] * len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return released


def should_reduce_batch_size(exception: Exception) -> bool:
    """Whether an error says that memory was not enough."""
    is_memory = isinstance(exception, torch.OutOfMemoryError | MemoryError)
    return is_memory or (isinstance(exception, RuntimeError) and any(sign in str(exception) for sign in _SIGNS))


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., Any]:
    """Decorator for a function whose first argument is a batch size: call it with smaller ones until it fits.

    Args:
        starting_batch_size: the first to try; each call of the decorated function begins with it again.
        reduce_batch_size_fn: returns the next to try; by default, nine tenths, as in the original.

    Raises:
        RuntimeError: not even one sample fits.
        TypeError: the batch size was passed, too, or the function takes no argument.

    ```pycon
    >>> @find_executable_batch_size(starting_batch_size=8)
    ... def train(batch_size):
    ...     if batch_size > 2:
    ...         raise MemoryError
    ...     return batch_size
    >>> train()
    2

    ```
    """
    check_integer("starting_batch_size", starting_batch_size, fix="pass 128")
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)

    @functools.wraps(function)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        if not takes_any and len(args) >= len(parameters):
            shown = ", ".join(map(repr, args))
            raise TypeError(
                f"{function.__name__}: given ({shown}); expected the batch size to be filled in as its first argument. "
                "To fix it, leave the batch size out of the call."
            )
        batch_size = starting_batch_size
        clear_device_cache(garbage_collection=True)
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)
            batch_size = int(batch_size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()
        raise RuntimeError("No executable batch size found, reached zero.")

    return decorated
