"""What a launcher's environment variables say about this process."""

from __future__ import annotations

import os
from collections.abc import Mapping

from macrobatch.errors import MacrobatchError

__all__ = ["LaunchError", "integer", "text"]


class LaunchError(MacrobatchError, RuntimeError):
    """The processes of a run could not be brought together."""


def text(launcher: str, *names: str, environ: Mapping[str, str] = os.environ) -> str:
    """The first of these variables that is set.

    Raises:
        LaunchError: none is; naming them and the launcher that should have set them.
    """
    for name in names:
        if environ.get(name):
            return environ[name]
    raise LaunchError(
        f"the environment of {launcher}",
        given=f"no {' and no '.join(names)}",
        expected=f"{launcher} to have set it",
        fix=f"start the script with {launcher}, or pass the rank and the address to launch() yourself",
    )


def integer(launcher: str, *names: str, environ: Mapping[str, str] = os.environ) -> int:
    """As `text`, for a number.

    Raises:
        LaunchError: it is not set, or is no number.
    """
    value = text(launcher, *names, environ=environ)
    try:
        return int(value)
    except ValueError:
        raise LaunchError(
            f"the environment of {launcher}",
            given=f"{' or '.join(names)}={value!r}",
            expected="an integer",
            fix=f"start the script with {launcher}",
        ) from None


def has(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable is set."""
    return bool(environ.get(name))
