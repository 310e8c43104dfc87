"""Losses that couple the whole macro-batch (contrastive ones): representations first, then gradients.

Such a loss is not a sum over micro-batches, so no accumulation of their own losses is right. The exact way, known as
gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
https://arxiv.org/abs/2101.06983):

```text
1. without graph:   r_i = encode(micro-batch i)              memory: the representations only
2. with graph:      L = loss(r_1 … r_K),   c_i = ∂L/∂r_i
3. with graph:      r_i again, same dropout;   ∇ of <r_i, c_i>  accumulates to  ∇L
```

Over ranks, the representations of all of them are put together between the first two steps. Each rank computes the
whole loss, and goes on with the slopes of its own representations. Parameters of the loss get an equal part of their
gradient from each rank with samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.core.loss import Loss
from macrobatch.core.snapshot import RngStates, Snapshot, rng_states, set_rng_states
from macrobatch.errors import ArgumentError, LossError

__all__ = ["Alone", "CoupledLoss", "Gathered", "TwoPass"]

Encode = Callable[[Any, Any], Any]
Couple = Callable[[Any], Tensor]


class TwoPass:
    """A loss function for `TrainStep` and `accumulate` whose loss needs the whole macro-batch.

    Equivalent plain code: `loss(encode(model, batch)).backward()`, at the price of a second forward. Over ranks, the
    batch is that of all ranks, in their order.

    Args:
        encode: `encode(model, micro_batch)` returns the representations of its samples: a tensor with one row per
            sample, or a tree of them (two towers).
        loss: from the representations of the whole macro-batch, in order, a 0-d tensor. It may use parameters of its
            own, a temperature for one. Over ranks, all compute it, and have to come to the same.

    ```pycon
    >>> import torch.nn.functional as F
    >>> def encode(model, batch):
    ...     return F.normalize(model(batch[0]), dim=1), F.normalize(model(batch[1]), dim=1)
    >>> def loss(representations):
    ...     left_BD, right_BD = representations
    ...     return F.cross_entropy(left_BD @ right_BD.T / 0.1, torch.arange(len(left_BD)))
    >>> from macrobatch import accumulate
    >>> model, pairs = nn.Linear(4, 3), (torch.randn(6, 4), torch.randn(6, 4))
    >>> round(float(accumulate(model, TwoPass(encode, loss), pairs, micro_batch=2).weight))
    6

    ```
    """

    def __init__(self, encode: Encode, loss: Couple) -> None:
        for name, function in (("encode", encode), ("loss", loss)):
            if not callable(function):
                raise ArgumentError(
                    f"TwoPass.{name}", given=repr(function), expected="a function", fix="pass a function"
                )
        self.encode = encode
        self.loss = loss

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """The coupled loss of a batch taken as a whole."""
        return self.loss(self.encode(model, batch))

    def over(
        self,
        model: nn.Module,
        micro_batches: Sequence[tuple[Any, int]],
        *,
        before: Snapshot,
        forward: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
        among: Alone,
    ) -> CoupledLoss:
        """First pass over a window; returns the loss function of the second.

        Args:
            model: the module.
            micro_batches: with their numbers of rows; those of 0 rows, which come last, run and count nothing.
            before: module buffers and generators at the window's start; the second pass begins from these buffers.
            forward: the precision's context.
            device: where the model lives.
            among: the ranks.
        """
        states: list[RngStates] = []
        parts: list[Any] = []
        with among.together():
            with torch.no_grad():
                for micro_batch, _ in micro_batches:
                    states.append(rng_states(device))
                    with forward():
                        parts.append(self.encode(model, tree.to_device(micro_batch, device)))
            sizes = [num_rows for _, num_rows in micro_batches if num_rows]
            rows = _checked(tree.cat(parts[: len(sizes)]), sum(sizes)) if sizes or not among.has_peers else None
        gathered = among.gathered(rows)
        with among.together():
            loss, slopes = self._first(gathered, sizes, forward)
        after = rng_states(device)
        before.restore()
        return CoupledLoss(self.encode, loss, slopes, gathered.sizes, generators=(states, after), device=device)

    def _first(
        self, gathered: Gathered, sizes: list[int], forward: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Tensor | None, list[Any]]:
        """The loss, and its slopes along the representations of this rank's micro-batches."""
        if gathered.rows is None:  # not a sample on any rank
            return None, []
        representations = tree.map_tensors(_as_leaf, gathered.rows)
        with forward():
            loss = self.loss(representations)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad or not loss.is_floating_point():
            raise LossError(
                "TwoPass.loss",
                given=f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__,
                expected="a real 0-d tensor that depends on the representations",
                fix="return the mean loss of the whole macro-batch",
            )
        leaves = [leaf for leaf in tree.leaves(representations) if isinstance(leaf, Tensor) and leaf.requires_grad]
        slopes = iter(torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True))
        cached = tree.map_tensors(lambda r: next(slopes) if r.requires_grad else r, representations)
        begin = sum(gathered.sizes[: gathered.rank])
        return loss, tree.split(tree.select(cached, slice(begin, begin + sum(sizes))), sizes) if sizes else []


class Gathered(NamedTuple):
    """Representations of all ranks.

    Attributes:
        rows: one tree, in the order of ranks; None if no rank has any.
        sizes: numbers of rows by rank.
        rank: of this process.
    """

    rows: Any
    sizes: list[int]
    rank: int


class Alone:
    """One process; and what `over` asks of several."""

    has_peers = False

    def together(self) -> AbstractContextManager[Any]:
        """A context at whose end all ranks hear whether it raised on one of them."""
        return nullcontext()

    def gathered(self, rows: tree.Flat | None) -> Gathered:
        """Put the representations of all ranks together; None stands for those of a rank without samples."""
        return Gathered(None, [0], 0) if rows is None else Gathered(rows.rebuild(rows.leaves), [rows.num_rows], 0)


def _checked(representations: Any, num_samples: int) -> tree.Flat:
    rows = tree.flatten(representations)
    if rows.num_rows != num_samples:
        raise LossError(
            "TwoPass.encode",
            given=f"{rows.num_rows} rows for {num_samples} samples",
            expected="one row per sample in each representation",
            fix="return what belongs to each sample, in order",
        )
    return rows


def _as_leaf(representation: Tensor) -> Tensor:
    has_slope = representation.is_floating_point() or representation.is_complex()
    if has_slope and not representation.ndim:
        raise LossError(
            "TwoPass.encode",
            given="a 0-d tensor among the representations",
            expected="one row per sample in each of them",
            fix="let loss use what belongs to all samples, a temperature for one, directly",
        )
    return representation.detach().requires_grad_(has_slope)


def _zero(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


class CoupledLoss:
    """Loss function of the second pass; to be called for the window's micro-batches in order.

    What it returns sums up to the coupled loss, in value and in gradient: micro-batch i of n_i samples returns the sum
    `n_i · L` over n_i samples, with the gradient of `N · <r_i, c_i>`. The parameters that the loss itself uses get
    their part with the first micro-batch of each rank with samples.
    """

    def __init__(
        self,
        encode: Encode,
        loss: Tensor | None,
        slopes: list[Any],
        sizes: list[int],
        *,
        generators: tuple[list[RngStates], RngStates],
        device: torch.device,
    ) -> None:
        zero = torch.zeros((), device=device)
        self._encode = encode
        self._part = None if loss is None else loss / sum(size > 0 for size in sizes)
        self._value = zero if loss is None else loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
        self._slopes = slopes
        self._states, self._after = generators
        self._device = device
        self._num_samples = sum(sizes)
        self._index = 0

    def __call__(self, model: Any, micro_batch: Any) -> Loss:
        index, self._index = self._index, self._index + 1
        set_rng_states(self._device, self._states[index])
        representations = tree.leaves(self._encode(model, micro_batch))
        # A micro-batch that counts nothing still has to reach every parameter: its backward starts from zero.
        is_spare = index >= len(self._slopes)
        slopes = map(_zero, representations) if is_spare else tree.leaves(self._slopes[index])
        aligned = torch.zeros_like(self._value)
        for r, c in zip(representations, slopes, strict=True):
            if isinstance(r, Tensor) and r.requires_grad:
                # In 16 bits, the factor that the backward starts from would be rounded, for all samples alike.
                c = c.to(torch.promote_types(c.dtype, aligned.dtype))
                product = (r * c.conj()).real if r.is_complex() else r * c
                aligned = aligned + product.sum(dtype=aligned.dtype)
        if self._part is not None:
            aligned, self._part = aligned + self._part, None
        if index == len(self._states) - 1:
            set_rng_states(self._device, self._after)
        num_rows = tree.num_rows(micro_batch)
        return Loss(self._num_samples * (aligned - aligned.detach()) + num_rows * self._value, num_rows)
