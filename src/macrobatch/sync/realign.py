"""FSDP2's collectives, counted, so that a rank that failed between two of them can take its place among the others.

All ranks send the same collectives in the same order, whatever is in their micro-batches. A rank whose micro-batch
fails after `n` of them runs it once more, with next to nothing in it, and leaves the first `n` out: the others, who
know nothing of it, find the rest where they expect it. What the window adds up to is then worthless on every rank; what
counts is that it comes to its end, where they hear of it.

In place of what a collective left out would have brought, the rank's own part is repeated. The model runs on that, so a
forward that decides by its activations which layers to call cannot be helped in this way, nor one that sends
collectives of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

__all__ = ["Realigned", "forget", "groups_in"]


class Realigned:
    """The collectives of a model's FSDP2 modules. It stands between FSDP2 and what sends for it.

    Args:
        modules: all of a model's.
    """

    def __init__(self, modules: Iterable[FSDPModule]) -> None:
        self._modules = list(modules)
        self._groups: list[Any] = groups_in(self._modules)
        self._lengths: dict[int, int] = {}
        self._indices: list[tuple[Any, list[int]]] = []
        self._ready: set[int] = set()
        self._reduced: list[Any] = []
        self._halted: list[tuple[Any, bool]] = []
        self._num_sent = 0
        self._num_to_skip = 0
        self._is_redone = False
        for group in self._groups:
            group._all_gather_comm = _Gather(group._all_gather_comm, self, group)
            group._reduce_scatter_comm = _Reduce(group._reduce_scatter_comm, self, group)

    @classmethod
    def of(cls, modules: Iterable[FSDPModule]) -> Realigned:
        """The one that stands there, from an earlier step with the same model; or a new one."""
        modules = list(modules)
        lines = [getattr(group._all_gather_comm, "line", None) for group in groups_in(modules)]
        there = lines[0] if lines else None
        return there if there is not None and there._modules == modules else cls(modules)

    def begin(self) -> None:
        """A micro-batch begins: note what a second run of it would have to begin with."""
        self.end()
        self._lengths = {key: len(order) for key, order in self._orders().items()}
        self._indices = [(g, list(g._post_forward_indices)) for g in self._groups if g._post_forward_indices]
        self._ready = {id(g) for g in self._groups if g.is_unsharded or g._all_gather_result is not None}

    def redo(self) -> None:
        """The micro-batch has failed, and begins once more; what has been sent is not sent again.

        Parameters that were whole when it began (a policy may keep them) are gathered anew by this rank alone: the
        first gathering of each is left out, too.
        """
        before = {key: order[: self._lengths.get(key, 0)] for key, order in self._orders().items()}
        for module in self._modules:
            _reset(module)
        for key, order in self._orders().items():
            order[:] = before[key]
        for group, indices in self._indices:
            group._post_forward_indices[:] = indices
        self._num_to_skip, self._is_redone = self._num_sent, True
        self._halted = [(group, group.all_reduce_grads) for group in self._reduced]
        for group in self._reduced:  # on a hybrid mesh, the all-reduce that follows a reduce-scatter goes with it
            group.all_reduce_grads = False

    def send(self, comm: _Comm, output: Tensor, source: Tensor, options: dict[str, Any]) -> Any:
        """A collective of a group of parameters: to be sent, or to be left out."""
        if self._is_redone and isinstance(comm, _Gather) and id(comm.params) in self._ready:
            self._ready.discard(id(comm.params))
            return _made_up(output, source)
        if self._num_to_skip:
            self._num_to_skip -= 1
            return _made_up(output, source)
        work = comm.inner(output_tensor=output, input_tensor=source, **options)
        self._num_sent += 1
        if isinstance(comm, _Reduce):
            self._reduced.append(comm.params)
        return work

    def _orders(self) -> dict[int, list[Any]]:
        """In which order forwards were run: what prefetching in a backward goes by. From the first forward on, all
        groups below one root share it."""
        contexts = {id(group.comm_ctx): group.comm_ctx for group in self._groups}
        return {
            key: context.post_forward_order
            for key, context in contexts.items()
            if hasattr(context, "post_forward_order")
        }

    def end(self) -> None:
        """Nothing has been sent, and nothing is to be left out."""
        for group, reduces in self._halted:
            group.all_reduce_grads, group._partial_reduce_output = reduces, None
        self._halted, self._reduced = [], []
        self._num_sent = self._num_to_skip = 0
        self._is_redone = False
        self._ready.clear()


class _Comm:
    """What FSDP2 has for sending, seen by a `Realigned`."""

    def __init__(self, inner: Any, line: Realigned, params: Any) -> None:
        self.inner = inner
        self.params = params
        self.line = line

    def allocate(self, *args: Any, **options: Any) -> Tensor:
        """Memory to send from or to receive in."""
        return self.inner.allocate(*args, **options)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        return self.line.send(self, output_tensor, input_tensor, options)


class _Gather(_Comm):
    """All-gather."""


class _Reduce(_Comm):
    """Reduce-scatter."""


def _made_up(output: Tensor, source: Tensor) -> None:
    """Fill what would have been received with numbers like those that would have been sent."""
    if output.numel() > source.numel():  # the source is a part of the output
        output.view(-1, source.numel()).copy_(source.clone())
    else:
        output.copy_(source[: output.numel()])


def forget(modules: Iterable[FSDPModule]) -> None:
    """Let FSDP2 forget a window that has failed: a forward or backward under way, and gradients not yet reduced."""
    modules = list(modules)
    for module in modules:
        _reset(module)
    for group in groups_in(modules):
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def groups_in(modules: Iterable[FSDPModule]) -> list[Any]:
    """FSDP2's groups of parameters."""
    states = [module._get_fsdp_state() for module in modules]  # pyright: ignore[reportPrivateUsage]
    return [group for state in states for group in _groups_of(state)]


def _groups_of(state: Any) -> list[Any]:
    """The groups of parameters of one FSDP2 module; versions of PyTorch that know of one only call it otherwise."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _reset(module: Any) -> None:
    """Let FSDP2 forget the forward or backward under way, if the module is a root."""
    state = module._get_fsdp_state()
    if not state._is_root:
        return
    torch.accelerator.synchronize() if state._device.type != "cpu" else None
    if hasattr(module, "reset_iter_state"):  # torch >= 2.13
        module.reset_iter_state()
        return
    shared, context, idle = state._state_ctx, state._comm_ctx, type(state._training_state).IDLE
    context.all_gather_state = context.reduce_scatter_state = None
    context.post_forward_order.clear()
    for each in shared.all_states:
        each._training_state = idle
        each._modules_to_run_forward.clear()
        for group in _groups_of(each):
            group._all_gather_result = group._post_reduce_event = group._reshard_after_forward_event = None
            group._all_reduce_state = group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = idle
            group._to_sharded()
    shared.iter_forward_root = None
    shared.post_backward_final_callback_queued = False
