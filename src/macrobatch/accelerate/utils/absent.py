"""What scripts may ask for and will not find, and what to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from macrobatch.errors import ArgumentError

__all__ = ["ABSENT", "absent", "refuse_absent", "refusing"]

_SHARD = "a FullyShardedDataParallelPlugin shards parameters, gradients and optimizer state alike"
_LOAD = "load the model with transformers or torch, whole, or shard it with a FullyShardedDataParallelPlugin"
_TRACK = "subclass GeneralTracker and pass the class, or an object of it, as log_with="
_GROUPS = (
    (
        "DeepSpeed is not part of macrobatch",
        _SHARD,
        "DeepSpeedEngineWrapper DeepSpeedOptimizerWrapper DeepSpeedPlugin DeepSpeedSchedulerWrapper "
        "DeepSpeedSequenceParallelConfig DummyOptim DummyScheduler GatheredParameters HfDeepSpeedConfig "
        "compile_regions_deepspeed deepspeed_required get_active_deepspeed_plugin map_pytorch_optim_to_deepspeed "
        "prepare_deepspeed_cmd_env",
    ),
    (
        "Megatron-LM is not part of macrobatch",
        "train with Megatron-LM itself",
        "AbstractTrainStep BertTrainStep GPTTrainStep MegatronEngine MegatronLMDummyDataLoader "
        "MegatronLMDummyScheduler MegatronLMOptimizerWrapper MegatronLMPlugin MegatronLMSchedulerWrapper T5TrainStep "
        "add_model_config_to_megatron_parser avg_losses_across_data_parallel_group finish_mpu_init "
        "gather_across_data_parallel_groups model_provider_func prepare_model_optimizer_scheduler",
    ),
    (
        "tensor, context and sequence parallelism are not part of macrobatch",
        _SHARD,
        "ParallelismConfig TorchContextParallelConfig TorchTensorParallelConfig TorchTensorParallelPlugin "
        "get_model_tp_size",
    ),
    (
        "fp8 is not part of macrobatch",
        'mixed_precision="bf16" runs everywhere',
        "AORecipeKwargs FP8BackendType FP8RecipeKwargs MSAMPRecipeKwargs TERecipeKwargs apply_fp8_autowrap "
        "check_cuda_fp8_capability contextual_fp8_autocast convert_model convert_model_to_fp8_ao "
        "filter_first_and_last_linear_layers filter_linear_layers find_first_last_linear_layers has_ao_layers "
        "has_transformer_engine_layers torchao_required",
    ),
    (
        "TPUs are not supported",
        "train on CPUs or CUDA GPUs",
        "install_xla prepare_tpu",
    ),
    (
        "quantised loading is not part of macrobatch",
        _LOAD,
        "BnbQuantizationConfig get_keys_to_not_convert get_quantized_model_device_map has_4bit_bnb_layers "
        "load_and_quantize_model quantize_and_offload_8bit replace_with_bnb_layers",
    ),
    (
        "big-model inference is not part of macrobatch",
        _LOAD,
        "AlignDevicesHook CpuOffload CustomDtype LayerwiseCastingHook ModelHook OffloadedWeightsLoader "
        "PrefixedDataset SequentialHook UserCpuOffloadHook add_hook_to_module align_module_device "
        "attach_align_device_hook attach_align_device_hook_on_blocks attach_execution_device_hook "
        "attach_layerwise_casting_hooks calculate_maximum_sizes check_device_map check_device_same "
        "check_tied_parameters_in_config check_tied_parameters_on_same_device clean_device_map "
        "compute_module_total_buffer_size cpu_offload cpu_offload_with_hook disk_offload dispatch_model "
        "dtype_byte_size extract_submodules_state_dict fallback_allocate get_balanced_memory get_max_layer_size "
        "get_max_memory get_module_leaves get_module_size_with_ties get_non_persistent_buffers "
        "get_state_dict_from_offload get_state_dict_offloaded_model has_offloaded_params infer_auto_device_map "
        "load_checkpoint_and_dispatch load_checkpoint_in_model load_offloaded_weight load_offloaded_weights "
        "load_state_dict offload_state_dict offload_weight remove_hook_from_module remove_hook_from_submodules "
        "retie_parameters save_offload_index set_module_tensor_to_device",
    ),
    (
        "big-model inference is not part of macrobatch",
        'use torch.device("meta") as a context',
        "init_empty_weights init_on_device",
    ),
    (
        "pipeline inference is not part of macrobatch",
        "use torch.distributed.pipelining",
        "build_pipeline find_pippy_batch_size generate_device_map pippy_forward prepare_pippy",
    ),
    (
        "sharded models are saved whole, by save_state and save_model",
        "call those",
        "load_fsdp_model load_fsdp_optimizer merge_fsdp_weights save_fsdp_model save_fsdp_optimizer",
    ),
    (
        "prepare shards models by itself",
        "pass fsdp_plugin=FullyShardedDataParallelPlugin() to the Accelerator",
        "disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading ensure_weights_retied fsdp2_apply_ac "
        "fsdp2_canonicalize_names fsdp2_load_full_state_dict fsdp2_prepare_auto_wrap_policy fsdp2_prepare_model "
        "fsdp2_switch_optimizer_parameters get_fsdp2_grad_scaler",
    ),
    (
        "there is no configuration file and no launcher to configure",
        "start the script with torchrun, or `macrobatch launch`",
        "PrepareForLaunch SageMakerDistributedType convert_dict_to_env_variables "
        "prepare_extend_env_parallelism_config prepare_multi_gpu_env prepare_sagemager_args_inputs "
        "prepare_simple_launcher_cmd_env setup_fp8_env write_basic_config",
    ),
    (
        "it has no class of its own here",
        _TRACK,
        "AimTracker ClearMLTracker CometMLTracker DVCLiveTracker SwanLabTracker TrackioTracker register_tracker_class",
    ),
)
ABSENT = {name: (reason, way) for reason, way, names in _GROUPS for name in names.split()}
"""By name: why it is not there, and what to use."""


_ARGUMENTS = {
    "deepspeed_plugin": ("DeepSpeed", _SHARD),
    "deepspeed_plugins": ("DeepSpeed", _SHARD),
    "megatron_lm_plugin": ("Megatron-LM", "train with Megatron-LM itself"),
    "torch_tp_plugin": ("tensor parallelism", _SHARD),
    "parallelism_config": ("mixed parallelism", _SHARD),
    "torch_device_mesh": ("mixed parallelism", _SHARD),
}


def refuse_absent(**given: Any) -> None:
    """Refuse arguments of what is not part of macrobatch.

    Raises:
        ArgumentError: one of them is not None.
    """
    for name, value in given.items():
        if value is not None:
            what, way = _ARGUMENTS[name]
            raise ArgumentError(name, given=repr(value), expected=f"None: {what} is not part of macrobatch", fix=way)


def absent(module: str, name: str) -> AttributeError | ImportError:
    """The error for a name that a module does not have.

    An ImportError where there is something to say: `from module import name` would drop the text of an AttributeError.
    """
    if name not in ABSENT:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    reason, way = ABSENT[name]
    return ImportError(f"{module}.{name}: given a request for it; expected none, as {reason}. To fix it, {way}.")


def refusing(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has no name at all."""

    def refuse(name: str) -> Any:
        raise absent(module, name)

    return refuse
