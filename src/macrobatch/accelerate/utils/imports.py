"""Which optional packages are there; looked up once."""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import Any

import torch

__all__ = [
    "is_aim_available",
    "is_bf16_available",
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
    "is_hpu_available",
    "is_lomo_available",
    "is_matplotlib_available",
    "is_megatron_lm_available",
    "is_mlflow_available",
    "is_mlu_available",
    "is_mps_available",
    "is_musa_available",
    "is_npu_available",
    "is_package_available",
    "is_pandas_available",
    "is_peft_available",
    "is_peft_model",
    "is_pynvml_available",
    "is_pytest_available",
    "is_rich_available",
    "is_sagemaker_available",
    "is_schedulefree_available",
    "is_sdaa_available",
    "is_swanlab_available",
    "is_tensorboard_available",
    "is_timm_available",
    "is_torch_xla_available",
    "is_torchao_available",
    "is_torchdata_available",
    "is_torchvision_available",
    "is_tqdm_available",
    "is_trackio_available",
    "is_transformer_engine_available",
    "is_transformers_available",
    "is_triton_available",
    "is_wandb_available",
    "is_xpu_available",
]


@cache
def is_package_available(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


is_datasets_available = partial(is_package_available, "datasets")
is_matplotlib_available = partial(is_package_available, "matplotlib")
is_mlflow_available = partial(is_package_available, "mlflow")
is_pandas_available = partial(is_package_available, "pandas")
is_peft_available = partial(is_package_available, "peft")
is_rich_available = partial(is_package_available, "rich")
is_sagemaker_available = partial(is_package_available, "sagemaker")
is_tensorboard_available = partial(is_package_available, "tensorboard")
is_timm_available = partial(is_package_available, "timm")
is_torchdata_available = partial(is_package_available, "torchdata")
is_tqdm_available = partial(is_package_available, "tqdm")
is_transformers_available = partial(is_package_available, "transformers")
is_aim_available = partial(is_package_available, "aim")
is_boto3_available = partial(is_package_available, "boto3")
is_clearml_available = partial(is_package_available, "clearml")
is_comet_ml_available = partial(is_package_available, "comet_ml")
is_dvclive_available = partial(is_package_available, "dvclive")
is_pynvml_available = partial(is_package_available, "pynvml")
is_pytest_available = partial(is_package_available, "pytest")
is_schedulefree_available = partial(is_package_available, "schedulefree")
is_swanlab_available = partial(is_package_available, "swanlab")
is_torchao_available = partial(is_package_available, "torchao")
is_torchvision_available = partial(is_package_available, "torchvision")
is_trackio_available = partial(is_package_available, "trackio")
is_triton_available = partial(is_package_available, "triton")
is_wandb_available = partial(is_package_available, "wandb")


def is_deepspeed_available() -> bool:
    """Always False: it is not part of macrobatch."""
    return False


def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Always False: TPUs are not supported."""
    return False


def is_xpu_available(check_device: bool = False) -> bool:
    """Always False: only CPUs and CUDA are supported."""
    return False


def is_mps_available(min_version: str = "1.12") -> bool:
    """Always False: only CPUs and CUDA are supported."""
    return False


def is_cuda_available() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether bfloat16 can be computed in: on every CPU, and on GPUs that have it."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else True


def is_bnb_available() -> bool:
    """Always False: quantised loading is not part of macrobatch."""
    return False


def is_fp8_available() -> bool:
    """Always False: fp8 is not part of macrobatch."""
    return False


def is_hpu_available(check_device: bool = False) -> bool:
    """Always False: only CPUs and CUDA are supported."""
    return False


def is_lomo_available() -> bool:
    """Always False: its optimizers, which update in the backward, are not supported."""
    return False


def is_megatron_lm_available() -> bool:
    """Always False: it is not part of macrobatch."""
    return False


def is_mlu_available(check_device: bool = False) -> bool:
    """Always False: only CPUs and CUDA are supported."""
    return False


def is_musa_available(check_device: bool = False) -> bool:
    """Always False: only CPUs and CUDA are supported."""
    return False


def is_npu_available(check_device: bool = False) -> bool:
    """Always False: only CPUs and CUDA are supported."""
    return False


def is_sdaa_available(check_device: bool = False) -> bool:
    """Always False: only CPUs and CUDA are supported."""
    return False


def is_transformer_engine_available() -> bool:
    """Always False: fp8 is not part of macrobatch."""
    return False


def is_fp16_available() -> bool:
    """Whether float16 can be trained in: on GPUs."""
    return torch.cuda.is_available()


def is_peft_model(model: Any) -> bool:
    """Whether it has adapters of the package peft."""
    return any(kind.__module__.split(".")[0] == "peft" for kind in type(model).__mro__)
