"""What `prepare` does to a model: placement, precision, sharding or wrapping. In place, where it can."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from macrobatch.accelerate.utils.operations import convert_to_fp32
from macrobatch.sync.peers import Peers

__all__ = [
    "NoSync",
    "autocast_forward",
    "shard",
    "shares_parameters",
    "swap_parameters",
    "wrap",
]


def autocast_forward(model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
    """Run a model's forward under autocast; its outputs are float32 again."""
    forward = model.forward

    @wraps(forward)
    def in_autocast(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            output = forward(*args, **kwargs)
        return convert_to_fp32(output)

    model._original_forward = forward  # pyright: ignore[reportArgumentType]
    model.forward = in_autocast


def wrap(model: nn.Module, device: torch.device, handler: Any) -> nn.Module:
    """`DistributedDataParallel`, with the arguments and the communication hook of a `DistributedDataParallelKwargs`."""
    wrapped = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, **handler.to_kwargs()
    )
    handler.register_comm_hook(wrapped)
    return wrapped


def replicate(model: nn.Module, device: torch.device) -> None:
    """Make a model the same on all ranks, by the first one's example."""
    Peers(None, device).broadcast([*model.parameters(), *model.buffers()], spares_equal=True)


class NoSync:
    """The method `no_sync` of a model that scripts expect to be wrapped in `DistributedDataParallel`.

    A copy of the model, or one that was pickled, is nobody's: there, it does nothing.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = weakref.ref(accelerator)

    def __call__(self) -> AbstractContextManager[None]:
        accelerator = self._accelerator()
        return nullcontext() if accelerator is None else accelerator.no_sync(None)

    def __reduce__(self) -> Any:
        return partial, (nullcontext,)


def shares_parameters(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether the optimizer trains any of the model's parameters."""
    own = {id(param) for param in model.parameters()}
    return any(id(param) in own for group in optimizer.param_groups for param in group["params"])


def shard(model: nn.Module, plugin: Any, *, mixed_precision: str) -> nn.Module:
    """`fully_shard` (FSDP2) on the blocks that the plugin names, then on the whole, in place.

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    if mixed_precision in ("bf16", "fp16") and policy.param_dtype is None:
        half = torch.bfloat16 if mixed_precision == "bf16" else torch.float16
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=torch.float32)
    options: dict[str, Any] = {"mp_policy": policy}
    if plugin.cpu_offload is not None and plugin.cpu_offload is not False:
        options["offload_policy"] = plugin.cpu_offload
    reshards: dict[str, Any] = {}
    if plugin.reshard_after_forward is not None:
        reshards["reshard_after_forward"] = plugin.reshard_after_forward
    is_block = plugin.set_auto_wrap_policy(model)
    blocks = [m for m in model.modules() if m is not model and is_block is not None and is_block(m)]
    for block in reversed(blocks):
        if plugin.activation_checkpointing:
            _recompute(block)
        fully_shard(block, **options, **reshards)
    if plugin.activation_checkpointing and not blocks:
        _recompute(model)
    fully_shard(model, **options)
    return model


def _recompute(module: nn.Module) -> None:
    """Let the backward compute a forward again, instead of keeping its activations; in place, so that names stay."""
    module.forward = wraps(module.forward)(partial(checkpoint, module.forward, use_reentrant=False))


def swap_parameters(optimizers: Sequence[Optimizer], before: dict[str, Tensor], model: nn.Module) -> None:
    """Let optimizers that were built before a model was sharded train its shards.

    Args:
        before: the model's parameters by name, from before.
    """
    after = dict(model.named_parameters())
    new = {id(param): after[name] for name, param in before.items() if name in after}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new.get(id(param), param) for param in group["params"]]
        for param in [param for param in optimizer.state if id(param) in new]:
            shard_of = new[id(param)]
            optimizer.state[shard_of] = {
                name: _as_shard(value, shard_of) if isinstance(value, Tensor) and value.shape == param.shape else value
                for name, value in optimizer.state.pop(param).items()
            }


def _as_shard(value: Tensor, param: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return value
    return distribute_tensor(value.to(param.to_local().device), param.device_mesh, param.placements)
