"""From a model, an optimizer and a config to an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from macrobatch.colossalai.amp.precision import make_precision
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.engine.engine import Engine
from macrobatch.colossalai.engine.gradient_accumulation import (
    GradAccumDataloader,
    GradAccumGradientHandler,
    GradAccumLrSchedulerByStep,
    GradAccumOptimizer,
)
from macrobatch.colossalai.engine.gradient_handler import build_gradient_handlers
from macrobatch.colossalai.environment import LaunchError
from macrobatch.colossalai.keys import check_config
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.colossalai.utils.cuda import get_current_device
from macrobatch.core.precision import Precision
from macrobatch.core.window import Tail
from macrobatch.errors import ArgumentError
from macrobatch.plan.capture import compile_forward, replays

__all__ = ["initialize"]


def initialize(
    model: nn.Module | Callable[[], nn.Module],
    optimizer: Optimizer | Callable[..., Optimizer],
    criterion: Any = None,
    train_dataloader: Iterable[Any] | None = None,
    test_dataloader: Iterable[Any] | None = None,
    lr_scheduler: Any = None,
    ophooks: Sequence[Any] | None = None,
    verbose: bool = True,
    *,
    tail: Tail = "apply",
) -> tuple[Engine, Any, Any, Any]:
    """The engine that the config asks for, and the loaders and scheduler to use with it.

    Args:
        model: trained in place, or a function that builds it.
        optimizer: of its parameters, or a class or function of them.
        criterion: of outputs and labels; a mean over the batch.
        train_dataloader: iterate the one that is returned: it knows where the data ends.
        test_dataloader: returned as it is.
        lr_scheduler: step the one that is returned, in every iteration or in every epoch.
        tail: what becomes of the last batches of an epoch, if they do not fill a window: "apply" them as a short one,
            or "drop" them.

    Returns:
        engine, train_dataloader, test_dataloader, lr_scheduler.

    Raises:
        ConfigException: a key of the config is wrong.
        ArgumentError: an argument is none of its kind, or the optimizer has no parameter of the model.
        LaunchError: the config is not there yet.

    ```pycon
    >>> from macrobatch.colossalai import launch
    >>> launch(dict(gradient_accumulation=2), rank=0, world_size=1, host="localhost", port=29500, verbose=False)
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = [(torch.full((1, 1), x), torch.zeros(1, 1)) for x in (1.0, 2.0, 3.0)]
    >>> engine, loader, _, _ = initialize(
    ...     model, torch.optim.SGD(model.parameters(), lr=0.0), nn.L1Loss(), data, verbose=False
    ... )
    >>> for x, y in loader:
    ...     engine.zero_grad()
    ...     engine.backward(engine.criterion(engine(x), y))
    ...     _ = engine.step()
    >>> engine.num_iterations, engine.num_updates
    (3, 2)
    >>> gpc.destroy()

    ```
    """
    config = _loaded_config(verbose=verbose)
    _check_arguments(model, optimizer, criterion, train_dataloader, lr_scheduler)
    torch.backends.cudnn.benchmark = bool(config.get("cudnn_benchmark", False))
    torch.backends.cudnn.deterministic = bool(config.get("cudnn_deterministic", False))
    device = get_current_device()
    built = model if isinstance(model, nn.Module) else model()
    if not isinstance(built, nn.Module):
        raise ArgumentError(
            "model", given=type(built).__name__, expected="a module, or a function that builds one", fix="pass one"
        )
    built = built.to(device)
    plain = optimizer if isinstance(optimizer, Optimizer) else optimizer(built.parameters())
    if not isinstance(plain, Optimizer):
        raise ArgumentError(
            "optimizer", given=type(plain).__name__, expected="an optimizer, or a class of one", fix="pass one"
        )
    _check_trained(built, plain)
    compiling: dict[str, Any] | None = config.get("torch_compile")
    if compiling is not None:
        compile_forward(built, compiling)
    wrapped: nn.Module = built
    if config.get("torch_ddp") is not None and gpc.world_size > 1:
        options: dict[str, Any] = config["torch_ddp"]
        wrapped = DistributedDataParallel(
            built, device_ids=[device.index] if device.type == "cuda" else None, **options
        )
    size = int(config.get("gradient_accumulation") or 1)
    precision = make_precision(config.get("fp16"), device) or Precision()
    is_replayed = compiling is not None and replays(compiling, device)
    accumulating = GradAccumOptimizer(plain, size, wrapped, precision, replays=is_replayed)
    handlers = build_gradient_handlers(config.get("gradient_handler"), built, plain)
    engine = Engine(
        wrapped,
        accumulating,
        criterion,
        gradient_handlers=[GradAccumGradientHandler(each, size, accumulating) for each in handlers],
        clip_grad_norm=float(config.get("clip_grad_norm") or 0.0),
        ophook_list=ophooks,
        verbose=verbose,
    )
    loader: Any = train_dataloader
    if train_dataloader is not None:
        loader = GradAccumDataloader(train_dataloader, size, accumulating, tail)
    scheduler = lr_scheduler
    if lr_scheduler is not None:
        scheduler = GradAccumLrSchedulerByStep(lr_scheduler, size, accumulating)
    return engine, loader, test_dataloader, scheduler


def _check_arguments(model: Any, optimizer: Any, criterion: Any, train_dataloader: Any, lr_scheduler: Any) -> None:
    """Refuse what is none of its kind, before anything is built or moved."""
    loads = (
        train_dataloader is None or hasattr(train_dataloader, "__iter__") or hasattr(train_dataloader, "__getitem__")
    )
    steps = lr_scheduler is None or callable(getattr(lr_scheduler, "step", None))
    for name, value, is_right, expected in (
        ("model", model, callable(model), "a module, or a function that builds one"),
        ("optimizer", optimizer, isinstance(optimizer, Optimizer) or callable(optimizer), "an optimizer, or a class"),
        ("criterion", criterion, criterion is None or callable(criterion), "a function of outputs and labels, or None"),
        ("train_dataloader", train_dataloader, loads, "an iterable of batches, or None"),
        ("lr_scheduler", lr_scheduler, steps, "an object with step(), or None"),
    ):
        if not is_right:
            raise ArgumentError(name, given=repr(value), expected=expected, fix="keep the order of the arguments")


def _check_trained(model: nn.Module, optimizer: Optimizer) -> None:
    own = {id(param) for param in model.parameters()}
    if own and not any(id(param) in own for group in optimizer.param_groups for param in group["params"]):
        raise ArgumentError(
            "optimizer",
            given="one without any of the model's parameters",
            expected="an optimizer of this model",
            fix="build it from model.parameters()",
        )


def _loaded_config(*, verbose: bool) -> dict[str, Any]:
    """The config of the run, checked."""
    if gpc.config is None:
        raise LaunchError(
            "initialize",
            given="a call before launch, so without a config",
            expected="launch first: gradient_accumulation and all else is in its config",
            fix="call launch(config, ...) or launch_from_torch(config) at the top of the script",
        )
    check_config(gpc.config)
    if verbose:
        get_dist_logger().info(f"config: {dict(gpc.config)}", ranks=[0])
    return gpc.config
