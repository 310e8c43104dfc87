"""The `Accelerator` of scripts that were written for Hugging Face Accelerate, on the core's windows."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from macrobatch.accelerate import utils
from macrobatch.accelerate.checkpointing import Checkpoints
from macrobatch.accelerate.counting import WindowCounting
from macrobatch.accelerate.optimizer import AcceleratedOptimizer
from macrobatch.accelerate.original import OriginalCounting
from macrobatch.accelerate.preparation import Preparation
from macrobatch.accelerate.processes import Processes
from macrobatch.accelerate.scheduler import AcceleratedScheduler
from macrobatch.accelerate.settings import checked_num_steps, read_settings
from macrobatch.accelerate.state import AcceleratorState
from macrobatch.accelerate.tracking import Tracking
from macrobatch.accelerate.utils.dataclasses import AutocastKwargs, ProfileKwargs
from macrobatch.accelerate.utils.memory import release_memory
from macrobatch.checks import check_limit
from macrobatch.core.loss import Weight
from macrobatch.core.precision import Fp16, Precision
from macrobatch.plan.capture import replays

__all__ = ["Accelerator"]


class Accelerator(Preparation, Checkpoints, Tracking):
    """Runs a training script in one process or many; its windows are exact.

    Equivalent plain loop, for micro-batches of equal size:

    ```python
    for index, (inputs, targets) in enumerate(loader):
        loss = loss_fn(model(inputs), targets) / gradient_accumulation_steps
        loss.backward()
        if (index + 1) % gradient_accumulation_steps == 0 or index + 1 == len(loader):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    ```

    Arguments, names and defaults are those of `accelerate.Accelerator` 1.15
    (https://huggingface.co/docs/accelerate/package_reference/accelerator); what differs is in "Compatibility".

    Args:
        gradient_accumulation_steps: micro-batches per update and rank, an integer >= 1.
        gradient_accumulation_plugin: more settings of that, `normalize=` among them.
        settings: all the others, by their original names.

    Raises:
        ValueError: an argument is out of its domain, unknown, or belongs to what is not supported.

    ```pycon
    >>> from torch.utils.data import DataLoader
    >>> accelerator = Accelerator(gradient_accumulation_steps=2)
    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loader = DataLoader(torch.arange(1.0, 6.0).view(5, 1), batch_size=1)
    >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    >>> gradients = []
    >>> for batch in loader:
    ...     with accelerator.accumulate(model):
    ...         accelerator.backward(model(batch).mean())
    ...         if accelerator.sync_gradients:
    ...             gradients.append(float(accelerator.clip_grad_norm_(model.parameters(), 100.0)))
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> gradients  # (1 + 2) / 2, (3 + 4) / 2, and 5 / 1 in the short last window
    [1.5, 3.5, 5.0]

    ```
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: Any = None,
        mixed_precision: Any = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: Any = None,
        log_with: Any = None,
        project_dir: Any = None,
        project_config: Any = None,
        gradient_accumulation_plugin: Any = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Any = None,
        dynamo_backend: Any = None,
        dynamo_plugin: Any = None,
        deepspeed_plugins: Any = None,
        parallelism_config: Any = None,
    ) -> None:
        self.settings = options = read_settings(locals())
        self.state = AcceleratorState(
            mixed_precision=options.mixed_precision,
            cpu=options.cpu,
            dynamo_plugin=options.dynamo_plugin,
            fsdp_plugin=options.fsdp_plugin,
            _from_accelerator=True,
            **options.init_kwargs,
        )
        Processes.__init__(self)
        self._setup_checkpoints()
        self.project_configuration = options.project_configuration
        self.device_placement = options.device_placement
        self.dataloader_config = options.dataloader_config
        self.step_scheduler_with_optimizer = options.step_scheduler_with_optimizer
        self.rng_types = options.rng_types
        self.ddp_handler, self.scaler_handler = options.ddp_handler, options.scaler_handler
        self.init_handler, self.autocast_handler = options.init_handler, options.autocast_handler
        self.profile_handler = options.profile_handler
        narrow = self.mixed_precision
        self.native_amp = narrow == "bf16" or (narrow == "fp16" and self.device.type != "cpu")
        self.scaler = None
        if self.native_amp and self.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type, **options.scaler_kwargs)
        self._models: list[nn.Module] = []
        self._optimizers: list[AcceleratedOptimizer] = []
        self._schedulers: list[AcceleratedScheduler] = []
        self._dataloaders: list[Any] = []
        self._custom_objects: list[Any] = []
        self._counting = self._make_counting()
        self.gradient_state = self._counting.state
        self._setup_tracking(options.log_with)

    def _make_counting(self) -> WindowCounting | OriginalCounting:
        options, device_type = self.settings, self.device.type
        if options.gradient_accumulation_plugin.original:
            return OriginalCounting(options.gradient_accumulation_plugin, self.scaler, self.num_processes)
        return WindowCounting(
            options.gradient_accumulation_plugin,
            partial(_make_precision, device_type, self.scaler, options.scaler_kwargs),
            self.scaler,
            self.num_processes,
            replays=options.compile_kwargs is not None and replays(options.compile_kwargs, self.device),
        )

    # --- accumulation ---

    def accumulate(self, *models: Any) -> AbstractContextManager[Any]:
        """Context of one micro-batch: whatever is in it, any number of forwards and backwards in any order.

        Args:
            models: what is trained. Models named together share a window; a generator and a discriminator, named in
                blocks of their own, have one each.
        """
        return self._counting.block(models)

    def backward(self, loss: Tensor, weight: Weight | None = None, **kwargs: Any) -> None:
        """Add a loss's gradient to the window.

        Args:
            loss: a mean over the micro-batch's samples (which the prepared loader has counted); with `weight`, a sum
                over that many items.
            weight: items that the loss is a sum over, for instance `(labels != -100).sum()` tokens: then the window's
                gradient is that of the mean over all its tokens, on all ranks.
            kwargs: as for `torch.Tensor.backward`.
        """
        self._counting.backward(loss, weight, kwargs)

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch is the last of its window: gradients are final, `step` steps."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, sync_gradients: bool) -> None:
        self.gradient_state._set_sync_gradients(sync_gradients)  # pyright: ignore[reportPrivateUsage]

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a full window; may be set, for the window after the next micro-batch's."""
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, gradient_accumulation_steps: int) -> None:
        self.gradient_state.set_num_steps(checked_num_steps(gradient_accumulation_steps))

    @property
    def step(self) -> int:
        """Micro-batches in the window that was used last."""
        return self._counting.num_pending

    def no_sync(self, model: Any) -> AbstractContextManager[None]:
        """Context whose backwards stay on this rank, to be reduced with a later one."""
        return self._counting.no_sync(model)

    def kept_apart(self) -> AbstractContextManager[None]:
        """Context whose windows stay on their rank, for training that averages parameters instead of gradients."""
        return self._counting.kept_apart()

    @staticmethod
    @contextmanager
    def trigger_sync_in_backward(model: Any) -> Generator[None]:
        """Context of a backward that reduces although its forward was under `no_sync`. Only DDP decides in the
        forward; everything else needs nothing."""
        if not isinstance(model, DistributedDataParallel):
            yield
            return
        before = model.require_backward_grad_sync, model.require_forward_param_sync
        model.require_backward_grad_sync = model.require_forward_param_sync = True
        model.reducer.prepare_for_backward([])
        try:
            yield
        finally:
            model.require_backward_grad_sync, model.require_forward_param_sync = before

    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> AbstractContextManager[None]:
        """Context in which ranks may run out of data at different times: those that have none take part in the
        others' windows with nothing, and are brought level at the end. On CPUs, too."""
        return self._counting.joined(joinables, self._dataloaders, self, even_batches=even_batches)

    # --- the finished gradient ---

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Clip the norm of the window's gradient; returns the norm before. In a micro-batch that is not the last of
        its window, nothing is clipped and the norm so far is returned, without what FSDP2 holds back.

        Args:
            parameters: a tensor or an iterable of them: those of one or several windows, or some of them.
            max_norm: >= 0; infinity only measures.

        Raises:
            ArgumentError: `max_norm` is negative, NaN or no number.
        """
        check_limit("max_norm", max_norm)
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        return self._counting.clip_norm(params, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clip the elements of the window's gradient, once it is complete.

        Raises:
            ArgumentError: `clip_value` is negative, NaN or no number.
        """
        check_limit("clip_value", clip_value)
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        self._counting.clip_value(params, clip_value)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Make gradients final, without fp16's loss scale: those of an optimizer or of a list of them, or all."""
        wanted = self._optimizers if optimizer is None else optimizer
        each = wanted if isinstance(wanted, list | tuple) else [wanted]
        self._counting.unscale([getattr(optimizer, "optimizer", optimizer) for optimizer in each])

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether any optimizer's last full window made no update."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    # --- saving, freeing, watching ---

    def free_memory(self, *objects: Any) -> list[Any]:
        """Let go of everything prepared, and of the objects given. Returns as many None."""
        self._counting.clear()
        for held in (self._models, self._optimizers, self._schedulers, self._dataloaders):
            held.clear()
        gc.collect()
        return release_memory(*objects)

    def clear(self, *objects: Any) -> list[Any]:
        """`free_memory`."""
        return self.free_memory(*objects)

    @contextmanager
    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Generator[None]:
        """Context of the precision asked for; does nothing in full precision."""
        options = self.settings.autocast_kwargs if autocast_handler is None else autocast_handler.to_kwargs()
        if not self.native_amp:
            yield
            return
        half = torch.bfloat16 if self.mixed_precision == "bf16" else torch.float16
        with torch.autocast(self.device.type, dtype=half, **options):
            yield

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Generator[Any]:
        """Context of a `torch.profiler.profile`; a Chrome trace per rank if the handler has an `output_trace_dir`."""
        handler = profile_handler or self.settings.profile_handler or ProfileKwargs()
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is not None:
            os.makedirs(handler.output_trace_dir, exist_ok=True)
            profiler.export_chrome_trace(os.path.join(handler.output_trace_dir, f"profile_{self.process_index}.json"))
        self.wait_for_everyone()


def _make_precision(device_type: str, scaler: Any, scaler_kwargs: dict[str, Any], is_first: bool) -> Precision:
    """Of a window. The first one's loss scale is the accelerator's, which scripts may look at and set."""
    if scaler is None:
        return Precision()
    return Fp16(device_type, scaler if is_first else torch.amp.GradScaler(device_type, **scaler_kwargs))


def __getattr__(name: str) -> Any:
    return getattr(utils, name)  # scripts import plugins and constants from here, too
