"""How a step's micro-batches are run: eagerly, compiled, or recorded and replayed.

Replayed CUDA graphs read and write fixed addresses, those of torch.compile's mode "reduce-overhead" too. Gradients that
are None between windows then raise "accessing tensor output of CUDAGraphs that has been overwritten", or are summed
wrongly (https://github.com/pytorch/pytorch/issues/169545). The views of the flat buffer stay where they are, so
autograd adds into them in place, whatever made the addend.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from functools import wraps
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from macrobatch.core.autograd import wider_aside
from macrobatch.core.microstep import LossFn, MicroStep
from macrobatch.core.twopass import TwoPass
from macrobatch.errors import ArgumentError, LossError
from macrobatch.plan.graphs import Graphs
from macrobatch.plan.surroundings import Unfit, form_of
from macrobatch.tree import leaves, map_tensors

__all__ = ["Capture", "Captured", "Compiled", "Way", "captured", "compile_forward", "replays"]

Capture = Literal["auto", "compile", "graph"]
Way = tuple[LossFn, MicroStep]
"""A loss function, and what runs it."""
_MAX_FORMS = 8  # torch.compile's own limit of recompilations
_LOG = logging.getLogger("macrobatch")


class Captured(NamedTuple):
    """A loss function, what runs it, and whether micro-batches may be replayed without autograd's hooks; and what else
    to try, if there is a choice."""

    loss_fn: LossFn
    micro_step: MicroStep
    replays: bool
    other: Way | None = None


def captured(loss_fn: LossFn, capture: object, device: torch.device) -> Captured:
    """A loss function and what runs it, as `capture` says; None runs it as it is.

    Raises:
        ArgumentError: it is none of `Capture`, or the loss is a `TwoPass`.

    ```pycon
    >>> captured(len, None, torch.device("cpu")).replays
    False

    ```
    """
    if capture is None:
        return Captured(loss_fn, MicroStep(), replays=False)
    if isinstance(loss_fn, TwoPass):
        raise ArgumentError(
            "capture",
            given=f"{capture!r} for a TwoPass",
            expected="None: its second pass depends on all of the first",
            fix="compile the encoders themselves, with torch.compile(model)",
        )
    if isinstance(capture, MicroStep):
        return Captured(loss_fn, capture, replays=True)
    if capture == "compile":
        is_replayed = device.type == "cuda"
        micro_step = Graphs(num_rehearsals=3) if is_replayed else MicroStep()
        return Captured(Compiled(loss_fn), micro_step, replays=is_replayed)
    if capture == "auto":
        compiled = Compiled(loss_fn, draws_alike=True)
        if device.type == "cuda":
            other = compiled, Graphs(verifies=True, num_rehearsals=3)
            return Captured(loss_fn, Graphs(verifies=True), replays=True, other=other)
        return Captured(loss_fn, MicroStep(), replays=False, other=(compiled, MicroStep()))
    if capture == "graph":
        if device.type == "cuda":
            return Captured(loss_fn, Graphs(), replays=True)
        _LOG.warning("capture: runs eagerly, since the model is on a %s, and CUDA graphs need a GPU", device.type)
        return Captured(loss_fn, MicroStep(), replays=False)
    raise ArgumentError(
        "capture",
        given=repr(capture),
        expected=f"None, one of {get_args(Capture)}, or a MicroStep such as Graphs(max_recordings=16)",
        fix="leave it out to run eagerly",
    )


class Compiled:
    """A loss function that torch.compile has compiled.

    Every form of micro-batch is compiled for itself, up to eight, so a short last micro-batch slows no other one down;
    further forms run eagerly. If the function cannot be compiled, it runs as it is. One line in the log says why.
    torch.compile draws other random numbers than eager PyTorch does, unless it is told not to.

    Args:
        loss_fn: to be compiled, when it is called.
        draws_alike: draw the random numbers that eager PyTorch draws.
    """

    def __init__(self, loss_fn: LossFn, *, draws_alike: bool = False) -> None:
        self.eager = loss_fn
        self._forms: set[Hashable] = set()
        self._has_warned = False
        self._narrow: list[Tensor] | None = None
        options: dict[str, Any] = {"options": {"fallback_random": True}} if draws_alike else {}
        self._compiled: LossFn | None = torch.compile(loss_fn, dynamic=False, **options)

    @property
    def is_compiled(self) -> bool:
        """Whether there is still hope that it is."""
        return self._compiled is not None

    def __call__(self, model: Any, micro_batch: Any) -> Any:
        if self._compiled is None or not self._is_admitted(micro_batch):
            return self.eager(model, micro_batch)
        if self._narrow is None:
            self._narrow = [param for param in model.parameters() if param.itemsize < 4]
        try:
            with wider_aside(self._narrow):
                return self._compiled(model, micro_batch)
        except (LossError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not _is_compilers(error):
                raise
            self._compiled = None
            _LOG.warning("capture: runs eagerly, since torch.compile failed: %s", str(error).partition("\n")[0])
            return self.eager(model, micro_batch)

    def _is_admitted(self, micro_batch: Any) -> bool:
        try:
            key = form_of(micro_batch).key
        except Unfit:  # torch.compile has its own ways with it
            return True
        if key in self._forms:
            return True
        if len(self._forms) < _MAX_FORMS:
            self._forms.add(key)
            return True
        if not self._has_warned:
            self._has_warned = True
            _LOG.warning(
                "capture: runs eagerly, since there are more than %d forms of micro-batch; further ones", _MAX_FORMS
            )
        return False


def compile_forward(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Run a model's forward through torch.compile, in place.

    Whoever calls it begins every micro-batch with `torch.compiler.cudagraph_mark_step_begin()` if it `replays`. What a
    CUDA graph returns is overwritten by its next replay, so outputs are copied out of it.

    Args:
        options: for `torch.compile`.
    """
    forward = model.forward
    compiled = torch.compile(forward, **options)
    narrow: list[Tensor] = []

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not narrow:
            narrow.extend(param for param in model.parameters() if param.itemsize < 4)
        with wider_aside(narrow):
            output = compiled(*args, **kwargs)
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        is_overwritten = replays(options, tensors[0].device) if tensors else False
        return map_tensors(Tensor.clone, output) if is_overwritten else output

    model.forward = run


def replays(options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether torch.compile makes CUDA graphs with these options.

    ```pycon
    >>> replays({"mode": "reduce-overhead"}, torch.device("cuda")), replays({}, torch.device("cuda"))
    (True, False)

    ```
    """
    asked = (options.get("options") or {}).get("triton.cudagraphs", False)
    by_name = options.get("mode") in ("reduce-overhead", "max-autotune") or options.get("backend") == "cudagraphs"
    return device.type == "cuda" and bool(by_name or asked)


def _is_compilers(error: BaseException) -> bool:
    """Whether an error is the compiler's and not the loss function's own."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch.fx"))
