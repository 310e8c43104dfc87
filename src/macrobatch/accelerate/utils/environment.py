"""The environment variables of launchers and users: the one module of this door that reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from macrobatch.accelerate.utils.absent import absent
from macrobatch.errors import ArgumentError

__all__ = [
    "are_libraries_initialized",
    "clear_environment",
    "debug_mode",
    "default_normalize",
    "device_from_env",
    "dynamo_from_env",
    "get_int_from_env",
    "gradient_accumulation_steps_from_env",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "purge_accelerate_environment",
    "str_to_bool",
]


def str_to_bool(value: str, to_bool: bool = False) -> int:
    """1 for y, yes, t, true, on, 1; 0 for n, no, f, false, off, 0; True and False with `to_bool`.

    ```pycon
    >>> str_to_bool("Yes"), str_to_bool("off")
    (1, 0)

    ```
    """
    lowered = value.lower()
    if lowered in ("y", "yes", "t", "true", "on", "1"):
        return True if to_bool else 1
    if lowered in ("n", "no", "f", "false", "off", "0"):
        return False if to_bool else 0
    raise ValueError(f"a truth value: given {value!r}; expected yes or no. To fix it, pass 1 or 0.")


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """A variable's truth value."""
    return bool(str_to_bool(os.environ.get(key, str(default))))


def parse_choice_from_env(key: str, default: Any = "no") -> str:
    """A variable, as text."""
    return os.environ.get(key, str(default))


def get_int_from_env(env_keys: list[str], default: int) -> int:
    """The first of several variables that is a number >= 0."""
    return next((value for key in env_keys if (value := int(os.environ.get(key, "-1"))) >= 0), default)


def gradient_accumulation_steps_from_env() -> int | None:
    """ACCELERATE_GRADIENT_ACCUMULATION_STEPS, as the launcher sets it; None if it is not set.

    Raises:
        ArgumentError: it is not an integer >= 1.
    """
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError(name, given=repr(text), expected="an integer >= 1", fix=f"unset {name}")
    return int(text)


def default_normalize() -> str:
    """MACROBATCH_NORMALIZE: what a window's gradient is divided by where a script does not say."""
    return os.environ.get("MACROBATCH_NORMALIZE", "") or "exact"


@cache
def debug_mode() -> bool:
    """ACCELERATE_DEBUG_MODE: whether collectives compare shapes first. Read once, and again after a reset."""
    return parse_flag_from_env("ACCELERATE_DEBUG_MODE")


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Those of some packages that have been imported.

    ```pycon
    >>> are_libraries_initialized("torch", "no_such_package")
    ['torch']

    ```
    """
    return [name for name in library_names if name in sys.modules]


def device_from_env() -> str | None:
    """ACCELERATE_TORCH_DEVICE: where to compute, whatever there is; None if it is not set."""
    return os.environ.get("ACCELERATE_TORCH_DEVICE") or None


def dynamo_from_env() -> tuple[str | None, str | None]:
    """ACCELERATE_DYNAMO_BACKEND and ACCELERATE_DYNAMO_MODE, as the launcher sets them; None for what is not set."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND"), os.environ.get("ACCELERATE_DYNAMO_MODE")


@contextmanager
def patch_environment(**kwargs: Any) -> Generator[None]:
    """Context with these variables (in upper case) set, and put back at its end."""
    names = [name.upper() for name in kwargs]
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update({name.upper(): str(value) for name, value in kwargs.items()})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def clear_environment() -> Generator[None]:
    """Context of an empty environment, put back at its end."""
    before = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def purge_accelerate_environment(func_or_cls: Any) -> Any:
    """Decorator: ACCELERATE_ variables that the function sets, or a test of the class or its subclasses, are gone after
    it."""
    if isinstance(func_or_cls, type):
        for name, test in list(vars(func_or_cls).items()):
            if name.startswith("test") and callable(test):
                setattr(func_or_cls, name, purge_accelerate_environment(test))
        func_or_cls.__init_subclass__ = classmethod(purge_accelerate_environment)  # pyright: ignore[reportAttributeAccessIssue]
        return func_or_cls

    @wraps(func_or_cls)
    def purged(*args: Any, **kwargs: Any) -> Any:
        before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
        try:
            return func_or_cls(*args, **kwargs)
        finally:
            for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
                del os.environ[name]
            os.environ.update(before)

    return purged


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
