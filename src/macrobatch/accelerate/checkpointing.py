"""Saving and loading everything: models, optimizers, schedulers, loaders, random states, and the window under way."""

from __future__ import annotations

import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from macrobatch.accelerate.attendance import Attendance
from macrobatch.accelerate.counting import WindowCounting
from macrobatch.accelerate.original import OriginalCounting
from macrobatch.accelerate.position import check_state
from macrobatch.accelerate.processes import Processes
from macrobatch.accelerate.sharded_states import load_optimizer, load_weights, optimizer_state, whole_weights
from macrobatch.accelerate.state_files import (
    by_rank,
    check_pending,
    check_random_states,
    check_weights,
    num_bytes,
    numbered,
    numbered_folders,
    random_states,
    save_weights,
    set_random_states,
)
from macrobatch.accelerate.utils.constants import (
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_WEIGHTS_NAME,
    SAMPLER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    WEIGHTS_NAME,
)
from macrobatch.accelerate.utils.other import (
    clean_state_dict_for_safetensors,
    extract_model_from_parallel,
    model_has_dtensor,
)
from macrobatch.checkpoint import load_file, replaced_folder, save_file
from macrobatch.checkpoint.fit import check_optimizer, check_scheduler
from macrobatch.checkpoint.io import check_complete, partial_folder, recover
from macrobatch.errors import ArgumentError, StateError, WindowError
from macrobatch.launch.group import together

__all__ = ["Checkpoints"]

_WINDOW_NAME = "window"


class Checkpoints(Processes):
    """The part of `Accelerator` that saves and loads. A checkpoint is a folder, there as a whole or not at all.
    An error on one rank is raised on all."""

    _models: list[nn.Module]
    _optimizers: list[Any]
    _schedulers: list[Any]
    _dataloaders: list[Any]
    _custom_objects: list[Any]
    scaler: Any
    project_configuration: Any
    _counting: WindowCounting | OriginalCounting

    def _setup_checkpoints(self) -> None:
        self._save_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._load_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._attendance = Attendance()
        self._is_alone = False

    @property
    def _bare_models(self) -> list[nn.Module]:  # scripts' hooks expect no wrappers
        return [extract_model_from_parallel(model) for model in self._models]

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load these, too.

        Raises:
            ArgumentError: one has no `state_dict` or no `load_state_dict`.
        """
        wrong = [obj for obj in objects if not (hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict"))]
        if wrong:
            raise ArgumentError(
                "register_for_checkpointing",
                given=[type(obj).__name__ for obj in wrong],
                expected="objects with state_dict and load_state_dict",
                fix="give them both",
            )
        self._custom_objects.extend(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(models, weights, folder)` before a checkpoint is written; it may take models and weights out of
        the lists, to save them in a way of its own."""
        handle = RemovableHandle(self._save_hooks)
        self._save_hooks[handle.id] = hook
        return handle

    def register_load_state_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(models, folder)` before a checkpoint is read; it may take models out of the list."""
        handle = RemovableHandle(self._load_hooks)
        self._load_hooks[handle.id] = hook
        return handle

    def save_state(self, output_dir: Any = None, safe_serialization: bool = True, **save_model_func_kwargs: Any) -> str:
        """Write a checkpoint, between any two micro-batches: inside a window, too. All ranks have to call.

        Where only the main process does, after an update and with a folder that is given, there is a checkpoint
        without the other ranks' random states, and a warning.

        Args:
            output_dir: its folder; not needed with automatic naming.
            safe_serialization: weights as safetensors, instead of torch's format.

        Returns:
            The folder.

        Raises:
            WindowError: a micro-batch is under way, or only the main process called in the middle of a window.
        """
        with self._together("save_state") if self._takes_all else nullcontext():
            folder = self._new_folder(output_dir)
            own = self._counting.state_dict()
        present = "all"
        if not self._takes_all:
            present = self._attendance.meet(str(folder), rank=self.process_index, world_size=self.num_processes)
        if present == "main" and any(window["pending"] is not None for window in own["windows"]):
            raise WindowError(
                "save_state",
                given="a call on the main process only, in the middle of a window",
                expected="one on all ranks, each of which has a part of the window's gradients",
                fix="call it outside of `if accelerator.is_main_process`, or only `if accelerator.sync_gradients`",
            )
        if present != "late":
            self._is_alone = present == "main"
            try:
                self._write(folder, own, safe_serialization)
            finally:
                self._is_alone = False
        self.project_configuration.iteration += 1
        return str(folder)

    @property
    def _takes_all(self) -> bool:
        """Whether a save needs all ranks, so that none of them could be alone."""
        return self.project_configuration.automatic_checkpoint_naming or any(map(model_has_dtensor, self._models))

    def _write(self, folder: Path, own_pending: dict[str, Any], safe_serialization: bool) -> None:
        config: Any = self.project_configuration
        pending = self._gathered(own_pending)
        generators = self._gathered(random_states())
        with self._together("save_state"):
            loaders = [loader.state_dict() for loader in self._dataloaders if hasattr(loader, "state_dict")]
            models, weights = self._bare_models, [self.get_state_dict(model) for model in self._models]
            optimizers = [optimizer_state(optimizer, self._models) for optimizer in self._optimizers]
        name = SAFE_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME
        with self._together("save_state"), ExitStack() as stack:
            with self._together("save_state"):
                place = stack.enter_context(replaced_folder(folder)) if self._writes else partial_folder(folder)
            with self._together("save_state"):
                for hook in self._save_hooks.values():
                    hook(models, weights, str(place))
            if self._writes:
                _save_all(place, name, map(clean_state_dict_for_safetensors, weights))
                _save_all(place, f"{OPTIMIZER_NAME}.bin", optimizers)
                _save_all(place, f"{SCHEDULER_NAME}.bin", (each.state_dict() for each in self._schedulers))
                _save_all(place, f"{SAMPLER_NAME}.bin", loaders)
                if self.scaler is not None:
                    save_file(self.scaler.state_dict(), place / SCALER_NAME)
                for rank, state in enumerate(generators):
                    save_file(state, place / f"{RNG_STATE_NAME}_{rank}.pkl")
                for rank, state in enumerate(pending):
                    save_file(state, place / f"{_WINDOW_NAME}_{rank}.bin")
                for index, obj in enumerate(self._custom_objects):
                    save_file(obj.state_dict(), place / f"custom_checkpoint_{index}.pkl")
        with self._together("save_state"):
            if self._writes and config.automatic_checkpoint_naming and config.total_limit is not None:
                for old in numbered_folders(folder.parent)[: -config.total_limit]:
                    shutil.rmtree(old)

    def load_state(self, input_dir: Any = None, load_kwargs: Any = None, **load_model_func_kwargs: Any) -> None:
        """Go on from a checkpoint, of any number of ranks (of as many, in the middle of a window of a sharded model).
        All ranks have to call. Nothing is changed unless all of it can be read and fits.

        Args:
            input_dir: its folder; by default, with automatic naming, the latest.
            load_kwargs: as for `torch.load`, of custom objects.

        Raises:
            StateError: a file is missing, not whole, or does not fit.
        """
        with self._together("load_state"):
            if input_dir is not None and self._writes:
                recover(input_dir)
        with self._together("load_state"):
            folder = self._found(input_dir)
            check_complete(folder)
            saved = self._read(folder, load_kwargs or {})
            rank, world_size = self.process_index, self.num_processes
            go_on = self._counting.fitted(saved.pending, rank=rank, world_size=world_size)
        models = self._bare_models
        with self._together("load_state"):
            for hook in self._load_hooks.values():
                hook(models, str(folder))
        with self._together("load_state"):
            weights = [_read_weights(folder, index) for index in range(len(models))]
            for model, state in zip(models, weights, strict=True):
                check_weights(model, state)
        with self._together("load_state"):
            go_on()
        with self._together("load_state"):
            for model, state in zip(models, weights, strict=True):
                load_weights(model, state)
        with self._together("load_state"):
            for optimizer, state in zip(self._optimizers, saved.optimizers, strict=True):
                load_optimizer(optimizer, state, self._models)
        with self._together("load_state"):
            self._take_over(saved, folder.name)

    def _take_over(self, saved: _Saved, name: str) -> None:
        """What concerns this rank alone."""
        for scheduler, state in zip(self._schedulers, saved.schedulers, strict=True):
            scheduler.load_state_dict(state)
        for loader, state in zip(self._restorable, saved.loaders, strict=False):
            loader.load_state_dict(state)
        for obj, state in zip(self._custom_objects, saved.custom, strict=True):
            obj.load_state_dict(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(saved.scaler)
        number = re.fullmatch(r"checkpoint_(\d+)", name)
        if number and self.project_configuration.automatic_checkpoint_naming:
            self.project_configuration.iteration = int(number[1]) + 1
        if saved.generators is not None:
            set_random_states(saved.generators)

    def _read(self, folder: Path, load_kwargs: Mapping[str, Any]) -> _Saved:
        """All of a checkpoint but the weights, checked."""
        optimizers, schedulers = (
            [load_file(folder / numbered(f"{name}.bin", index)) for index in range(len(objects))]
            for name, objects in ((OPTIMIZER_NAME, self._optimizers), (SCHEDULER_NAME, self._schedulers))
        )
        for optimizer, state in zip(self._optimizers, optimizers, strict=True):
            check_optimizer("load_state", getattr(optimizer, "optimizer", optimizer), state)
        for scheduler, state in zip(self._schedulers, schedulers, strict=True):
            check_scheduler("load_state", scheduler, state)
        pending = [load_file(path) for path in by_rank(folder, _WINDOW_NAME, "bin")]
        check_pending(pending)
        paths = [folder / numbered(f"{SAMPLER_NAME}.bin", index) for index in range(len(self._restorable))]
        loaders = [load_file(path) for path in paths if pending or path.exists()]  # the original saves none
        for state in loaders:
            check_state(state)
        indices = range(len(self._custom_objects))
        custom = [load_file(folder / f"custom_checkpoint_{index}.pkl", **load_kwargs) for index in indices]
        path = folder / f"{RNG_STATE_NAME}_{self.process_index}.pkl"
        is_there = path.exists() or self.process_index < len(pending)
        generators = load_file(path) if is_there else None
        check_random_states(generators)
        scaler = load_file(folder / SCALER_NAME) if self.scaler is not None else None
        return _Saved(optimizers, schedulers, loaders, custom, pending, generators, scaler)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """A model's weights, whole; of a sharded one, gathered on the host."""
        model = extract_model_from_parallel(model) if unwrap else model
        return whole_weights(model)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write an object to a file, on the main process (of each machine, if the project says so)."""
        if self._writes:
            save_file(clean_state_dict_for_safetensors(obj) if safe_serialization else obj, f)

    def save_model(
        self, model: nn.Module, save_directory: Any, max_shard_size: int | str = "10GB", safe_serialization: bool = True
    ) -> None:
        """Write a model's weights, in several files with an index if they are larger than `max_shard_size`.

        Args:
            max_shard_size: bytes, or text like "500MB".
        """
        limit = num_bytes(max_shard_size)
        state = clean_state_dict_for_safetensors(self.get_state_dict(model))
        if self._writes:
            save_weights(state, Path(save_directory), limit, safe_serialization)

    def _new_folder(self, output_dir: Any) -> Path:
        config: Any = self.project_configuration
        base = output_dir
        if config.automatic_checkpoint_naming and config.project_dir is not None:
            base = config.project_dir
        if base is None:
            raise ArgumentError("output_dir", given=None, expected="a folder", fix="pass one, or project_dir=")
        if not config.automatic_checkpoint_naming:
            return Path(base)
        folder = Path(base) / "checkpoints" / f"checkpoint_{config.iteration}"
        if folder.exists():
            raise ArgumentError(
                "the checkpoint folder",
                given=f"{folder}, which exists",
                expected="a new one",
                fix="load_state() first, to count on from there, or set project_configuration.iteration",
            )
        return folder

    def _found(self, input_dir: Any) -> Path:
        config = self.project_configuration
        if input_dir is not None:
            folder = Path(input_dir)
        elif config.automatic_checkpoint_naming and config.project_dir is not None:
            base = Path(config.project_dir) / "checkpoints"
            folders = numbered_folders(base)
            folder = folders[-1] if folders else base
        else:
            raise ArgumentError("input_dir", given=None, expected="a folder", fix="pass one, or name automatically")
        if not folder.is_dir() or not any(folder.iterdir()):
            raise StateError("load_state", given=str(folder), expected="a checkpoint's folder", fix="check the path")
        return folder

    @property
    def _writes(self) -> bool:
        each = self.project_configuration.save_on_each_node
        return self.is_local_main_process if each else self.is_main_process

    @property
    def _restorable(self) -> list[Any]:
        return [loader for loader in self._dataloaders if hasattr(loader, "load_state_dict")]

    def _together(self, what: str) -> AbstractContextManager[None]:
        """Context that raises on all ranks if it does on one, at its end, where all ranks wait for each other."""
        return together(what, all_ranks=self.num_processes > 1 and not self._is_alone)

    def _gathered(self, state: Any) -> list[Any]:
        if self.num_processes == 1 or self._is_alone:
            return [state]
        states: list[Any] = [None] * self.num_processes
        dist.all_gather_object(states, state)
        return states


class _Saved(NamedTuple):
    """What is in a checkpoint besides weights."""

    optimizers: list[Any]
    schedulers: list[Any]
    loaders: list[Any]
    custom: list[Any]
    pending: list[Any]
    generators: Any
    scaler: Any


def _save_all(folder: Path, name: str, states: Iterable[Any]) -> None:
    for index, state in enumerate(states):
        save_file(state, folder / numbered(name, index))


def _read_weights(folder: Path, index: int) -> dict[str, Tensor]:
    safe = folder / numbered(SAFE_WEIGHTS_NAME, index)
    return load_file(safe if safe.exists() else folder / numbered(WEIGHTS_NAME, index))
