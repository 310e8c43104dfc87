"""The choices that arguments are made of. Each member equals its text."""

from __future__ import annotations

import enum
from typing import Any

from macrobatch.errors import ArgumentError

__all__ = [
    "BaseEnum",
    "ComputeEnvironment",
    "DDPCommunicationHookType",
    "DistributedType",
    "DynamoBackend",
    "LoggerType",
    "PrecisionType",
    "RNGType",
    "choice",
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
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_NEURON = "MULTI_NEURON"


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
    AOT_TS_NVFUSER = "AOT_TS_NVFUSER"
    NVPRIMS_NVFUSER = "NVPRIMS_NVFUSER"
    CUDAGRAPHS = "CUDAGRAPHS"
    OFI = "OFI"
    FX2TRT = "FX2TRT"
    ONNXRT = "ONNXRT"
    TENSORRT = "TENSORRT"
    TVM = "TVM"


class DDPCommunicationHookType(BaseEnum):
    """What `DistributedDataParallel` does to a bucket of gradients on its way."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


def choice(what: str, value: Any, choices: Any) -> Any:
    """A value as a member of an enum, or as one of some texts.

    Raises:
        ArgumentError: it is none of them.
    """
    known: list[Any] = choices.list() if hasattr(choices, "list") else list(choices)
    text = str(getattr(value, "value", value))
    if text not in known:
        raise ArgumentError(what, given=repr(value), expected=f"one of {known}", fix="choose one of them")
    return choices(text) if isinstance(choices, type) else text
