"""Writing and reading single files and whole folders of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch

from macrobatch.errors import ArgumentError, StateError

__all__ = [
    "check_complete",
    "check_weights_only",
    "load_file",
    "partial_folder",
    "recover",
    "replaced_folder",
    "save_file",
]

_CONTENTS = ".contents.json"
"""In a replaced folder: the names of what was written with it, in contrast to what others put there."""


def save_file(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a tree of tensors and plain values; at every moment the old file, or the new one, is whole.

    Args:
        path: ending in `.safetensors` for a flat dict of tensors in that format
            (https://huggingface.co/docs/safetensors), else in torch's.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(value, partial, metadata={"format": "pt"})
        else:
            torch.save(value, partial)
        _flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def load_file(path: str | os.PathLike[str], **options: Any) -> Any:
    """Read what `save_file` wrote; nothing in the file is run.

    Args:
        options: as for `torch.load`.

    Raises:
        StateError: the file is not there, not whole, or holds more than tensors and plain values.
        ArgumentError: `weights_only=False`, with which a file could run any code.
    """
    path = Path(path)
    check_weights_only(options.get("weights_only", True))
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        settings: dict[str, Any] = {"map_location": "cpu", "weights_only": True, **options}
        return torch.load(path, **settings)
    except FileNotFoundError:
        problem, fix = "no file", "check the path; list the folder to see what was saved"
    except UnpicklingError as error:
        problem = f"a file with more than tensors and plain values ({str(error).partition(chr(10))[0]:.100})"
        fix = "save it again from state_dicts of tensors, numbers and text"
    except Exception as error:  # a damaged pickle may fail with anything
        text = str(error).partition("\n")[0]
        problem = f"a file that is not whole, or another one ({type(error).__name__}: {text:.80})"
        fix = "go on from another checkpoint"
    raise StateError(f"the checkpoint file {path.name!r}", given=problem, expected=f"what was saved at {path}", fix=fix)


@contextmanager
def replaced_folder(folder: str | os.PathLike[str]) -> Generator[Path]:
    """Context that yields an empty folder to write into. At its end, and not before, that stands in the place of
    `folder`; after an error, or a kill, the old one is as it was. Files that others put there are taken over.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = partial_folder(folder), folder.with_name(f".{folder.name}.old")
    recover(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        names = sorted(path.name for path in partial.iterdir())
        (partial / _CONTENTS).write_text(json.dumps(names), encoding="utf-8")
        for path in partial.rglob("*"):
            _flush(path)
        _flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _flush(folder.parent)
    recover(folder)


def partial_folder(folder: str | os.PathLike[str]) -> Path:
    """What `replaced_folder` yields, for others who write there at the same time."""
    folder = Path(folder).absolute()
    return folder.with_name(f".{folder.name}.partial")


def recover(folder: str | os.PathLike[str]) -> None:
    """Bring `replaced_folder` to its end, or the old folder back, if a kill came in between."""
    folder = Path(folder).absolute()
    old = folder.with_name(f".{folder.name}.old")
    if not old.exists():
        return
    if not folder.exists():
        old.rename(folder)
        return
    own = [_CONTENTS, *(_contents(old) or ())]
    for path in old.iterdir():
        if path.name not in own and not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(old)


def check_complete(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder of `replaced_folder` that has lost a file since. One that knows no list of its files passes.

    Raises:
        StateError: files are missing, or their list is damaged.
    """
    folder = Path(folder)
    names = _contents(folder)
    missing = [name for name in names or () if not (folder / name).exists()]
    if missing or (names is None and (folder / _CONTENTS).exists()):
        raise StateError(
            f"the checkpoint {folder}",
            given=f"no {', '.join(missing[:3])}" if missing else f"a damaged {_CONTENTS}",
            expected="all files that were saved together",
            fix="copy the folder again, or go on from another checkpoint",
        )


def _contents(folder: Path) -> list[str] | None:
    """The files that were written together; None if that is not known."""
    try:
        names = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_weights_only(weights_only: object) -> None:
    """Refuse to run what a foreign file may hold.

    Raises:
        ArgumentError: it is false.
    """
    if not weights_only:
        raise ArgumentError(
            "weights_only",
            given=False,
            expected="True, since a pickle can run any code",
            fix="leave it out, or call torch.load yourself for files that you trust",
        )
