"""What the demo measures: how wrong a gradient is, how many bytes wait for the backward, how good the model is.

Shape letters: P all parameters of a model in one vector, N samples, B samples of a
batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parameters_to_vector, vector_to_parameters

__all__ = ["FullBatchReference", "SavedBytes", "evaluate", "flat_gradient", "flat_weights", "relative_error"]

Batch = tuple[Tensor, Tensor]


def flat_weights(model: nn.Module) -> Tensor:
    """A copy of all parameters, (P,)."""
    return parameters_to_vector(model.parameters()).detach().clone()


def flat_gradient(model: nn.Module) -> Tensor:
    """A copy of all gradients, (P,); a parameter without one counts as zero."""
    return torch.cat(
        [
            torch.zeros_like(param).flatten() if param.grad is None else param.grad.flatten()
            for param in model.parameters()
        ]
    )


def relative_error(gradient_P: Tensor, reference_P: Tensor) -> float:
    """‖gradient − reference‖ / ‖reference‖, 2-norms over all parameters, in fp64.

    ```pycon
    >>> relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    0.8

    ```
    """
    reference_P = reference_P.double()
    return float((gradient_P.double() - reference_P).norm() / reference_P.norm())


class FullBatchReference:
    """The gradient of a whole macro-batch at once in fp64, at any weights.

    fp64 rounds nine digits further right than fp32, so that what differs from it is the error of the fp32 gradient.

    Args:
        model: is copied.
        loss_fn: `loss_fn(model, batch)`, the mean over the batch's samples.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor]) -> None:
        self._model = copy.deepcopy(model).double()
        self._loss_fn = loss_fn

    def gradient(self, weights_P: Tensor, batch: Batch) -> Tensor:
        """∇ loss of the batch at the given weights, (P,), fp64."""
        images_BCHW, labels_B = batch
        vector_to_parameters(weights_P.double(), self._model.parameters())
        self._model.zero_grad()
        self._loss_fn(self._model, (images_BCHW.double(), labels_B)).backward()
        return flat_gradient(self._model)


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward: the activation memory, and the part that batches decide.

    Inside the `with` block every tensor that an operation saves for its backward is packed into a handle. The handle
    dies when its node of the graph is freed, during the backward as a rule. `peak` is the largest number of bytes that
    were saved at one time. Each storage counts once, however many operations save it or views of it. What is there
    anyway does not count: parameters, and the macro-batch itself.

    This is not the whole memory of a training. Weights, gradients and optimizer states come on top, the same in all
    three ways, and temporary results inside an operation, which no hook sees.

    Args:
        excluded: tensors whose storages do not count.

    ```pycon
    >>> layer, images = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.ones(8, 4)
    >>> with SavedBytes([*layer.parameters(), images]) as saved:
    ...     layer(images).sum().backward()
    >>> saved.peak  # tanh saves its output: 8 samples × 3 numbers × 4 bytes
    96

    ```
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self.peak = 0
        self._live = 0
        self._excluded = {_address(tensor) for tensor in excluded}
        self._handles_of_storage: Counter[int] = Counter()
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def _pack(self, tensor: Tensor) -> _Handle:
        # Detached: a handle in the graph that held a tensor of the graph would be a cycle, and never freed.
        handle = _Handle(tensor.detach())
        address, num_bytes = _address(tensor), tensor.untyped_storage().nbytes()
        if address not in self._excluded:
            if not self._handles_of_storage[address]:
                self._live += num_bytes
                self.peak = max(self.peak, self._live)
            self._handles_of_storage[address] += 1
            weakref.finalize(handle, self._free, address, num_bytes).atexit = False
        return handle

    def _free(self, address: int, num_bytes: int) -> None:
        self._handles_of_storage[address] -= 1
        if not self._handles_of_storage[address]:
            del self._handles_of_storage[address]
            self._live -= num_bytes


class _Handle:
    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(handle: _Handle) -> Tensor:
    return handle.tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def evaluate(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Share of the images that are classified correctly, in [0, 1], and the mean cross-entropy."""
    logits_NK = model(images_NCHW)
    accuracy = (logits_NK.argmax(dim=1) == labels_N).double().mean()
    return float(accuracy), float(F.cross_entropy(logits_NK, labels_N))
