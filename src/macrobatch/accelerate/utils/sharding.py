"""How a model is sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from macrobatch.accelerate.utils.enums import choice
from macrobatch.accelerate.utils.environment import str_to_bool
from macrobatch.errors import ArgumentError

__all__ = ["FullyShardedDataParallelPlugin"]

_RESHARDS = {"FULL_SHARD": True, "1": True, "SHARD_GRAD_OP": False, "2": False}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ONLY = {
    "ignored_modules": (None, "every parameter is sharded and synchronised"),
    "state_dict_config": (None, "weights are saved whole"),
    "optim_state_dict_config": (None, "optimizer state is saved whole"),
    "limit_all_gathers": (True, "FSDP2 always does"),
    "use_orig_params": (True, "FSDP2 always does"),
    "param_init_fn": (None, "initialise the model before it is prepared"),
    "sync_module_states": (True, "models are always made equal"),
    "activation_checkpointing_offload": (False, "activation_checkpointing alone frees activations"),
    "cpu_ram_efficient_loading": (False, "every rank loads the model"),
}
"""What can be had in one way only: that way, and why."""


@dataclass
class FullyShardedDataParallelPlugin:
    """FSDP2: `fully_shard` on the blocks that a policy names, and on the model.

    Attributes:
        fsdp_version: 2, the only one.
        sharding_strategy: FULL_SHARD or SHARD_GRAD_OP, the older words for `reshard_after_forward` True and False.
        reshard_after_forward: give whole parameters up between forward and backward.
        backward_prefetch, forward_prefetch: accepted; FSDP2 fetches ahead by itself.
        mixed_precision_policy: a `MixedPrecisionPolicy`, its arguments, or "bf16" or "fp16"; by default the
            accelerator's precision. Reduced in float32 unless a policy says otherwise.
        auto_wrap_policy: "transformer_based_wrap", "size_based_wrap", "no_wrap", or a function of a module.
        cpu_offload: keep parameters on the host.
        state_dict_type: accepted; checkpoints hold whole weights.
        activation_checkpointing: compute the blocks' forwards again in the backward, instead of keeping activations.
        transformer_cls_names_to_wrap: class names of blocks, for "transformer_based_wrap".
        min_num_params: size of a block, for "size_based_wrap".

    The others are there for their names; a value that asks for something else than FSDP2 does is refused.

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """

    fsdp_version: int | None = None
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    backward_prefetch: Any = None
    mixed_precision_policy: Any = None
    auto_wrap_policy: Any = None
    cpu_offload: Any = None
    ignored_modules: Any = None
    state_dict_type: Any = None
    state_dict_config: Any = None
    optim_state_dict_config: Any = None
    limit_all_gathers: bool = True
    use_orig_params: bool | None = None
    param_init_fn: Any = None
    sync_module_states: bool | None = None
    forward_prefetch: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_offload: bool | None = None
    cpu_ram_efficient_loading: bool | None = None
    transformer_cls_names_to_wrap: list[str] | None = None
    min_num_params: int | None = None

    def __post_init__(self) -> None:
        if self.fsdp_version not in (None, 2):
            raise ArgumentError(
                "fsdp_version", given=repr(self.fsdp_version), expected="2, which does the same", fix="leave it out"
            )
        self.fsdp_version = 2
        for name, (only, why) in _ONLY.items():
            if getattr(self, name) not in (None, only):
                raise ArgumentError(
                    name, given=repr(getattr(self, name)), expected=f"{only}: {why}", fix="leave it out"
                )
        self.reshard_after_forward = _reshards(self.sharding_strategy, self.reshard_after_forward)
        self.mixed_precision_policy = _policy(self.mixed_precision_policy)
        self.state_dict_type = self.state_dict_type or "SHARDED_STATE_DICT"
        self.activation_checkpointing = bool(self.activation_checkpointing)
        if self.cpu_offload is True:
            self.cpu_offload = CPUOffloadPolicy()
        names = ("transformer_based_wrap", "size_based_wrap", "no_wrap")
        if isinstance(self.auto_wrap_policy, str):
            choice("auto_wrap_policy", self.auto_wrap_policy.lower(), names)

    def set_auto_wrap_policy(self, model: nn.Module) -> Callable[[nn.Module], bool] | None:
        """Which modules are blocks; None if only the whole is one."""
        policy = self.auto_wrap_policy
        if callable(policy):
            return lambda module: bool(policy(module))
        name = str(policy or ("transformer_based_wrap" if self.transformer_cls_names_to_wrap else "no_wrap")).lower()
        if name == "size_based_wrap":
            smallest = self.min_num_params or 10**8
            return lambda module: sum(param.numel() for param in module.parameters()) >= smallest
        if name == "no_wrap":
            return None
        blocks = self.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or ()
        found = {type(module).__name__ for module in model.modules()}
        if not set(blocks) & found:
            raise ArgumentError(
                "transformer_cls_names_to_wrap",
                given=list(blocks),
                expected=f"names of modules of the model, which has {sorted(found)}",
                fix="name the class of its blocks",
            )
        return lambda module: type(module).__name__ in blocks


def _reshards(strategy: Any, reshards: Any) -> bool | None:
    for value in (reshards, strategy):
        if value is None or isinstance(value, bool):
            if value is not None:
                return value
            continue
        text = str(getattr(value, "name", value)).upper()
        if text in _RESHARDS:
            return _RESHARDS[text]
        if text in ("TRUE", "FALSE"):
            return bool(str_to_bool(text))
        raise ArgumentError(
            "sharding_strategy",
            given=repr(value),
            expected=f"one of {[*_RESHARDS]}",
            fix="leave the plugin out to train replicas, or pass reshard_after_forward=",
        )
    return None


def _policy(given: Any) -> MixedPrecisionPolicy | None:
    if given is None or isinstance(given, MixedPrecisionPolicy):
        return given
    if isinstance(given, dict):
        return MixedPrecisionPolicy(**given)
    dtype = _DTYPES[choice("mixed_precision_policy", given, _DTYPES)]
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
