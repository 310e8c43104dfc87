"""Which processes there are and what they compute in: constructible anywhere, and always the same."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from macrobatch import launch
from macrobatch.accelerate.gradient_state import GradientState
from macrobatch.accelerate.utils.absent import refuse_absent
from macrobatch.accelerate.utils.enums import DistributedType, DynamoBackend, PrecisionType
from macrobatch.accelerate.utils.environment import (
    debug_mode,
    device_from_env,
    parse_choice_from_env,
    parse_flag_from_env,
)
from macrobatch.errors import ArgumentError
from macrobatch.launch.group import together

__all__ = ["AcceleratorState", "GradientState", "PartialState", "do_nothing", "is_initialized"]


def is_initialized() -> bool:
    """Whether an `AcceleratorState` has been made."""
    return bool(AcceleratorState._shared_state)  # pyright: ignore[reportPrivateUsage]


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Nothing, whatever is passed."""


class PartialState:
    """The ranks, and what they do together. Made once; further ones are the same.

    Joins whoever started the processes (torchrun, Slurm, MPI). On a machine without a GPU that is one gloo job.

    Args:
        cpu: stay on CPUs.
        kwargs: `backend` and `timeout` of `init_process_group`.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        self.__dict__ = self._shared_state
        if self.__dict__:
            return
        stays = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        timeout = kwargs.get("timeout")
        backend = kwargs.get("backend")
        has_gpu = torch.cuda.is_available() and not stays
        if backend == "nccl" and not has_gpu:
            backend = None
        ranks = launch.init(
            backend or ("gloo" if stays else None), timeout_s=None if timeout is None else timeout.total_seconds()
        )
        is_alone = not dist.is_initialized()
        device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
        device = torch.device(device_from_env() or device)
        kind = DistributedType.NO
        if not is_alone:
            kind = DistributedType.MULTI_GPU if has_gpu else DistributedType.MULTI_CPU
        self._shared_state.update(
            num_processes=ranks.world_size,
            process_index=ranks.rank,
            local_process_index=ranks.local_rank,
            device=device,
            backend=None if is_alone else str(dist.get_backend()),
            distributed_type=kind,
            debug=debug_mode(),
            fork_launched=parse_flag_from_env("FORK_LAUNCHED"),
            _cpu=cpu,
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__}.{name}: given a request for it; expected one of {sorted(self._shared_state)}. "
            "To fix it, construct an Accelerator or a PartialState first (again, after a reset)."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartialState) and self.__dict__ == other.__dict__  # one of another process is not

    def __hash__(self) -> int:
        return hash(PartialState)

    def __repr__(self) -> str:
        return (
            f"Distributed environment: {self.distributed_type}  Backend: {self.backend}\n"
            f"Num processes: {self.num_processes}\nProcess index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\nDevice: {self.device}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        """Forget everything, as tests do between two of them."""
        PartialState._shared_state.clear()
        debug_mode.cache_clear()

    @property
    def initialized(self) -> bool:
        """Whether there is a state."""
        return bool(PartialState._shared_state)

    @property
    def use_distributed(self) -> bool:
        """Whether there is a group of ranks."""
        return self.distributed_type != DistributedType.NO and self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        """Rank 0."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Rank 0 of its machine."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """The highest rank."""
        return self.process_index == self.num_processes - 1

    @property
    def default_device(self) -> torch.device:
        """Where this rank would compute, if nobody said otherwise."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def set_device(self) -> None:
        """Make this rank's GPU the current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def wait_for_everyone(self) -> None:
        """Go on when all ranks are here."""
        if self.use_distributed:
            dist.barrier()

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the group of ranks."""
        if dist.is_initialized():
            dist.destroy_process_group(group)

    @contextmanager
    def _first(self, is_first: bool) -> Generator[None]:
        meeting = together(
            "main_process_first",
            expected="those that go first to come through",
            fix="see what that says",
            all_ranks=self.use_distributed,
        )
        if is_first:
            with meeting:
                yield
            return
        with meeting:
            pass
        yield

    @contextmanager
    def main_process_first(self) -> Generator[None]:
        """Context that rank 0 goes through before the others, to which an error there is a `PeerError`."""
        with self._first(self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Generator[None]:
        """Context that rank 0 of each machine goes through before the others."""
        with self._first(self.is_local_main_process):
            yield

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorator: the function runs on rank 0 only; elsewhere it returns None."""
        return self._only(function, lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorator: the function runs on rank 0 of each machine only."""
        return self._only(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Decorator: the function runs on the highest rank only."""
        return self._only(function, lambda: self.is_last_process)

    def on_process(
        self, function: Callable[..., Any] | None = None, process_index: int | None = None
    ) -> Callable[..., Any]:
        """Decorator: the function runs on one rank only; where there is but one, always."""
        return self._only(function, lambda: not self.use_distributed or self.process_index == process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Callable[..., Any]:
        """Decorator: the function runs on one rank of each machine only; where there is but one, always."""
        return self._only(function, lambda: not self.use_distributed or self.local_process_index == local_process_index)

    def _only(self, function: Callable[..., Any] | None, is_here: Callable[[], bool]) -> Callable[..., Any]:
        if function is None:
            return partial(self._only, is_here=is_here)

        @wraps(function)
        def only(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if is_here() else None

        return only

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on the main process of each machine."""
        if self.is_local_main_process:
            builtins.print(*args, **kwargs)  # noqa: T201

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Generator[Any]:
        """Context that yields this rank's share of a list, tuple, tensor, or dict of them; the first ranks get one
        more where it does not come out even.

        Args:
            apply_padding: repeat the last element, so that all ranks have as many.
        """
        if self.num_processes == 1:
            yield inputs
            return
        lengths = {len(value) for value in inputs.values()} if isinstance(inputs, dict) else {len(inputs)}
        if len(lengths) != 1:
            raise ArgumentError(
                "inputs", given=f"values of lengths {sorted(lengths)}", expected="one length", fix="make them equal"
            )
        share, extra = divmod(lengths.pop(), self.num_processes)
        start = self.process_index * share + min(self.process_index, extra)
        end = start + share + (self.process_index < extra)
        num_rows = share + 1 if apply_padding and extra else None
        if isinstance(inputs, dict):
            yield {key: _cut(value, start, end, num_rows) for key, value in inputs.items()}
        else:
            yield _cut(inputs, start, end, num_rows)


_PRECISIONS = tuple(each for each in PrecisionType.list() if each != "fp8")


class AcceleratorState:
    """`PartialState`, and what an accelerator was made with. Made once; further ones are the same.

    Raises:
        ValueError: a further one asks for another precision.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        parallelism_config: Any = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_absent(
            deepspeed_plugin=deepspeed_plugin,
            torch_tp_plugin=torch_tp_plugin,
            megatron_lm_plugin=megatron_lm_plugin,
            parallelism_config=parallelism_config,
        )
        self.__dict__ = self._shared_state
        if self.__dict__:
            if mixed_precision is not None and str(mixed_precision).lower() != self._mixed_precision:
                raise ArgumentError(
                    "mixed_precision",
                    given=repr(mixed_precision),
                    expected=f"{self._mixed_precision!r}, as the first accelerator of this process was made with",
                    fix="construct the first one with it",
                )
            return
        precision = (mixed_precision or parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")).lower()
        if precision not in _PRECISIONS:
            raise ArgumentError(
                "mixed_precision", given=repr(precision), expected=f"one of {_PRECISIONS}", fix='pass "bf16"'
            )
        partial_state = PartialState(cpu, **kwargs)
        self._shared_state.update(
            _mixed_precision=precision, dynamo_plugin=dynamo_plugin, fsdp_plugin=fsdp_plugin, _partial=partial_state
        )

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        return self._mixed_precision

    @property
    def distributed_type(self) -> DistributedType:
        """What kind of processes there are."""
        return DistributedType.FSDP if self.fsdp_plugin is not None else self._partial.distributed_type

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded."""
        return self.fsdp_plugin is not None

    @property
    def dynamo_backend(self) -> Any:
        """What forwards are compiled with."""
        return DynamoBackend.NO if self.dynamo_plugin is None else self.dynamo_plugin.backend

    @property
    def initialized(self) -> bool:
        """Whether there is a state."""
        return bool(AcceleratorState._shared_state)

    def __getattr__(self, name: str) -> Any:
        if name in ("deepspeed_plugin", "megatron_lm_plugin", "parallelism_config", "torch_tp_plugin"):
            return None
        if "_partial" in self._shared_state:
            return getattr(self._shared_state["_partial"], name)
        raise AttributeError(
            f"AcceleratorState.{name}: given a request for it; expected an Accelerator to have been constructed. "
            "To fix it, construct one first (again, after a reset)."
        )

    def __repr__(self) -> str:
        return f"{self._partial!r}\nMixed precision type: {self.mixed_precision}\n"

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Forget everything, as tests do between two of them."""
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()  # pyright: ignore[reportPrivateUsage]


def _cut(value: Any, start: int, end: int, num_rows: int | None) -> Any:
    """Rows of something; the last of all repeated up to `num_rows`."""
    if hasattr(value, "select") and hasattr(value, "column_names"):  # a datasets.Dataset
        last = len(value) - 1
        return value.select([min(row, last) for row in range(start, max(end, start + (num_rows or 0)))])
    part = value[start:end]
    missing = 0 if num_rows is None else num_rows - len(part)
    if missing <= 0:
        return part
    if isinstance(value, Tensor):
        return torch.cat([part, *[value[-1:]] * missing])
    return part + type(value)([value[-1]]) * missing
