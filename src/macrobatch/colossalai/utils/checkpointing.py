"""Checkpoints: a file with the model, and if wanted all that a run needs to go on from there."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from macrobatch.checkpoint import load_file, save_file
from macrobatch.checkpoint.fit import check_optimizer, check_scheduler
from macrobatch.colossalai.context import ParallelMode
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.core.handover import share_of
from macrobatch.errors import StateError
from macrobatch.launch.group import together

__all__ = ["load_checkpoint", "save_checkpoint"]


class Stateful(Protocol):
    """What has a state that can be saved: an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any, /) -> object: ...


class Checked(Stateful, Protocol):
    """What can tell whether a state fits: an engine."""

    def check_state_dict(self, state_dict: Any, /) -> None: ...


def save_checkpoint(
    file: str | Path,
    epoch: int,
    model: nn.Module,
    optimizer: Stateful | None = None,
    lr_scheduler: Stateful | None = None,
    engine: Checked | None = None,
) -> None:
    """Write a checkpoint, which is there as a whole or not at all.

    The first rank writes it. With an engine, all ranks have to call this: each one's part of the window under way is
    in a file of its own beside it, `{file}.{number}.rank{rank}`.

    Args:
        file: where to; a file that is there is replaced.
        epoch: the one that was finished last, for `load_checkpoint` to return.
        model: whose parameters and buffers are saved.
        optimizer: to be saved as well.
        lr_scheduler: to be saved as well.
        engine: whose window is to be saved as well: its gradients so far, its weights and the loss scale.

    Raises:
        PeerError: another rank could not write its part; the checkpoint that was there before still is.
    """
    path = Path(file)
    others = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    checkpoint: dict[str, Any] = {"epoch": epoch}
    if engine is not None:
        with _together("save_checkpoint"):
            checkpoint["window"] = engine.state_dict()
        checkpoint["world_size"] = gpc.get_world_size(ParallelMode.DATA)
        checkpoint["number"] = _write_parts(path, checkpoint["window"])
    rank = gpc.get_global_rank()
    with _together("save_checkpoint", all_ranks=engine is not None):
        if rank == 0:
            checkpoint["model"] = model.state_dict()
            checkpoint |= {name: each.state_dict() for name, each in others.items() if each is not None}
            save_file(checkpoint, path)
    if engine is not None:
        with _together("save_checkpoint"):
            for old in path.parent.glob(f"{_escaped(path.name)}.*.rank{rank}"):
                if old != _part(path, checkpoint["number"], rank):
                    old.unlink(missing_ok=True)


def load_checkpoint(
    file: str | Path,
    model: nn.Module,
    optimizer: Stateful | None = None,
    lr_scheduler: Stateful | None = None,
    strict: bool = True,
    engine: Checked | None = None,
) -> int:
    """Take over a checkpoint, with all that is asked for, or refuse it and change nothing.

    Every rank calls this; with an engine, all of them take it over, or none. Nothing but tensors and plain values is
    read from the file, which could come from anywhere.

    Args:
        file: what `save_checkpoint` wrote.
        model: takes its parameters and buffers.
        optimizer: takes its state.
        lr_scheduler: takes its state.
        strict: whether the model has to have the very entries of the file.
        engine: goes on with the saved window, also over another number of ranks.

    Returns:
        The epoch that it was saved with.

    Raises:
        StateError: the file is damaged, lacks something that was asked for, or is of another model.
        PeerError: with an engine, another rank refused it.
    """
    path = Path(file)
    with _together("load_checkpoint", all_ranks=engine is not None):
        checkpoint = _read(path)
        wanted = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "window": engine}
        for name in ("epoch", "model", *(name for name, each in wanted.items() if each is not None)):
            if name not in checkpoint:
                raise _unfit(path, f"no {name!r}, only {sorted(checkpoint)}", f"one that was saved with {name}")
        _check_model(path, checkpoint["model"], model, strict)
        if optimizer is not None:
            check_optimizer(f"the checkpoint {path}", getattr(optimizer, "optim", optimizer), checkpoint["optimizer"])
        if lr_scheduler is not None:
            check_scheduler(f"the checkpoint {path}", lr_scheduler, checkpoint["lr_scheduler"])
        window = None if engine is None else _window(path, checkpoint)
        if engine is not None:
            engine.check_state_dict(window)
    with _together("load_checkpoint", all_ranks=engine is not None), ExitStack() as undo:
        for each, name in ((lr_scheduler, "lr_scheduler"), (optimizer, "optimizer")):
            if each is not None:
                undo.callback(each.load_state_dict, each.state_dict())  # for those that refuse a part of it themselves
                each.load_state_dict(checkpoint[name])
        if engine is not None:
            engine.load_state_dict(window)
        model.load_state_dict(checkpoint["model"], strict=strict)
        undo.pop_all()
    return checkpoint["epoch"]


# --- the parts of the ranks


def _write_parts(path: Path, window: Mapping[str, Any]) -> str:
    """Write every rank's own window, but the first one's; the number that they have in common."""
    numbers = [secrets.token_hex(4)]
    if gpc.world_size > 1:
        dist.broadcast_object_list(numbers, src=0)
    rank = gpc.get_global_rank()
    with _together("save_checkpoint"):
        if rank > 0:
            save_file({"window": window}, _part(path, numbers[0], rank))
    return numbers[0]


def _together(what: str, *, all_ranks: bool = True) -> AbstractContextManager[None]:
    """Context at whose end all ranks wait for each other, and fail if one did."""
    fix = "see what those say; all ranks need one folder that each of them can use"
    return together(what, fix=fix, all_ranks=all_ranks and gpc.world_size > 1)


def _window(path: Path, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    saved = checkpoint.get("world_size")
    if type(saved) is not int or saved < 1:
        raise _unfit(path, f"{saved!r} ranks that saved it", "their number")
    rank, world_size = gpc.get_global_rank(), gpc.get_world_size(ParallelMode.DATA)
    needed = (rank,) if saved == world_size else range(saved)
    states: list[Any] = [None] * saved
    for each in needed:
        source = checkpoint if each == 0 else _read(_part(path, str(checkpoint.get("number")), each))
        states[each] = source.get("window")
    return share_of(states, rank=rank, world_size=world_size)


def _part(path: Path, number: str, rank: int) -> Path:
    return path.with_name(f"{path.name}.{number}.rank{rank}")


def _escaped(name: str) -> str:
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _read(path: Path) -> dict[str, Any]:
    content = load_file(path)
    if not isinstance(content, dict):
        raise _unfit(path, type(content).__name__, "a dict, as save_checkpoint writes")
    return content


# --- what fits what


def _check_model(path: Path, state: object, model: nn.Module, strict: bool) -> None:
    own = model.state_dict()
    if not isinstance(state, Mapping):
        raise _unfit(path, f"a model of type {type(state).__name__}", "the model's state_dict")
    wrong = [
        f"{name} of {tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__}"
        for name, value in state.items()
        if isinstance(own.get(name), torch.Tensor) and getattr(value, "shape", None) != own[name].shape
    ]
    if strict:
        wrong += [f"no {name}" for name in own if name not in state]
        wrong += [f"{name}, which the model has not" for name in state if name not in own]
    if wrong:
        raise _unfit(path, ", ".join(wrong[:5]), "the model's own parameters and buffers, in its shapes")


def _unfit(path: Path, given: str, expected: str) -> StateError:
    return StateError(
        f"the checkpoint {path}", given=given, expected=expected, fix="load one that was saved by the same script"
    )
