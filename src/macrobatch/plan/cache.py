"""What was measured once, remembered: a folder of small JSON files, one for each thing that was measured.

A file is written beside its place and then moved there, so that a reader sees all of it or none, and of several writers
the last one wins. A file that cannot be read, for whatever reason, counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Cache"]

_LOG = logging.getLogger("macrobatch")


class Cache:
    """Values by a key of plain values.

    Args:
        folder: where the files are; None remembers nothing.

    ```pycon
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Cache(Path(folder)).store({"model": "a"}, {"size": 8})
    ...     Cache(Path(folder)).load({"model": "a"}), Cache(Path(folder)).load({"model": "b"})
    ({'size': 8}, None)

    ```
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, Any]) -> Path | None:
        """The file for a key."""
        if self.folder is None:
            return None
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"micro-batch-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def load(self, key: Mapping[str, Any]) -> Any:
        """What was stored under a key, or None."""
        path = self.path(key)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != json.loads(json.dumps(key)):
                raise ValueError("it is about something else")
            return content["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            self.complain(key, error)
            return None

    def store(self, key: Mapping[str, Any], value: Any) -> None:
        """Remember a value of plain values. Where that fails, a line in the log says so, and nothing else happens."""
        path = self.path(key)
        if path is None:
            return
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".micro-batch-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, "value": value}, file, indent=1)
            os.replace(temporary, path)
        except OSError as error:
            _LOG.warning("micro-batch: what was measured cannot be remembered in %s: %s", path, error)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def complain(self, key: Mapping[str, Any], error: Exception) -> None:
        """One line about a file that is not what it should be."""
        _LOG.warning("micro-batch: %s is ignored and will be written anew: %s", self.path(key), _line(error))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
