"""Starting a training function on several ranks, from a notebook or a test."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from macrobatch import launch
from macrobatch.accelerate.state import AcceleratorState, PartialState
from macrobatch.accelerate.utils.environment import patch_environment
from macrobatch.errors import ArgumentError, WindowError

__all__ = ["debug_launcher", "notebook_launcher"]

_MACHINES = {
    "master_addr": "127.0.0.1",
    "node_rank": 0,
    "num_nodes": 1,
    "rdzv_backend": "static",
    "rdzv_endpoint": "",
    "rdzv_conf": None,
    "rdzv_id": "none",
    "max_restarts": 0,
    "monitor_interval": 0.1,
    "log_line_prefix_template": None,
}
"""What the original takes for several machines and restarts, with its defaults."""


def notebook_launcher(
    function: Callable[..., Any],
    args: Iterable[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Any = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: Any = None,
) -> Any:
    """Run a function on every GPU of this machine, or on `num_processes` CPU ranks; with one, in this process.

    Args:
        function: what each rank does; it constructs the `Accelerator`.
        args: its arguments.
        num_processes: number of ranks; by default one per GPU.
        mixed_precision: of accelerators that are not told otherwise.
        use_port: accepted; ranks meet on a port that is free.
        master_addr: this and what follows are for several machines and restarts; anything but a default is refused.

    Raises:
        ArgumentError: an argument is out of its domain.
        WindowError: there is an `Accelerator` already.
    """
    given = locals()
    for name in _MACHINES:
        value = given[name]
        if value != _MACHINES[name]:
            raise ArgumentError(
                name,
                given=repr(value),
                expected=f"{_MACHINES[name]!r}: ranks of this machine, started once",
                fix="start a script with torchrun",
            )
    if mixed_precision not in ("no", "fp16", "bf16"):
        raise ArgumentError(
            "mixed_precision", given=repr(mixed_precision), expected='"no", "fp16" or "bf16"', fix='"bf16"'
        )
    count = (torch.cuda.device_count() or 1) if num_processes is None else num_processes
    if count != 1:
        _refuse_state("notebook_launcher")
    with patch_environment(ACCELERATE_MIXED_PRECISION=mixed_precision):
        results = launch.spawn(function, args, count, start_method=_method(function, count))
    return results[0] if count == 1 else None


def debug_launcher(function: Callable[..., Any], args: Iterable[Any] = (), num_processes: int = 2) -> None:
    """Run a function on a few CPU ranks, to try it out. With one, in this process, which forgets it afterwards: as from
    several, nothing of its state is left.

    Raises:
        WindowError: there is an `Accelerator` already.
    """
    _refuse_state("debug_launcher")
    try:
        with patch_environment(ACCELERATE_USE_CPU="yes"):
            launch.spawn(function, args, num_processes, backend="gloo", start_method=_method(function, num_processes))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


def _method(function: Callable[..., Any], num_processes: int) -> Literal["auto", "fork"]:
    """Forks for functions that a fresh interpreter would not find: closures, lambdas."""
    if num_processes == 1:
        return "auto"
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError):
        return "fork"
    return "auto"


def _refuse_state(launcher: str) -> None:
    if AcceleratorState._shared_state or PartialState._shared_state:  # pyright: ignore[reportPrivateUsage]
        raise WindowError(
            launcher,
            given="a process that has an Accelerator, or a PartialState, already",
            expected="the first one to be constructed in the function",
            fix="restart the notebook's kernel, and construct the Accelerator in the training function only",
        )
