"""What scripts may ask for and will not find, and what to use."""

from __future__ import annotations

__all__ = ["ABSENT", "absent"]

_SHARD = "a FullyShardedDataParallelPlugin shards parameters, gradients and optimizer state alike"
_LOAD = "load the model with transformers or torch, whole, or shard it with a FullyShardedDataParallelPlugin"
_BF16 = 'mixed_precision="bf16" runs everywhere'
ABSENT = {
    "DeepSpeedPlugin": ("DeepSpeed is not part of macrobatch", _SHARD),
    "DummyOptim": ("DeepSpeed is not part of macrobatch", _SHARD),
    "DummyScheduler": ("DeepSpeed is not part of macrobatch", _SHARD),
    "HfDeepSpeedConfig": ("DeepSpeed is not part of macrobatch", _SHARD),
    "MegatronLMPlugin": ("Megatron-LM is not part of macrobatch", "train with Megatron-LM itself"),
    "ParallelismConfig": ("tensor, context and sequence parallelism are not part of macrobatch", _SHARD),
    "TorchTensorParallelPlugin": ("tensor parallelism is not part of macrobatch", _SHARD),
    "FP8RecipeKwargs": ("fp8 is not part of macrobatch", _BF16),
    "AORecipeKwargs": ("fp8 is not part of macrobatch", _BF16),
    "TERecipeKwargs": ("fp8 is not part of macrobatch", _BF16),
    "MSAMPRecipeKwargs": ("fp8 is not part of macrobatch", _BF16),
    "BnbQuantizationConfig": ("quantised loading is not part of macrobatch", _LOAD),
    "cpu_offload": ("big-model inference is not part of macrobatch", _LOAD),
    "disk_offload": ("big-model inference is not part of macrobatch", _LOAD),
    "dispatch_model": ("big-model inference is not part of macrobatch", _LOAD),
    "infer_auto_device_map": ("big-model inference is not part of macrobatch", _LOAD),
    "init_empty_weights": ("big-model inference is not part of macrobatch", 'use torch.device("meta") as a context'),
    "init_on_device": ("big-model inference is not part of macrobatch", "use torch.device(...) as a context"),
    "load_checkpoint_and_dispatch": ("big-model inference is not part of macrobatch", _LOAD),
    "load_checkpoint_in_model": ("big-model inference is not part of macrobatch", _LOAD),
    "prepare_pippy": ("pipeline inference is not part of macrobatch", "use torch.distributed.pipelining"),
}


def absent(module: str, name: str) -> AttributeError | ImportError:
    """The error for a name that a module does not have.

    An ImportError where there is something to say: `from module import name` would drop the text of an AttributeError.
    """
    if name not in ABSENT:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    reason, way = ABSENT[name]
    return ImportError(f"{module}.{name}: given a request for it; expected none, as {reason}. To fix it, {way}.")
