"""What an `Accelerator` was asked for, checked as a whole before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from macrobatch.accelerate.utils.absent import refuse_absent
from macrobatch.accelerate.utils.dataclasses import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    PrecisionType,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from macrobatch.accelerate.utils.environment import gradient_accumulation_steps_from_env
from macrobatch.checks import check_integer
from macrobatch.errors import ArgumentError

__all__ = ["Settings", "checked_num_steps", "read_settings"]

_ABSENT = ("deepspeed_plugin", "deepspeed_plugins", "megatron_lm_plugin", "torch_tp_plugin", "parallelism_config")
_HANDLERS: dict[type[KwargsHandler], str] = {
    DistributedDataParallelKwargs: "ddp_handler",
    GradScalerKwargs: "scaler_handler",
    InitProcessGroupKwargs: "init_handler",
    AutocastKwargs: "autocast_handler",
    ProfileKwargs: "profile_handler",
}


@dataclass(kw_only=True)
class Settings:
    """The arguments of an `Accelerator`, with their defaults filled in."""

    device_placement: bool
    mixed_precision: str | None
    gradient_accumulation_plugin: GradientAccumulationPlugin
    cpu: bool
    dataloader_config: DataLoaderConfiguration
    fsdp_plugin: FullyShardedDataParallelPlugin | None
    rng_types: list[Any]
    log_with: Any
    project_configuration: ProjectConfiguration
    step_scheduler_with_optimizer: bool
    dynamo_plugin: TorchDynamoPlugin
    ddp_handler: Any = None
    scaler_handler: Any = None
    init_handler: Any = None
    autocast_handler: Any = None
    profile_handler: Any = None

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """For `init_process_group`."""
        return _kwargs(self.init_handler)

    @property
    def scaler_kwargs(self) -> dict[str, Any]:
        """For `GradScaler`."""
        return _kwargs(self.scaler_handler)

    @property
    def autocast_kwargs(self) -> dict[str, Any]:
        """For `torch.autocast`."""
        return _kwargs(self.autocast_handler)

    @property
    def compile_kwargs(self) -> dict[str, Any] | None:
        """For `torch.nn.Module.compile`; None if nothing is to be compiled."""
        backend = str(getattr(self.dynamo_plugin.backend, "value", self.dynamo_plugin.backend)).lower()
        if backend == "no" or self.dynamo_plugin.disable:
            return None
        kwargs = {name: value for name, value in self.dynamo_plugin.to_kwargs().items() if name != "backend"}
        return {"backend": backend, **kwargs}


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from the arguments of an `Accelerator`.

    Raises:
        ArgumentError: one is unknown, out of its domain, contradicts another, or is not supported.
    """
    refuse_absent(**{name: given[name] for name in _ABSENT})
    precision = given["mixed_precision"]
    if precision is not None and str(precision) not in PrecisionType.list():
        raise ArgumentError(
            "mixed_precision", given=repr(precision), expected=f"one of {PrecisionType.list()}", fix='"bf16"'
        )
    if str(precision) == "fp8":
        raise ArgumentError(
            "mixed_precision", given=repr(precision), expected='"no", "bf16" or "fp16"', fix='pass "bf16"'
        )
    options = Settings(
        device_placement=given["device_placement"],
        mixed_precision=None if precision is None else str(precision),
        gradient_accumulation_plugin=_accumulation(
            given["gradient_accumulation_steps"], given["gradient_accumulation_plugin"]
        ),
        cpu=given["cpu"],
        dataloader_config=_loading(given["dataloader_config"], given["split_batches"]),
        fsdp_plugin=_instance("fsdp_plugin", given["fsdp_plugin"], FullyShardedDataParallelPlugin),
        rng_types=["generator"] if given["rng_types"] is None else list(given["rng_types"]),
        log_with=given["log_with"],
        project_configuration=_project(given["project_config"], given["project_dir"]),
        step_scheduler_with_optimizer=given["step_scheduler_with_optimizer"],
        dynamo_plugin=_compiling(given["dynamo_plugin"], given["dynamo_backend"]),
        **_handlers(given["kwargs_handlers"]),
    )
    if options.gradient_accumulation_plugin.original:
        options.dataloader_config.reads_ahead = True
        if options.fsdp_plugin is None:
            options.ddp_handler = options.ddp_handler or DistributedDataParallelKwargs()
    return options


def _kwargs(handler: KwargsHandler | None) -> dict[str, Any]:
    return {} if handler is None else handler.to_kwargs()


def _instance(name: str, value: Any, kind: type[Any]) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ArgumentError(name, given=repr(value), expected=f"a {kind.__name__}", fix=f"build a {kind.__name__}")
    return value


def checked_num_steps(num_steps: Any) -> int:
    """A number of micro-batches, if it is one.

    Raises:
        ArgumentError: it is not.
    """
    check_integer("gradient_accumulation_steps", num_steps, fix="pass 1 not to accumulate")
    return num_steps


def _accumulation(num_steps: Any, plugin: GradientAccumulationPlugin | None) -> GradientAccumulationPlugin:
    """One plugin of what was given; an explicit argument beats the environment."""
    _instance("gradient_accumulation_plugin", plugin, GradientAccumulationPlugin)
    checked_num_steps(num_steps)
    from_env = gradient_accumulation_steps_from_env() if num_steps == 1 else None
    if plugin is None:
        return GradientAccumulationPlugin(num_steps=num_steps if from_env is None else from_env)
    if num_steps == 1:
        if plugin.num_steps is None:
            plugin.num_steps = from_env or 1
        return plugin
    if plugin.num_steps not in (None, 1, num_steps):
        raise ArgumentError(
            "gradient_accumulation_steps",
            given=f"{num_steps}, and a plugin with num_steps={plugin.num_steps}",
            expected="one number",
            fix="pass it in one place",
        )
    plugin.num_steps = num_steps
    return plugin


def _loading(config: Any, split_batches: Any) -> DataLoaderConfiguration:
    config = _instance("dataloader_config", config, DataLoaderConfiguration) or DataLoaderConfiguration()
    if split_batches not in (None, False, True):
        raise ArgumentError("split_batches", given=repr(split_batches), expected="True or False", fix="leave it out")
    if split_batches:
        config.split_batches = True
    return config


def _project(config: Any, project_dir: Any) -> ProjectConfiguration:
    config = _instance("project_config", config, ProjectConfiguration) or ProjectConfiguration(project_dir=project_dir)
    if project_dir is not None and config.project_dir is None:
        config.set_directories(project_dir)
    return config


def _compiling(plugin: TorchDynamoPlugin | None, backend: Any) -> TorchDynamoPlugin:
    if plugin is not None and backend is not None:
        raise ArgumentError(
            "dynamo_backend",
            given="it and a dynamo_plugin",
            expected="one of them",
            fix="put the backend in the plugin",
        )
    if backend is not None:
        return TorchDynamoPlugin(backend=backend)
    return _instance("dynamo_plugin", plugin, TorchDynamoPlugin) or TorchDynamoPlugin()


def _handlers(handlers: Any) -> dict[str, KwargsHandler]:
    found: dict[str, KwargsHandler] = {}
    for handler in handlers or ():
        name = next((name for kind, name in _HANDLERS.items() if isinstance(handler, kind)), None)
        if name is None or name in found:
            raise ArgumentError(
                "kwargs_handlers",
                given=repr(handler),
                expected=f"at most one of each of {[kind.__name__ for kind in _HANDLERS]}",
                fix="leave it out",
            )
        found[name] = handler
    return found
