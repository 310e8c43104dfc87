"""Which optional packages are there; looked up once."""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from macrobatch.accelerate.utils.absent import absent
from macrobatch.accelerate.utils.versions import compare_versions

__all__ = [
    "is_4bit_bnb_available",
    "is_8bit_bnb_available",
    "is_aim_available",
    "is_amdsmi_available",
    "is_bf16_available",
    "is_bitsandbytes_multi_backend_available",
    "is_bnb_available",
    "is_boto3_available",
    "is_clearml_available",
    "is_comet_ml_available",
    "is_cuda_available",
    "is_datasets_available",
    "is_deepspeed_available",
    "is_dvclive_available",
    "is_fp8_available",
    "is_fp16_available",
    "is_habana_gaudi1",
    "is_hpu_available",
    "is_import_timer_available",
    "is_lomo_available",
    "is_matplotlib_available",
    "is_megatron_lm_available",
    "is_mlflow_available",
    "is_mlu_available",
    "is_mps_available",
    "is_msamp_available",
    "is_musa_available",
    "is_neuron_available",
    "is_npu_available",
    "is_numpy_available",
    "is_package_available",
    "is_pandas_available",
    "is_peft_available",
    "is_peft_model",
    "is_pippy_available",
    "is_pynvml_available",
    "is_pytest_available",
    "is_rich_available",
    "is_rocm_available",
    "is_sagemaker_available",
    "is_schedulefree_available",
    "is_sdaa_available",
    "is_swanlab_available",
    "is_tensorboard_available",
    "is_timm_available",
    "is_torch_distributed_available",
    "is_torch_xla_available",
    "is_torchao_available",
    "is_torchdata_available",
    "is_torchdata_stateful_dataloader_available",
    "is_torchvision_available",
    "is_tqdm_available",
    "is_trackio_available",
    "is_transformer_engine_available",
    "is_transformer_engine_mxfp8_available",
    "is_transformers_available",
    "is_triton_available",
    "is_wandb_available",
    "is_weights_only_available",
    "is_xccl_available",
    "is_xpu_available",
]


@cache
def is_package_available(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


is_aim_available = partial(is_package_available, "aim")
is_boto3_available = partial(is_package_available, "boto3")
is_clearml_available = partial(is_package_available, "clearml")
is_comet_ml_available = partial(is_package_available, "comet_ml")
is_datasets_available = partial(is_package_available, "datasets")
is_dvclive_available = partial(is_package_available, "dvclive")
is_matplotlib_available = partial(is_package_available, "matplotlib")
is_mlflow_available = partial(is_package_available, "mlflow")
is_pandas_available = partial(is_package_available, "pandas")
is_peft_available = partial(is_package_available, "peft")
is_pynvml_available = partial(is_package_available, "pynvml")
is_pytest_available = partial(is_package_available, "pytest")
is_rich_available = partial(is_package_available, "rich")
is_sagemaker_available = partial(is_package_available, "sagemaker")
is_schedulefree_available = partial(is_package_available, "schedulefree")
is_swanlab_available = partial(is_package_available, "swanlab")
is_tensorboard_available = partial(is_package_available, "tensorboard")
is_timm_available = partial(is_package_available, "timm")
is_torchao_available = partial(is_package_available, "torchao")
is_torchdata_available = partial(is_package_available, "torchdata")
is_torchvision_available = partial(is_package_available, "torchvision")
is_tqdm_available = partial(is_package_available, "tqdm")
is_trackio_available = partial(is_package_available, "trackio")
is_transformers_available = partial(is_package_available, "transformers")
is_triton_available = partial(is_package_available, "triton")
is_wandb_available = partial(is_package_available, "wandb")


def _is_never_available(*args: Any, **kwargs: Any) -> bool:
    """Always False: macrobatch computes on CPUs and with CUDA, in 32 and 16 bits, and needs no other engine."""
    return False


is_4bit_bnb_available = _is_never_available
is_8bit_bnb_available = _is_never_available
is_amdsmi_available = _is_never_available
is_bitsandbytes_multi_backend_available = _is_never_available
is_bnb_available = _is_never_available
is_deepspeed_available = _is_never_available
is_fp8_available = _is_never_available
is_hpu_available = _is_never_available
is_import_timer_available = _is_never_available
is_lomo_available = _is_never_available
is_megatron_lm_available = _is_never_available
is_mlu_available = _is_never_available
is_mps_available = _is_never_available
is_msamp_available = _is_never_available
is_musa_available = _is_never_available
is_neuron_available = _is_never_available
is_npu_available = _is_never_available
is_pippy_available = _is_never_available
is_sdaa_available = _is_never_available
is_torch_xla_available = _is_never_available
is_transformer_engine_available = _is_never_available
is_transformer_engine_mxfp8_available = _is_never_available
is_xpu_available = _is_never_available
is_xccl_available = _is_never_available
is_habana_gaudi1 = _is_never_available


def is_cuda_available() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def is_rocm_available() -> bool:
    """Whether torch's CUDA is AMD's."""
    return torch.version.hip is not None


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether bfloat16 can be computed in: on every CPU, and on GPUs that have it."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else True


def is_fp16_available() -> bool:
    """Whether float16 can be trained in: on GPUs."""
    return torch.cuda.is_available()


def is_numpy_available(min_version: str = "1.25.0") -> bool:
    """Whether NumPy is that new."""
    return compare_versions("numpy", ">=", min_version)


def is_torch_distributed_available() -> bool:
    """Whether torch was built with collectives."""
    return dist.is_available()


def is_torchdata_stateful_dataloader_available() -> bool:
    """Whether torchdata can be imported, with its `StatefulDataLoader`."""
    return is_package_available("torchdata")


def is_weights_only_available() -> bool:
    """Always True: files are loaded with `weights_only=True`."""
    return True


def is_peft_model(model: Any) -> bool:
    """Whether it has adapters of the package peft."""
    return any(kind.__module__.split(".")[0] == "peft" for kind in type(model).__mro__)


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
