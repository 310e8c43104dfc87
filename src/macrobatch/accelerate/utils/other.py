"""What fits nowhere else."""

from __future__ import annotations

import os
import socket
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from macrobatch.accelerate.utils.absent import absent
from macrobatch.checkpoint.io import check_weights_only

__all__ = [
    "clean_state_dict_for_safetensors",
    "convert_bytes",
    "extract_model_from_parallel",
    "get_pretty_name",
    "is_compiled_module",
    "is_port_in_use",
    "load",
    "merge_dicts",
    "model_has_dtensor",
    "recursive_getattr",
    "restore_forward",
    "save",
    "wait_for_everyone",
]


def is_compiled_module(module: nn.Module) -> bool:
    """Whether `torch.compile` made it."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)  # pyright: ignore[reportPrivateUsage]


def model_has_dtensor(model: nn.Module) -> bool:
    """Whether its parameters are spread over ranks, also where they have been gathered for now."""
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return is_sharded or any(isinstance(param, DTensor) for param in model.parameters())


def extract_model_from_parallel(
    model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> Any:
    """The module inside DDP's, DataParallel's and `torch.compile`'s wrappers.

    Args:
        keep_fp32_wrapper: leave its forward in the precision that `prepare` gave it.
        keep_torch_compile: compile it, if what was given was compiled.
        recursive: modules inside the model, too.
    """
    compiled = model if is_compiled_module(model) else None
    model = compiled._orig_mod if compiled is not None else model
    while isinstance(model, DistributedDataParallel | nn.DataParallel):
        model = model.module
    if is_compiled_module(model) and not keep_torch_compile:
        model = model._orig_mod
    if recursive:
        for name, child in model.named_children():
            setattr(model, name, extract_model_from_parallel(child, keep_fp32_wrapper, keep_torch_compile, recursive))
    if not keep_fp32_wrapper:
        restore_forward(model)
    if compiled is None or not keep_torch_compile:
        return model
    return compiled if model is compiled._orig_mod else type(compiled)(model, compiled.dynamo_ctx)


def restore_forward(model: nn.Module) -> None:
    """Undo what `prepare` did to a forward: it runs in the precision of its parameters again."""
    if "_original_forward" in vars(model):
        del model._original_forward
        vars(model).pop("forward", None)


def wait_for_everyone() -> None:
    """Go on when all ranks are here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def clean_state_dict_for_safetensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory: of tied ones, the first by name is kept."""
    kept: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    for name, tensor in state_dict.items():
        regions = seen.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), set())
        region = (tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and region in regions:
            continue
        kept[name] = tensor.clone().contiguous() if tensor.numel() and regions else tensor.contiguous()
        regions.add(region)
    return kept


def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Write an object to a file, on the main process only (of each machine, if asked for).

    Args:
        safe_serialization: as safetensors; the object is then a dict of tensors.
    """
    from macrobatch.accelerate.state import PartialState

    state = PartialState()
    if not (state.is_local_main_process if save_on_each_node else state.is_main_process):
        return
    if safe_serialization:
        safetensors.torch.save_file(clean_state_dict_for_safetensors(obj), f, metadata={"format": "pt"})
    else:
        torch.save(obj, f)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Read an object from a file: safetensors by its name, otherwise a pickle, of tensors and plain values only.

    Raises:
        ArgumentError: `weights_only=False`, with which a file could run any code.
    """
    check_weights_only(kwargs.pop("weights_only", True))
    if isinstance(f, str | os.PathLike) and str(f).endswith(".safetensors"):
        return safetensors.torch.load_file(f, device="cpu" if map_location is None else map_location)
    return torch.load(f, map_location=map_location, weights_only=True, **kwargs)


def convert_bytes(size: float) -> str:
    """A number of bytes, for people.

    ```pycon
    >>> convert_bytes(3 * 2**29)
    '1.5 GB'

    ```
    """
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} TB"


def get_pretty_name(obj: Any) -> str:
    """A name for people."""
    kind = obj if hasattr(obj, "__qualname__") else type(obj)
    return getattr(kind, "__qualname__", None) or getattr(kind, "__name__", None) or str(obj)


def merge_dicts(source: dict[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    """One nested dict put into another, in place."""
    for key, value in source.items():
        if isinstance(value, dict):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def is_port_in_use(port: int | None = None) -> bool:
    """Whether something on this machine listens there; by default, on 29500."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        return connection.connect_ex(("localhost", 29500 if port is None else port)) == 0


def recursive_getattr(obj: Any, attr: str) -> Any:
    """An attribute by its dotted name."""
    for name in attr.split("."):
        obj = getattr(obj, name)
    return obj


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
