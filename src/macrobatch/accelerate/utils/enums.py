"""The choices that arguments are made of. Each member equals its text."""

from __future__ import annotations

import enum
from typing import Any

__all__ = [
    "BaseEnum",
    "ComputeEnvironment",
    "DDPCommunicationHookType",
    "DistributedType",
    "DynamoBackend",
    "LoggerType",
    "PrecisionType",
    "RNGType",
]


class _Listed(enum.EnumMeta):
    def __contains__(cls, item: object) -> bool:
        return item in cls.list()  # pyright: ignore[reportAttributeAccessIssue]


class BaseEnum(str, enum.Enum, metaclass=_Listed):
    """Text of a fixed set; `in` takes the text itself."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def list(cls) -> list[Any]:
        """All values."""
        return [member.value for member in cls]


class DistributedType(BaseEnum):
    """What kind of processes there are. Printed with the class's name, as logs of scripts show it."""

    __str__ = enum.Enum.__str__
    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    FSDP = "FSDP"
    DEEPSPEED = "DEEPSPEED"
    MEGATRON_LM = "MEGATRON_LM"
    XLA = "XLA"
    MULTI_XPU = "MULTI_XPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_HPU = "MULTI_HPU"
    MULTI_MLU = "MULTI_MLU"


class ComputeEnvironment(BaseEnum):
    """Where a job runs."""

    LOCAL_MACHINE = "LOCAL_MACHINE"
    AMAZON_SAGEMAKER = "AMAZON_SAGEMAKER"


class PrecisionType(BaseEnum):
    """What a forward computes in."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


class RNGType(BaseEnum):
    """A random number generator."""

    TORCH = "torch"
    CUDA = "cuda"
    GENERATOR = "generator"


class LoggerType(BaseEnum):
    """A tracker, or all that are installed."""

    ALL = "all"
    AIM = "aim"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    COMETML = "comet_ml"
    MLFLOW = "mlflow"
    CLEARML = "clearml"
    DVCLIVE = "dvclive"
    SWANLAB = "swanlab"
    JSONL = "jsonl"


class DynamoBackend(BaseEnum):
    """What `torch.compile` compiles with; NO does not compile."""

    NO = "NO"
    EAGER = "EAGER"
    AOT_EAGER = "AOT_EAGER"
    INDUCTOR = "INDUCTOR"
    CUDAGRAPHS = "CUDAGRAPHS"
    ONNXRT = "ONNXRT"
    TENSORRT = "TENSORRT"


class DDPCommunicationHookType(BaseEnum):
    """What `DistributedDataParallel` does to a bucket of gradients on its way."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"
