"""What is in the files of a checkpoint: whether it fits, random states, and weights in several files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from macrobatch.accelerate.utils.constants import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from macrobatch.checkpoint import save_file
from macrobatch.errors import ArgumentError, StateError

__all__ = [
    "by_rank",
    "check_pending",
    "check_random_states",
    "check_weights",
    "num_bytes",
    "numbered",
    "numbered_folders",
    "random_states",
    "save_weights",
    "set_random_states",
]

_GENERATORS = ("random_state", "numpy_random_seed", "torch_manual_seed", "torch_cuda_manual_seed")
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)

# --- names ---


def numbered(name: str, index: int) -> str:
    """A file's name, for the how-manieth object."""
    stem, _, suffix = name.rpartition(".")
    return name if index == 0 else f"{stem}_{index}.{suffix}"


def numbered_folders(base: Path) -> list[Path]:
    """Checkpoints named automatically, the oldest first."""
    found = [
        (int(match[1]), path) for path in base.glob("*") if (match := re.fullmatch(r"checkpoint_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def by_rank(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The files of all ranks; they end at the last that is there, so that one between that is missing is noticed."""
    numbers = [
        int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(rf"{stem}_(\d+)\.{suffix}", path.name))
    ]
    return [folder / f"{stem}_{rank}.{suffix}" for rank in range(max(numbers, default=-1) + 1)]


# --- whether a state fits ---


def check_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not a model's; of tied ones, one may be there for all.

    Raises:
        StateError: some are missing, too many, or of other shapes.
    """
    own = model.state_dict()
    missing = {name for name in own if name not in state}
    tied = {name for name in missing if any(_same(own[name], own[other]) for other in own if other in state)}
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if wrong or missing - tied:
        raise StateError(
            "load_state",
            given=f"weights without {sorted(missing - tied)[:3]}, with {wrong[:3]} that do not fit",
            expected=f"those of {type(model).__name__}",
            fix="build the model as it was when it was saved",
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def check_pending(states: Sequence[Any]) -> None:
    """Refuse what are not the windows under way of all ranks.

    Raises:
        StateError: they are something else.
    """
    counts = {len(state["windows"]) if isinstance(state, Mapping) and "windows" in state else -1 for state in states}
    if -1 in counts or len(counts) > 1:
        raise StateError(
            "load_state",
            given=f"{states!r:.100}",
            expected="the windows under way, as many for each rank",
            fix="go on from another checkpoint",
        )


# --- random states ---


def random_states() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch."""
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = state
    return {
        "random_state": random.getstate(),
        "numpy_random_seed": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch_manual_seed": torch.get_rng_state(),
        "torch_cuda_manual_seed": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
    }


def check_random_states(states: Any) -> None:
    """Refuse what `random_states` did not return; None is nothing to restore.

    Raises:
        StateError: it is something else.
    """
    if states is not None and not (isinstance(states, Mapping) and {*_GENERATORS} <= {*states}):  # pyright: ignore[reportUnknownArgumentType]
        raise StateError(
            "load_state",
            given=f"random states {states!r:.100}",
            expected=f"a dict of {_GENERATORS}",
            fix="go on from another checkpoint",
        )


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go on with what `random_states` returned."""
    version, numbers, gauss_next = states["random_state"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, *rest = states["numpy_random_seed"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch_manual_seed"])
    if states["torch_cuda_manual_seed"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"][: torch.cuda.device_count()])


# --- weights in several files ---


def num_bytes(size: int | str) -> int:
    """A size in bytes, of text like "500MB".

    Raises:
        ArgumentError: it is none.
    """
    match = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)", str(size).upper())
    if type(size) is int and size > 0:
        return size
    if match is None or not int(match[1]):
        raise ArgumentError(
            "max_shard_size", given=repr(size), expected='bytes > 0, or text like "500MB"', fix='"10GB"'
        )
    base = 1024 if "I" in match[2] else 1000
    return int(match[1]) * base ** "BKMGT".index(match[2][0])


def _shards(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    return shards


def save_weights(state: Mapping[str, Tensor], folder: Path, limit: int, safe_serialization: bool) -> None:
    """Write weights to one file or, if they have more bytes than `limit`, to several and an index, as Hugging Face's
    libraries read them. Files of weights that were there before are removed, since readers would prefer some of them.
    """
    name, index_name = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    if not safe_serialization:
        name, index_name = WEIGHTS_NAME, WEIGHTS_INDEX_NAME
    stem, _, suffix = name.rpartition(".")
    shards = _shards(state, limit)
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [name]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
    written = {*files}
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        places = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
        partial = folder / f".{index_name}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(folder / index_name)
        written.add(index_name)
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()
