"""What a recorded micro-step depends on besides the numbers in its micro-batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel

from macrobatch import tree
from macrobatch.core.gradients import GradientBuffer

__all__ = ["Form", "Surroundings", "Unfit", "form_of"]

_ATOMS = (str, bytes, int, float, complex, bool, type(None))


class Unfit(Exception):
    """Why something cannot be recorded: the rest of a sentence that begins with "since"."""


class Form(NamedTuple):
    """A micro-batch taken apart: what a recording of it holds for, and what may differ the next time."""

    key: Hashable
    tensors: list[Tensor]


def form_of(micro_batch: Any) -> Form:
    """The form of a micro-batch: its structure, its tensors' shapes, strides and dtypes, and all its other values.

    Raises:
        Unfit: it has a part that can be neither copied into a recording nor compared.

    ```pycon
    >>> a, b = (form_of({"x": torch.zeros(size, 2), "scale": 0.5}) for size in (3, 4))
    >>> a.key == b.key, [tensor.shape for tensor in a.tensors]
    (False, [torch.Size([3, 2])])

    ```
    """
    tensors: list[Tensor] = []
    kind = type(micro_batch)
    if kind is tuple or kind is dict:  # of tensors, mostly: the way through all containers takes ten times as long
        parts = micro_batch.values() if kind is dict else micro_batch
        described = tuple([_described(part, tensors) for part in parts if type(part) is Tensor])
        if len(described) == len(parts):
            return Form((kind, *micro_batch, *described) if kind is dict else described, tensors)
        tensors.clear()
    described = tuple([_described(leaf, tensors) for leaf in tree.leaves(micro_batch)])
    return Form((tree.structure(micro_batch), described), tensors)


def _described(leaf: Any, tensors: list[Tensor]) -> Hashable:
    if type(leaf) is Tensor:
        if leaf.requires_grad or leaf.layout is not torch.strided:
            raise Unfit(f"the batch has a {'tensor that requires grad' if leaf.requires_grad else leaf.layout}")
        tensors.append(leaf)
        return leaf.shape, leaf.dtype, leaf.stride()
    if isinstance(leaf, _ATOMS):
        return type(leaf), repr(leaf)
    if type(leaf) in (list, tuple):
        return type(leaf), tuple(_described(item, tensors) for item in leaf)
    raise Unfit(f"the batch has a {type(leaf).__name__}, which a recording cannot take in")


class Surroundings(NamedTuple):
    """A model and its settings at the start of a window.

    Attributes:
        places: where parameters, module buffers and gradients lie. A recording of other places is worthless.
        mode: switches that may be turned to and fro; there may be a recording for each position.
        obstacle: why the model cannot be recorded as it is, if so.
        modules: of the model. `mode` names them by `id`, so whoever keeps that has to keep them, too.
    """

    places: Hashable
    mode: Hashable
    obstacle: str | None
    modules: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module, gradients: GradientBuffer, device: torch.device) -> Surroundings:
        """Those of a model whose gradients are in their places."""
        modules = _modules_of(model)
        own = [param for module in modules for param in module._parameters.values() if param is not None]  # pyright: ignore[reportPrivateUsage]
        params = list({id(param): param for param in (*own, *(slot.param for slot in gradients.slots))}.values())
        obstacle = _obstacle(modules, params)
        places = None
        if obstacle is None:
            buffers = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]  # pyright: ignore[reportPrivateUsage]
            tensors = [*params, *buffers, *(flat.storage for flat in gradients.flats)]
            places = tuple((id(x), x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors)
        mode = (
            tuple(module.training for module in modules),
            tuple(param.requires_grad for param in params),
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # pyright: ignore[reportAttributeAccessIssue]
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
        )
        return cls(places, (tuple(map(id, modules)), mode), obstacle, modules)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """All of its modules, each once: `model.modules()`, at a fraction of its time, which every window has to take."""
    found: dict[int, nn.Module] = {}
    left = [model]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += [child for child in module._modules.values() if child is not None]  # pyright: ignore[reportPrivateUsage]
    return list(found.values())


def _has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _obstacle(modules: Iterable[nn.Module], params: Iterable[Tensor]) -> str | None:
    for module in modules:
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
            return f"{type(module).__name__} synchronises ranks in its own forward and backward"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            return f"a {type(module).__name__} makes sparse gradients, which differ in size"
        if _has_hooks(module):
            return f"a {type(module).__name__} has hooks, which a replay would not call"
    if torch_module._has_any_global_hook():  # pyright: ignore[reportPrivateUsage]
        return "there are hooks on all modules, which a replay would not call"
    for param in params:
        if isinstance(param, DTensor):
            return "parameters are spread over ranks"
        if param._backward_hooks or param._post_accumulate_grad_hooks:  # pyright: ignore[reportPrivateUsage]
            return f"a parameter of shape {tuple(param.shape)} has hooks, which a replay would not call"
    return None
