"""Weight gradients of linear layers in 16 bits, added to the fp32 buffer by the matrix product itself, and those of
embeddings, added to the rows that were looked up.

Autograd makes the gradient of a bf16 weight, or of the bf16 copy that autocast makes of it, in bf16, rounded, and adds
it to the buffer in further passes over both. A matrix product can add its fp32 result to an fp32 matrix in place: less
than half the traffic, and one rounding less. Of an embedding, autograd makes a gradient as large as the whole table.
For the time of a window, `nn.Linear` and `nn.Embedding` layers of a model get a forward whose backward adds in place.
What it cannot do is left to autograd, layer by layer and backward by backward, and adds up with it in the same view.
Weights stay what they are for a window, so autocast's copies of them are made once, and not for every micro-batch.

Source: `torch.addmm(..., out_dtype=torch.float32)`, https://docs.pytorch.org/docs/stable/generated/torch.addmm.html
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge, increment_version
from torch.utils.hooks import RemovableHandle

from macrobatch.core.gradients import GradientBuffer, Slot
from macrobatch.core.rounded import HALF, Rounded, keep_address

__all__ = ["FusedLinear", "add_product", "add_rows"]

_CAST = (*HALF, torch.float32)  # by autocast


class FusedLinear:
    """The linear layers and embeddings of a model, for whose weights a gradient buffer may be written to directly.

    Fused are weights of plain `nn.Linear` layers of which the buffer has an fp32 view, where the layer computes in bf16
    or fp16: in its weight's dtype, or in autocast's; and plain `nn.Embedding` layers in any of these or fp32. A weight
    that they share is added to by both. Left as they are: frozen weights, those with hooks, parametrized or spread over
    ranks, layers with a forward of their own, linear layers that compute in fp32, and embeddings with
    `scale_grad_by_freq` or `max_norm`. A backward with `create_graph=True` and `torch.autograd.grad` work as ever,
    unless they are part of what torch.compile compiles. Hooks on a weight's node of the graph are not seen.

    Args:
        model: whose layers.
        autocast: the dtype of the autocast that forwards run in, if it is known. Linear layers in fp32 then get their
            weights and biases from copies in this dtype, made when a window begins.

    ```pycon
    >>> layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    >>> buffer = GradientBuffer(layer.parameters)
    >>> buffer.start()
    >>> with FusedLinear(layer).into(buffer):
    ...     layer(torch.ones(3, 2, dtype=torch.bfloat16)).sum().backward()
    >>> layer.weight.grad
    tensor([[3., 3.]])

    ```
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        self._model = model
        self._autocast = autocast
        self._rounded = Rounded(autocast)
        self._layout: list[Slot] = []
        self._layers: list[_Layer] = []
        self._nodes: list[Any] = []
        """What adds to the weights' gradients: held, since autograd does not, with a hook on each."""
        self._hooks: list[RemovableHandle] = []
        self._run_eagerly: set[int] = set()
        """Weights of layers whose forward Python ran in this window, by `id`."""

    @contextmanager
    def into(self, gradients: GradientBuffer) -> Generator[None]:
        """For the time of this context, which is all of a window's forwards and backwards, write to this buffer.

        Raises:
            LossError: a forward changes the weights of linear layers in the middle of a window.
        """
        if self._layout is not gradients.slots or not self._rounded.fits():
            self._rounded = Rounded(self._autocast)
            self._watch(list(_layers_of(self._model, gradients, self._rounded, self._run_eagerly)))
            self._layout = gradients.slots
        self._rounded.make()
        for slot in gradients.slots:
            _add_as_it_comes(slot)
        layers = [layer for layer in self._layers if layer.is_free()]
        for layer in layers:
            layer.module.__dict__["forward"] = layer.forward
        self._run_eagerly.clear()
        try:
            yield
        finally:
            for layer in layers:
                layer.module.__dict__.pop("forward", None)
        self._rounded.check()

    def _watch(self, layers: list[_Layer]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._layers = layers
        self._nodes = [get_gradient_edge(layer.slot.param).node for layer in layers]
        # A captured backward writes without moving the version counter, which says that a parameter was used.
        self._hooks = [
            node.register_hook(partial(_used, weakref.ref(layer.slot.view), id(layer.slot.param), self._run_eagerly))
            for node, layer in zip(self._nodes, layers, strict=True)
        ]


class _Layer(NamedTuple):
    module: nn.Linear | nn.Embedding
    slot: Slot
    forward: partial[Tensor]
    """Always the same object, since a compiled model is compiled again for another one."""

    def is_free(self) -> bool:
        """Whether the layer is what it was, and nobody else has to see this gradient or has set a forward."""
        is_the_same = _forward_for(self.module) is self.forward.func and "forward" not in self.module.__dict__
        return is_the_same and self.slot.param.requires_grad and not _has_hooks(self.slot.param)


def _has_hooks(param: Any) -> bool:
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def _layers_of(
    model: nn.Module, gradients: GradientBuffer, rounded: Rounded, run_eagerly: set[int]
) -> Generator[_Layer]:
    slots = {id(slot.param): slot for slot in gradients.slots}
    for module in model.modules():
        forward = _forward_for(module)
        if forward is None:
            continue
        weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage] # a parametrized one is not there
        slot = slots.get(id(weight))
        if slot is None or type(weight) is not nn.Parameter or weight.dtype not in _CAST or not weight.numel():
            continue
        if slot.view.dtype is torch.float32 and slot.view.is_contiguous():
            keep_address(slot.view)
            own = partial(forward, module, weight, slot.view, run_eagerly)
            if forward is _linear:
                bias = module._parameters.get("bias")  # pyright: ignore[reportPrivateUsage]
                own = partial(own, rounded.of(weight), bias, rounded.of(bias))
            yield _Layer(module, slot, own)  # pyright: ignore[reportArgumentType]


def _forward_for(module: nn.Module) -> Callable[..., Tensor] | None:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return _linear
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        is_plain = not (module.scale_grad_by_freq or module.sparse or module.max_norm is not None)
        return _embedding if is_plain else None
    return None


def _add_as_it_comes(slot: Slot) -> None:
    """Let autograd add a 16-bit gradient to an fp32 view in one pass, instead of making an fp32 copy of it first."""
    param = slot.param
    if param.grad_dtype not in (None, param.dtype) and param.grad is slot.local:
        param.grad = None  # it may only change while there is no gradient
        param.grad_dtype = None
        param.grad = slot.view


def _used(view: weakref.ref[Tensor], key: int, run_eagerly: set[int], *_: Any) -> None:
    """A weight's backward is through. Where Python ran its forward, what was added has moved the version counter."""
    if key not in run_eagerly and (there := view()) is not None:
        increment_version(there)


def _known(module: nn.Module, param: Tensor, run_eagerly: set[int]) -> tuple[Tensor | None, bool]:
    """What a backward has to ask of the parameter, None if it need not, and whether the layer is to be fused."""
    if module.weight is not param or not torch.is_grad_enabled():
        return None, False
    if torch.compiler.is_compiling():  # what is compiled does not ask, and traces no `.grad`
        return None, True
    run_eagerly.add(id(param))
    return param, not (_has_hooks(param) or _is_transformed())


def _linear(
    module: nn.Linear,
    param: Tensor,
    view: Tensor,
    run_eagerly: set[int],
    weight_16: Tensor | None,
    own_bias: Tensor | None,
    bias_16: Tensor | None,
    input: Tensor,
) -> Tensor:
    x, weight = input, module.weight
    bias: Any = module.bias
    kind = x.device.type
    known, is_fused = _known(module, param, run_eagerly)
    if not is_fused:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(kind) and x.dtype in _CAST:
        dtype = torch.get_autocast_dtype(kind)
        has_bias_too = bias is own_bias and (bias is None or bias_16 is not None)
        if has_bias_too and weight_16 is not None and weight_16.dtype is dtype:
            return _Linear.apply(x.to(dtype), weight, bias, known, view, weight_16, bias_16)  # pyright: ignore[reportReturnType]
        # Outside of the function, whose own backward then has a graph to them.
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype not in HALF or x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, known, view, None, None)  # pyright: ignore[reportReturnType]


def _embedding(module: nn.Embedding, param: Tensor, view: Tensor, run_eagerly: set[int], input: Tensor) -> Tensor:
    known, is_fused = _known(module, param, run_eagerly)
    if not is_fused:
        return F.embedding(input, module.weight, module.padding_idx)
    no_row = -1 if module.padding_idx is None else module.padding_idx % len(module.weight)
    return _Embedding.apply(input, module.weight, no_row, known, view)  # pyright: ignore[reportReturnType]


def _is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: tensors are not what they seem."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        param: Tensor | None,
        view: Tensor,
        weight_16: Tensor | None,
        bias_16: Tensor | None,
    ) -> Tensor:
        return F.linear(x, weight, bias) if weight_16 is None else F.linear(x, weight_16, bias_16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, param, view, weight_16, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, weight_16)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.view = view  # not among the saved: their versions are checked, and this one is there to be written to
        ctx.param = param  # not saved either: under checkpointing that may be an alias of it

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * 7
        x, weight, weight_16 = ctx.saved_tensors
        grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        has_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # which has to lead to the weight
        factor = weight.to(grad.dtype) if weight_16 is None or has_graph else weight_16
        grad_x = grad @ factor if needs_x else None
        grad_bias = grad_NO.sum(0, dtype=ctx.bias_dtype) if ctx.bias_dtype is not None and needs_bias else None
        if torch.compiler.is_compiling():
            torch.ops.macrobatch.add_product(ctx.view, grad_NO, x_NI)
        elif needs_weight and _is_wanted(ctx.param, ctx.view):
            _add_product(ctx.view, grad_NO, x_NI)
        else:
            return grad_x, (grad_NO.t() @ x_NI).to(weight.dtype), grad_bias, None, None, None, None
        return grad_x, None, grad_bias, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ids: Tensor, weight: Tensor, no_row: int, param: Tensor | None, view: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, weight, no_row, param, view = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.no_row, ctx.view, ctx.param = weight.shape[0], no_row, view, param

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None, None, None
        (ids,) = ctx.saved_tensors
        ids_N, grad_NC = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if torch.compiler.is_compiling():
            torch.ops.macrobatch.add_rows(ctx.view, ids_N, grad_NC, ctx.no_row)
        elif ctx.needs_input_grad[1] and _is_wanted(ctx.param, ctx.view):
            _add_rows(ctx.view, ids_N, grad_NC, ctx.no_row)
        else:
            grad_weight = torch.ops.aten.embedding_dense_backward(grad_NC, ids_N, ctx.num_rows, ctx.no_row, False)
            return None, grad_weight, None, None, None
        return None, None, None, None, None


def _is_wanted(param: Tensor, view: Tensor) -> bool:
    """Whether the backward under way is one that adds to this `.grad`, and the buffer is not lent to a reduction."""
    if torch.is_grad_enabled() or param.grad is not view:
        return False
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(param).node)  # pyright: ignore[reportPrivateUsage]
    except RuntimeError:  # the weight is what torch.autograd.grad was asked for
        return False


def _add_product(total: Tensor, grad_NO: Tensor, x_NI: Tensor) -> None:
    """`total += grad_NO.T @ x_NI`, in fp32, rounded once."""
    if total.is_cuda:
        torch.addmm(total, grad_NO.t(), x_NI, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(grad_NO.t().float(), x_NI.float())


@torch.library.custom_op("macrobatch::add_product", mutates_args={"total"})
def add_product(total: Tensor, grad_NO: Tensor, x_NI: Tensor) -> None:
    """`total += grad_NO.T @ x_NI`: (O, I) fp32, (N, O) and (N, I) 16-bit. An operator, so that compiled graphs keep it.

    ```pycon
    >>> total = torch.ones(1, 2)
    >>> add_product(total, torch.ones(3, 1, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.bfloat16))
    >>> total
    tensor([[4., 4.]])

    ```
    """
    _add_product(total, grad_NO, x_NI)


@add_product.register_fake
def _(total: Tensor, grad_NO: Tensor, x_NI: Tensor) -> None:
    return None


def _add_rows(total: Tensor, ids_N: Tensor, grad_NC: Tensor, no_row: int) -> None:
    """`total[ids_N[n]] += grad_NC[n]` for every n whose row is not `no_row`, in fp32, in one order each time."""
    grad_NC = grad_NC.to(total.dtype)
    if no_row >= 0:
        grad_NC = grad_NC.masked_fill((ids_N == no_row).unsqueeze(1), 0.0)
    if total.is_cuda:  # there, index_add_ adds in any order, and index_put_ sorts; on a host it is the other way round
        total.index_put_((ids_N.long(),), grad_NC, accumulate=True)
    else:
        total.index_add_(0, ids_N, grad_NC)


@torch.library.custom_op("macrobatch::add_rows", mutates_args={"total"})
def add_rows(total: Tensor, ids_N: Tensor, grad_NC: Tensor, no_row: int) -> None:
    """`total[ids_N[n]] += grad_NC[n]`: (V, C) fp32, (N,) integers, (N, C); rows for `no_row` are left out.

    ```pycon
    >>> total = torch.zeros(3, 1)
    >>> add_rows(total, torch.tensor([2, 0, 2]), torch.ones(3, 1, dtype=torch.bfloat16), 0)
    >>> total.flatten()
    tensor([0., 0., 2.])

    ```
    """
    _add_rows(total, ids_N, grad_NC, no_row)


@add_rows.register_fake
def _(total: Tensor, ids_N: Tensor, grad_NC: Tensor, no_row: int) -> None:
    return None
