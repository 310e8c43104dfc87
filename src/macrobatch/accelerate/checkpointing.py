"""Saving and loading everything: models, optimizers, schedulers, loaders, random states, and the window under way."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.hooks import RemovableHandle

from macrobatch.accelerate.processes import Processes
from macrobatch.accelerate.utils.constants import (
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    SAMPLER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from macrobatch.accelerate.utils.other import (
    clean_state_dict_for_safetensors,
    extract_model_from_parallel,
    model_has_dtensor,
)
from macrobatch.checkpoint import load_file, replaced_folder, save_file
from macrobatch.checkpoint.io import recover
from macrobatch.errors import ArgumentError, StateError

__all__ = ["Checkpoints"]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Checkpoints(Processes):
    """The part of `Accelerator` that saves and loads. A checkpoint is a folder, there as a whole or not at all."""

    _models: list[nn.Module]
    _optimizers: list[Any]
    _schedulers: list[Any]
    _dataloaders: list[Any]
    _custom_objects: list[Any]
    scaler: Any
    project_configuration: Any
    _pending_state: Callable[[], dict[str, Any]]
    _load_pending_state: Callable[[Sequence[dict[str, Any]]], None]

    def _setup_checkpoints(self) -> None:
        self._save_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._load_hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()

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

        Args:
            output_dir: its folder; not needed with automatic naming.
            safe_serialization: weights as safetensors, instead of torch's format.

        Returns:
            The folder.
        """
        config: Any = self.project_configuration
        folder = Path(output_dir) if output_dir is not None and not config.automatic_checkpoint_naming else None
        if config.automatic_checkpoint_naming:
            folder = Path(str(config.project_dir or output_dir)) / "checkpoints" / f"checkpoint_{config.iteration}"
        if folder is None:
            raise ArgumentError("output_dir", given=None, expected="a folder", fix="pass one, or name automatically")
        if config.automatic_checkpoint_naming and folder.exists():
            raise ArgumentError(
                "the checkpoint folder",
                given=f"{folder}, which exists",
                expected="a new one",
                fix="load_state() first, to count on from there, or set project_configuration.iteration",
            )
        pending = self._gathered(self._pending_state())
        loaders = [loader.state_dict() for loader in self._dataloaders if hasattr(loader, "state_dict")]
        generators = self._gathered(_random_states())
        models, weights = list(self._models), [self.get_state_dict(model) for model in self._models]
        optimizers = [_optimizer_state(optimizer, self._models) for optimizer in self._optimizers]
        if self.is_main_process:
            with replaced_folder(folder) as place:
                for hook in self._save_hooks.values():
                    hook(models, weights, str(place))
                for index, state in enumerate(weights):
                    name = SAFE_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME
                    save_file(clean_state_dict_for_safetensors(state), place / _numbered(name, index))
                for index, state in enumerate(optimizers):
                    save_file(state, place / _numbered(f"{OPTIMIZER_NAME}.bin", index))
                for index, scheduler in enumerate(self._schedulers):
                    save_file(scheduler.state_dict(), place / _numbered(f"{SCHEDULER_NAME}.bin", index))
                for index, state in enumerate(loaders):
                    save_file(state, place / _numbered(f"{SAMPLER_NAME}.bin", index))
                if self.scaler is not None:
                    save_file(self.scaler.state_dict(), place / f"{SCALER_NAME}.pt")
                for rank, state in enumerate(generators):
                    save_file(state, place / f"{RNG_STATE_NAME}_{rank}.pkl")
                for rank, state in enumerate(pending):
                    save_file(state, place / f"window_{rank}.bin")
                for index, obj in enumerate(self._custom_objects):
                    save_file(obj.state_dict(), place / f"custom_checkpoint_{index}.pkl")
            if config.automatic_checkpoint_naming and config.total_limit is not None:
                for old in _numbered_folders(folder.parent)[: -config.total_limit]:
                    shutil.rmtree(old)
        config.iteration += 1
        self.wait_for_everyone()
        return str(folder)

    def load_state(self, input_dir: Any = None, load_kwargs: Any = None, **load_model_func_kwargs: Any) -> None:
        """Go on from a checkpoint, of any number of ranks. All ranks have to call. Nothing is changed unless all of it
        can be read and fits.

        Args:
            input_dir: its folder; by default, with automatic naming, the latest.
            load_kwargs: as for `torch.load`, of custom objects.

        Raises:
            StateError: a file is missing, not whole, or does not fit.
        """
        folder = self._found(input_dir)
        models = list(self._models)
        for hook in self._load_hooks.values():
            hook(models, str(folder))
        weights = [_read_weights(folder, index) for index in range(len(models))]
        for model, state in zip(models, weights, strict=True):
            _check_fits(extract_model_from_parallel(model), state)
        read: dict[str, list[Any]] = {
            name: [load_file(folder / _numbered(f"{name}.bin", index)) for index in range(len(objects))]
            for name, objects in ((OPTIMIZER_NAME, self._optimizers), (SCHEDULER_NAME, self._schedulers))
        }
        for optimizer, state in zip(self._optimizers, read[OPTIMIZER_NAME], strict=True):
            _check_groups(optimizer, state)
        restorable: list[Any] = [loader for loader in self._dataloaders if hasattr(loader, "load_state_dict")]
        paths = [folder / _numbered(f"{SAMPLER_NAME}.bin", index) for index in range(len(restorable))]
        loaders = [load_file(path) if path.exists() else None for path in paths]
        custom = [
            load_file(folder / f"custom_checkpoint_{index}.pkl", **(load_kwargs or {}))
            for index in range(len(self._custom_objects))
        ]
        pending = [load_file(path) for path in _by_rank(folder, "window_*.bin")]
        path = folder / f"{RNG_STATE_NAME}_{self.process_index}.pkl"
        generators = load_file(path) if path.exists() else None
        scaler = load_file(folder / f"{SCALER_NAME}.pt") if self.scaler is not None else None

        for model, state in zip(models, weights, strict=True):
            _load_weights(extract_model_from_parallel(model), state)
        for optimizer, state in zip(self._optimizers, read[OPTIMIZER_NAME], strict=True):
            _load_optimizer(optimizer, state, self._models)
        for scheduler, state in zip(self._schedulers, read[SCHEDULER_NAME], strict=True):
            scheduler.load_state_dict(state)
        for loader, state in zip(restorable, loaders, strict=True):
            if state is not None:
                loader.load_state_dict(state)
        for obj, state in zip(self._custom_objects, custom, strict=True):
            obj.load_state_dict(state)
        if scaler is not None:
            self.scaler.load_state_dict(scaler)
        if pending:
            self._load_pending_state(pending)
        number = re.fullmatch(r"checkpoint_(\d+)", folder.name)
        if number and self.project_configuration.automatic_checkpoint_naming:
            self.project_configuration.iteration = int(number[1]) + 1
        if generators is not None:
            _set_random_states(generators)
        self.wait_for_everyone()

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """A model's weights, whole; of a sharded one, gathered on the host."""
        model = extract_model_from_parallel(model) if unwrap else model
        return get_model_state_dict(model, options=_WHOLE) if model_has_dtensor(model) else model.state_dict()

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write an object to a file, on the main process (of each machine, if the project says so)."""
        if self.is_main_process or self.project_configuration.save_on_each_node:
            save_file(clean_state_dict_for_safetensors(obj) if safe_serialization else obj, f)

    def save_model(
        self, model: nn.Module, save_directory: Any, max_shard_size: int | str = "10GB", safe_serialization: bool = True
    ) -> None:
        """Write a model's weights, in several files with an index if they are larger than `max_shard_size`.

        Args:
            max_shard_size: bytes, or text like "500MB".
        """
        state = clean_state_dict_for_safetensors(self.get_state_dict(model))
        if not self.is_main_process:
            return
        folder = Path(save_directory)
        name, index_name = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        if not safe_serialization:
            name, index_name = WEIGHTS_NAME, WEIGHTS_INDEX_NAME
        shards = _shards(state, _num_bytes(max_shard_size))
        if len(shards) == 1:
            save_file(shards[0], folder / name)
            return
        stem, _, suffix = name.rpartition(".")
        files = [f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
        for file, shard in zip(files, shards, strict=True):
            save_file(shard, folder / file)
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        places = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
        (folder / index_name).write_text(text + "\n", encoding="utf-8")

    def _found(self, input_dir: Any) -> Path:
        config = self.project_configuration
        if input_dir is not None:
            folder = Path(input_dir)
        elif config.automatic_checkpoint_naming and config.project_dir is not None:
            base = Path(config.project_dir) / "checkpoints"
            for old in base.glob(".*.old"):
                recover(base / old.name[1 : -len(".old")])
            folders = _numbered_folders(base)
            folder = folders[-1] if folders else base
        else:
            raise ArgumentError("input_dir", given=None, expected="a folder", fix="pass one, or name automatically")
        recover(folder)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise StateError("load_state", given=str(folder), expected="a checkpoint's folder", fix="check the path")
        return folder

    def _gathered(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        if self.num_processes == 1:
            return [state]
        states: list[Any] = [None] * self.num_processes
        dist.all_gather_object(states, state)
        return states


def _numbered(name: str, index: int) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if index == 0 else f"{stem}_{index}.{suffix}"


def _numbered_folders(base: Path) -> list[Path]:
    found = [
        (int(match[1]), path) for path in base.glob("*") if (match := re.fullmatch(r"checkpoint_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda path: int(path.stem.rpartition("_")[2]))


def _read_weights(folder: Path, index: int) -> dict[str, Tensor]:
    safe = folder / _numbered(SAFE_WEIGHTS_NAME, index)
    return load_file(safe if safe.exists() else folder / _numbered(WEIGHTS_NAME, index))


def _check_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    missing = {name for name in own if name not in state}
    tied = {name for name in missing if any(own[name] is own[o] or _same(own[name], own[o]) for o in own if o in state)}
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


def _load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    if model_has_dtensor(model):
        set_model_state_dict(model, state, options=_WHOLE)
    else:
        model.load_state_dict(state, strict=False)  # tied weights are saved once; the rest was checked


def _optimizer_state(optimizer: Any, models: Sequence[nn.Module]) -> dict[str, Any]:
    owner = _sharded_owner(optimizer, models)
    if owner is None:
        return optimizer.state_dict()
    return get_optimizer_state_dict(owner, optimizer.optimizer, options=_WHOLE)


def _load_optimizer(optimizer: Any, state: dict[str, Any], models: Sequence[nn.Module]) -> None:
    owner = _sharded_owner(optimizer, models)
    if owner is None:
        optimizer.load_state_dict(state)
    else:
        set_optimizer_state_dict(owner, optimizer.optimizer, state, options=_WHOLE)


def _sharded_owner(optimizer: Any, models: Sequence[nn.Module]) -> nn.Module | None:
    ids = {id(param) for group in optimizer.param_groups for param in group["params"]}
    own = (model for model in models if any(id(param) in ids for param in model.parameters()))
    return next((model for model in own if model_has_dtensor(model)), None)


def _check_groups(optimizer: Any, state: Any) -> None:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state["param_groups"]] if isinstance(state, dict) else None
    if saved != sizes and not (saved and all(isinstance(p, str) for g in state["param_groups"] for p in g["params"])):
        raise StateError(
            "load_state",
            given=f"an optimizer's state for groups of {saved} parameters",
            expected=f"groups of {sizes}",
            fix="build the optimizer as it was when it was saved",
        )


def _random_states() -> dict[str, Any]:
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = state
    return {
        "random_state": random.getstate(),
        "numpy_random_seed": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch_manual_seed": torch.get_rng_state(),
        "torch_cuda_manual_seed": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    version, numbers, gauss_next = states["random_state"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, keys, *rest = states["numpy_random_seed"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch_manual_seed"])
    if states["torch_cuda_manual_seed"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"][: torch.cuda.device_count()])


def _num_bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)", str(size).upper())
    if type(size) is int and size > 0:
        return size
    if match is None or not int(match[1]):
        raise ArgumentError("max_shard_size", given=size, expected='bytes > 0, or text like "500MB"', fix='"10GB"')
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
