"""Options that are passed to an `Accelerator`: names and defaults of the original, checked when they are made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from macrobatch.accelerate.utils.absent import absent
from macrobatch.accelerate.utils.enums import (
    BaseEnum,
    ComputeEnvironment,
    DDPCommunicationHookType,
    DistributedType,
    DynamoBackend,
    LoggerType,
    PrecisionType,
    RNGType,
    choice,
)
from macrobatch.accelerate.utils.environment import default_normalize, dynamo_from_env
from macrobatch.accelerate.utils.sharding import FullyShardedDataParallelPlugin
from macrobatch.checks import check_flag, check_integer
from macrobatch.errors import ArgumentError

__all__ = [
    "AutocastKwargs",
    "BaseEnum",
    "ComputeEnvironment",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "DynamoBackend",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "LoggerType",
    "PrecisionType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TensorInformation",
    "TorchDynamoPlugin",
]

_UNSET: Any = type("Unset", (), {"__repr__": lambda _: "the default", "__bool__": lambda _: False})()


class KwargsHandler:
    """Keyword arguments for something else."""

    def to_dict(self) -> dict[str, Any]:
        """All of them, in a copy."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """Those that are not at their defaults."""
        defaults = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if defaults[name] != value}


@dataclass
class AutocastKwargs(KwargsHandler):
    """For `torch.autocast`."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """For `DistributedDataParallel`; passing it asks for that wrapper, and so for its communication hooks.

    Attributes:
        comm_hook: what happens to gradients on their way; a `DDPCommunicationHookType`.
        comm_wrapper: FP16 or BF16, to compress what the hook sends.
        comm_state_option: of PowerSGD: matrix_approximation_rank, start_powerSGD_iter, ...
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: Any = DDPCommunicationHookType.NO
    comm_wrapper: Any = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.comm_hook = choice("comm_hook", self.comm_hook, DDPCommunicationHookType)
        self.comm_wrapper = choice("comm_wrapper", self.comm_wrapper, DDPCommunicationHookType)
        if self.comm_wrapper in ("power_sgd", "batched_power_sgd"):
            raise ArgumentError(
                "comm_wrapper", given=str(self.comm_wrapper), expected="fp16 or bf16", fix="use comm_hook"
            )

    def to_dict(
        self, ignore_keys: Iterable[str] = ("comm_hook", "comm_wrapper", "comm_state_option")
    ) -> dict[str, Any]:
        """All of them, but for those that `DistributedDataParallel` does not know."""
        return {name: value for name, value in super().to_dict().items() if name not in ignore_keys}

    def register_comm_hook(self, model: Any) -> None:
        """Give the communication hook to a wrapped model."""
        hooks: dict[str, Callable[..., Any]] = {
            "fp16": default_hooks.fp16_compress_hook,
            "bf16": default_hooks.bf16_compress_hook,
            "power_sgd": powerSGD_hook.powerSGD_hook,
            "batched_power_sgd": powerSGD_hook.batched_powerSGD_hook,
        }
        wrappers: dict[str, Callable[..., Any]] = {
            "fp16": default_hooks.fp16_compress_wrapper,
            "bf16": default_hooks.bf16_compress_wrapper,
        }
        hook = hooks.get(str(self.comm_hook))
        if hook is None:
            return
        if str(self.comm_wrapper) in wrappers:
            hook = wrappers[str(self.comm_wrapper)](hook)
        has_state = "power_sgd" in str(self.comm_hook)
        state = powerSGD_hook.PowerSGDState(None, **self.comm_state_option) if has_state else None
        model.register_comm_hook(state=state, hook=hook)


@dataclass
class GradScalerKwargs(KwargsHandler):
    """For `torch.amp.GradScaler`."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """For `torch.distributed.init_process_group`."""

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None


@dataclass
class ProfileKwargs(KwargsHandler):
    """For `torch.profiler.profile`.

    Attributes:
        activities: "cpu", "cuda".
        schedule_option: for `torch.profiler.schedule`: wait, warmup, active, repeat, skip_first.
        output_trace_dir: folder for a Chrome trace per rank.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def build(self) -> torch.profiler.profile:
        """The profiler."""
        kinds = {"cpu": torch.profiler.ProfilerActivity.CPU, "cuda": torch.profiler.ProfilerActivity.CUDA}
        for activity in self.activities or ():
            choice("activities", activity, kinds)
        return torch.profiler.profile(
            activities=None if self.activities is None else [kinds[activity] for activity in self.activities],
            schedule=None if self.schedule_option is None else torch.profiler.schedule(**self.schedule_option),  # pyright: ignore[reportArgumentType]
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )


@dataclass
class DataLoaderConfiguration:
    """How loaders are prepared.

    Attributes:
        split_batches: each batch is split over the ranks, instead of each rank reading batches of its own.
        dispatch_batches: rank 0 reads for all; None: for iterable datasets only.
        even_batches: samples of the first batches fill up the last ones, so that all ranks have as many.
        use_seedable_sampler: shuffle by seed and epoch.
        data_seed: that seed.
        reads_ahead: hold each batch until the next one has been read, as the original does; loaders of unknown length
            always do.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False
    reads_ahead: bool = False


@dataclass
class ProjectConfiguration:
    """Where files go.

    Attributes:
        automatic_checkpoint_naming: checkpoints are numbered, in a folder `checkpoints`.
        total_limit: how many of them to keep.
        iteration: number of the next.
    """

    project_dir: Any = None
    logging_dir: Any = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        check_integer("total_limit", self.total_limit, or_none=True, fix="pass None for all")
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: Any = None) -> None:
        """Another project folder; logs go there, too, unless they have a folder of their own."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


class GradientAccumulationPlugin(KwargsHandler):
    """What a window is.

    Args:
        num_steps: micro-batches of a full window, an integer >= 1.
        adjust_scheduler: if passed and True, schedulers move with every micro-batch instead of every update.
        sync_with_dataloader: the end of a loader ends a window.
        sync_each_batch: with sharded models, reduce gradients in every micro-batch, to hold less of them.
        normalize: "exact" divides by what the window has seen, "uniform" takes the mean of the micro-batches' means,
            "constant" their sum over `num_steps`, as the original does. Default: MACROBATCH_NORMALIZE, or "exact".
        widens: sum gradients of 16-bit parameters in float32; False does it in 16 bits, in one process.
        original: count as the original does, on many ranks in `DistributedDataParallel`, whatever comes of it: see
            "Compatibility". Goes with normalize="constant", widens=False and loaders that read ahead.
    """

    def __init__(
        self,
        num_steps: Any = _UNSET,
        adjust_scheduler: bool = _UNSET,
        sync_with_dataloader: bool = True,
        sync_each_batch: bool = False,
        normalize: str = _UNSET,
        widens: bool = _UNSET,
        original: bool = False,
    ) -> None:
        if num_steps is not _UNSET:
            check_integer("num_steps", num_steps, fix="pass 1 not to accumulate")
        check_flag("original", original)
        if widens is not _UNSET:
            check_flag("widens", widens)
        if original and (normalize not in (_UNSET, "constant") or widens not in (_UNSET, False)):
            raise ArgumentError(
                "original",
                given=f"True, with normalize={normalize!r} and widens={widens!r}",
                expected='it alone, which means normalize="constant" and widens=False',
                fix="leave the others out",
            )
        chosen = normalize
        if chosen is _UNSET:
            chosen = "constant" if original else default_normalize()
        if chosen not in ("exact", "uniform", "constant"):
            raise ArgumentError(
                "normalize", given=repr(chosen), expected='"exact", "uniform" or "constant"', fix='pass "exact"'
            )
        self.num_steps = None if num_steps is _UNSET else num_steps
        self.adjust_scheduler = True if adjust_scheduler is _UNSET else adjust_scheduler
        self.sync_with_dataloader = sync_with_dataloader
        self.sync_each_batch = sync_each_batch
        self.normalize = chosen
        self.widens = not original if widens is _UNSET else widens
        self.original = original
        self._is_adjust_given = adjust_scheduler is not _UNSET

    def to_dict(self) -> dict[str, Any]:
        """All settings."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def to_kwargs(self) -> dict[str, Any]:
        """Those that were given, or differ from their defaults."""
        kwargs = super().to_kwargs()
        if self._is_adjust_given:
            kwargs["adjust_scheduler"] = self.adjust_scheduler
        return kwargs

    def __repr__(self) -> str:
        return f"GradientAccumulationPlugin({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """For `torch.compile`, which the model's forward is compiled with, in place.

    Where neither backend nor mode is passed, ACCELERATE_DYNAMO_BACKEND and ACCELERATE_DYNAMO_MODE count.
    """

    backend: Any = None
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool | None = None

    def __post_init__(self) -> None:
        if self.backend is None and self.mode is None:
            self.backend, self.mode = dynamo_from_env()
        backend = "NO" if self.backend is None else str(getattr(self.backend, "value", self.backend)).upper()
        self.backend = choice("dynamo backend", backend, DynamoBackend)

    def to_dict(self) -> dict[str, Any]:
        """All of them, the backend by its name in torch."""
        return {**super().to_dict(), "backend": str(self.backend).lower()}

    def to_kwargs(self) -> dict[str, Any]:
        """For `torch.compile`: those that are not at their defaults."""
        kwargs = {name: value for name, value in self.to_dict().items() if value is not None}
        kwargs.pop("use_regional_compilation", None)
        for name, default in (("mode", "default"), ("disable", False)):
            if kwargs.get(name) == default:
                del kwargs[name]
        return kwargs


@dataclass
class TensorInformation:
    """What a tensor is, without its numbers."""

    shape: torch.Size
    dtype: torch.dtype


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
