"""What an accelerator does to models, optimizers, loaders and schedulers before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from macrobatch.accelerate.counting import WindowCounting
from macrobatch.accelerate.data_loader import prepare_data_loader, skip_first_batches
from macrobatch.accelerate.models import (
    NoSync,
    autocast_forward,
    replicate,
    shard,
    shares_parameters,
    swap_parameters,
    wrap,
)
from macrobatch.accelerate.optimizer import AcceleratedOptimizer
from macrobatch.accelerate.original import OriginalCounting
from macrobatch.accelerate.processes import Processes
from macrobatch.accelerate.scheduler import AcceleratedScheduler
from macrobatch.accelerate.settings import Settings
from macrobatch.accelerate.utils.dataclasses import DataLoaderConfiguration
from macrobatch.accelerate.utils.other import extract_model_from_parallel
from macrobatch.errors import ArgumentError
from macrobatch.plan.capture import compile_forward

__all__ = ["Preparation"]


class Preparation(Processes):
    """The part of `Accelerator` that prepares. Everything stays what it was, or shows all that it had."""

    deepspeed_plugin = None  # scripts ask before they use them
    parallelism_config = None
    torch_device_mesh = None
    fp8_backend = None
    settings: Settings
    project_configuration: Any
    native_amp: bool
    autocast: Callable[[], AbstractContextManager[Any]]
    device_placement: bool
    dataloader_config: DataLoaderConfiguration
    step_scheduler_with_optimizer: bool
    rng_types: list[Any]
    scaler: Any
    _counting: WindowCounting | OriginalCounting
    _models: list[nn.Module]
    _optimizers: list[AcceleratedOptimizer]
    _schedulers: list[AcceleratedScheduler]
    _dataloaders: list[Any]

    def prepare(self, *args: Any, device_placement: Sequence[bool] | None = None) -> Any:
        """Models, optimizers, loaders and schedulers made ready, in the order given; anything else comes back as it is.

        Args:
            device_placement: one flag for each argument.
        """
        placements: Sequence[bool | None] = [None] * len(args) if device_placement is None else device_placement
        if len(placements) != len(args):
            raise ArgumentError(
                "device_placement", given=list(placements), expected=f"{len(args)} flags, one each", fix="leave it out"
            )
        if self.settings.fsdp_plugin is not None:
            self._shard(args)
        first = [self._prepared(obj, placement) for obj, placement in zip(args, placements, strict=True)]
        done = [self.prepare_scheduler(obj) if _is_scheduler(obj) else obj for obj in first]
        for obj in done:
            if isinstance(obj, nn.Module | Optimizer | DataLoader | LRScheduler):
                obj._is_accelerate_prepared = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        return done[0] if len(done) == 1 else tuple(done)

    def _prepared(self, obj: Any, device_placement: bool | None) -> Any:
        if isinstance(obj, DataLoader):
            return self.prepare_data_loader(obj, device_placement)
        if isinstance(obj, nn.Module):
            return self.prepare_model(obj, device_placement)
        if isinstance(obj, Optimizer):
            return self.prepare_optimizer(obj, device_placement)
        return obj

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Place a model, and make its forward run in the precision asked for. It stays the same module, unless
        `DistributedDataParallelKwargs` ask for a wrapper.

        Args:
            evaluation_mode: only placement, precision and compilation.
        """
        if any(model is known for known in self._models) or getattr(model, "_is_accelerate_prepared", False):
            self._remember(model)
            return model
        is_sharded = self.settings.fsdp_plugin is not None
        if (self.device_placement if device_placement is None else device_placement) and not is_sharded:
            model = model.to(self.device)
        if self.native_amp and not is_sharded:
            autocast_forward(model, self.autocast)
        if not evaluation_mode and self.num_processes > 1 and any(p.requires_grad for p in model.parameters()):
            if self.settings.ddp_handler is not None and not isinstance(model, DistributedDataParallel):
                model = wrap(model, self.device, self.settings.ddp_handler)
            elif not is_sharded and not isinstance(model, DistributedDataParallel):
                replicate(model, self.device)
            if not hasattr(model, "no_sync"):
                vars(model)["no_sync"] = NoSync(self)
        if self.settings.compile_kwargs is not None:
            compile_forward(model, self.settings.compile_kwargs)
        self._remember(model)
        return model

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """An optimizer whose `step` and `zero_grad` follow its window."""
        if not isinstance(optimizer, AcceleratedOptimizer):
            placement = self.device_placement if device_placement is None else device_placement
            optimizer = self._counting.wrapped(optimizer, placement)
        if not any(optimizer is known for known in self._optimizers):
            self._optimizers.append(optimizer)
            self._counting.add(optimizer=optimizer.optimizer)
        return optimizer

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """A scheduler that follows its optimizer, or all of them if none of them is its own."""
        if not isinstance(scheduler, AcceleratedScheduler):
            own = getattr(scheduler, "optimizer", None)
            followed = [o for o in self._optimizers if o is own or o.optimizer is own] or self._optimizers
            scheduler = self._counting.scheduler_type(
                scheduler,
                followed,
                self.step_scheduler_with_optimizer,
                self.split_batches,
                num_processes=self.num_processes,
                adjusts=self.gradient_state.adjust_scheduler,
            )
        if not any(scheduler is known for known in self._schedulers):
            self._schedulers.append(scheduler)
        return scheduler

    def prepare_data_loader(
        self, data_loader: DataLoader[Any], device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        """A loader of this rank's share of the data, on its device."""
        if getattr(data_loader, "_is_accelerate_prepared", False):
            if not any(data_loader is known for known in self._dataloaders):
                self._dataloaders.append(data_loader)
            return data_loader
        config = self.dataloader_config
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=self.num_processes,
            process_index=self.process_index,
            split_batches=self.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=list(self.rng_types),
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            slice_fn_for_dispatch=slice_fn_for_dispatch,
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
            non_blocking=config.non_blocking,
            use_stateful_dataloader=config.use_stateful_dataloader,
        )
        prepared.reads_ahead = config.reads_ahead  # pyright: ignore[reportAttributeAccessIssue]
        self._dataloaders.append(prepared)
        return prepared

    def skip_first_batches(self, dataloader: Any, num_batches: int | None = None) -> Any:
        """A loader over what comes after the first batches; without a number, after those of a loaded checkpoint."""
        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The module inside a wrapper; the module itself, if there is none."""
        return extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def _remember(self, model: nn.Module) -> None:
        if not any(model is known for known in self._models):
            self._models.append(model)
        self._counting.add(model=model)

    def _shard(self, args: Sequence[Any]) -> None:
        models = [obj for obj in args if isinstance(obj, nn.Module)]
        optimizers = [getattr(obj, "optimizer", obj) for obj in args if isinstance(obj, Optimizer)]
        for model in models:
            before: dict[str, Tensor] = dict(model.named_parameters())
            own = [optimizer for optimizer in optimizers if shares_parameters(model, optimizer)]
            if any(param.requires_grad for param in before.values()) and not own:
                raise ArgumentError(
                    "prepare",
                    given="a model to shard, without its optimizer",
                    expected="both in one call, so that the optimizer can be given the shards",
                    fix="call prepare(model, optimizer, ...)",
                )
            model.to(self.device)
            shard(model, self.settings.fsdp_plugin, mixed_precision=self.mixed_precision)
            swap_parameters(own, before, model)

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        return self.state.mixed_precision

    @property
    def split_batches(self) -> bool:
        """Whether each batch of a loader is split over the ranks."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 reads the data for all."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """Whether samples of the first batches fill up the last ones."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self.dataloader_config.even_batches = value

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether shuffling is a function of seed and epoch."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether batches are copied to the device without waiting."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether a loader that was restored leaves out by itself what was seen."""
        return self.dataloader_config.use_stateful_dataloader

    @property
    def project_dir(self) -> str | None:
        """Where a project's files go."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        """Where trackers write."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """Number of the next automatic checkpoint."""
        return self.project_configuration.iteration

    @property
    def should_save_model(self) -> bool:
        """Whether this rank has a whole model to save."""
        return self.is_main_process

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded."""
        return self.settings.fsdp_plugin is not None


def _is_scheduler(obj: Any) -> bool:
    return isinstance(obj, LRScheduler | ReduceLROnPlateau)
