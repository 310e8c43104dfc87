"""What strategies over several ranks have in common: agreeing on plans, adding up tallies, copying from one rank."""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.core.gradients import GradientBuffer
from macrobatch.core.loss import Weight, checked_counts, to_device
from macrobatch.core.snapshot import same_bits
from macrobatch.core.tally import NUM_SUMS, Tally
from macrobatch.core.twopass import Alone, Gathered
from macrobatch.core.weighting import Plan
from macrobatch.errors import ArgumentError, BatchError, LossError, PeerError
from macrobatch.ranks import Ranks
from macrobatch.sync.base import Again

__all__ = ["Peers", "joined", "ranks_in", "sparing_buffers", "trained_in", "unlike"]

CPU = torch.device("cpu")

_PART = 2**20  # elements


def _is_dense(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()  # not expanded


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


def _is_cut(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _without_rows(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty((0, *leaf.shape[1:]), dtype=leaf.dtype) if leaf.ndim else leaf.detach().cpu()


def joined(parts: Iterable[Tensor | list[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host and of the device, one behind the other; those of the host cost one tensor where all are."""
    parts = list(parts)
    numbers = [part for part in parts if not isinstance(part, Tensor)]
    if len(numbers) == len(parts):
        return to_device([number for part in numbers for number in part], dtype, device)
    tensors = [part if isinstance(part, Tensor) else to_device(part, dtype, device) for part in parts]
    return torch.cat([tensor.to(device, dtype) for tensor in tensors])


def trained_in(model: nn.Module) -> float:
    """A checksum of which parameters require grad."""
    return float(zlib.crc32(bytes(param.requires_grad for param in model.parameters())))


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements, in which each place has another weight so that none can stand for another, and
    the sum of their magnitudes; float64."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    total = torch.zeros(2, dtype=torch.float64, device=tensor.device)
    for index, part in enumerate(numbers.reshape(-1).split(_PART)):  # in little memory
        part = part.double()
        places = torch.arange(index * _PART, index * _PART + len(part), dtype=torch.float64, device=tensor.device)
        total += torch.stack([part @ places.cos(), part.abs().sum()])
    return total


def ranks_in(group: dist.ProcessGroup | None) -> Ranks:
    """This process in a group; None means all ranks."""
    return Ranks(rank=dist.get_rank(group), world_size=dist.get_world_size(group))


def unlike(given: str) -> ArgumentError:
    """The error of ranks that train different parameters."""
    return ArgumentError(
        "the trained parameters",
        given=given,
        expected="the same model, and the same parameters in the same order, on every rank",
        fix="build, freeze and extend model and optimizer alike on every rank",
    )


@contextmanager
def sparing_buffers(model: nn.Module, inner: AbstractContextManager[Any]) -> Generator[None]:
    """Run a micro-batch that counts nothing: running statistics must not see it."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with inner:
        yield
    with torch.no_grad():
        for buffer, value in saved:
            buffer.copy_(value)


class Peers(Alone):
    """The ranks of a group, seen from one of them. Every method is a collective: all ranks call it, in one order.

    Args:
        group: the ranks; all of them by default.
        device: where numbers travel from: the parameters' device.
    """

    has_peers = True

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.device = device
        self._guesses: tuple[float, int] | None = None
        self._names: list[str] = []
        self._has_lent = False

    @property
    def num(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def check_layout(self, gradients: GradientBuffer, model: nn.Module) -> None:
        """Refuse ranks that train different sets of parameters, or hold different models.

        Raises:
            ArgumentError: on every rank.
        """
        names = {id(param): name for name, param in model.named_parameters()}
        signature = [(names.get(id(slot.param)), *_kind(slot.param)) for slot in gradients.slots]
        signature += [(name, *_kind(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
        everywhere: list[Any] = [None] * self.num
        dist.all_gather_object(everywhere, signature, group=self.group)
        if any(other != signature for other in everywhere):
            raise unlike(f"{[len(other) for other in everywhere]} tensors by rank, or others, or in another order")

    def plan(self, plan: Plan) -> Plan:
        """What all ranks together know of a window.

        The first window's sizes, added up, are every window's guess: a scale must be the same on all ranks, and in
        this way costs no collective later.
        """
        if self._guesses is None:
            guess, num = self.summed([plan.guess, plan.num_micro_batches or 0])
            self._guesses = max(guess, 1.0), max(round(num), 1)
        guess, num = self._guesses
        return plan._replace(guess=guess, num_micro_batches=num, expected=self._expected(plan.expected))

    def longest(self, num: int | None, *, trained: float = 0.0) -> int:
        """The largest number of micro-batches that a rank has.

        Args:
            num: on this rank; None if it has failed before the window, which the others then hear.
            trained: what has to be the same on all ranks: a checksum of which parameters are trained.

        Raises:
            PeerError: another rank has failed; none has begun the window.
            ArgumentError: on every rank that has not failed, if they differ in what is trained.
        """
        same = [-math.inf] * 2 if num is None else [trained, -trained]
        numbers = [float(num or 0), float(num is None), *same]
        longest, has_failed, high, low = self.summed(numbers, dist.ReduceOp.MAX)
        if has_failed and num is not None:
            raise PeerError(
                "the window",
                given="an error on another rank, in front of it",
                expected="every rank to begin the window; nothing was changed on this one",
                fix="look at the error of the rank that failed",
            )
        if num is not None and high != -low:
            raise unlike("other parameters that require grad than on other ranks")
        return round(longest)

    @contextmanager
    def together(self) -> Generator[None]:
        """A context at whose end all ranks hear whether it raised on one of them.

        Raises:
            PeerError: it did, on another one.
        """
        try:
            yield
        except Exception:
            self.longest(None)
            raise
        self.longest(0)

    def gathered(self, rows: tree.Flat | None) -> Gathered:
        """Put trees of tensors with one row per sample together, in the order of ranks.

        Args:
            rows: of this rank; None if it has no samples.

        Raises:
            BatchError: on every rank, if they differ in structure, in dtype or in more than the number of rows.
        """
        mine = None if rows is None else rows.rebuild([_without_rows(leaf) for leaf in rows.leaves])
        there: list[Any] = [None] * self.num
        dist.all_gather_object(there, (mine, 0 if rows is None else rows.num_rows), group=self.group)
        rank, sizes = dist.get_rank(self.group), [size for _, size in there]
        trees = [(template, size) for template, size in there if size]
        kinds = [[_kind(leaf) for leaf in tree.leaves(template) if isinstance(leaf, Tensor)] for template, _ in trees]
        if any(kind != kinds[0] for kind in kinds):
            raise BatchError(
                "the representations",
                given=f"by rank, without their rows, tensors of {kinds}",
                expected="the same shapes and dtypes on every rank, but for the number of rows",
                fix="return the same tree from encode on every rank",
            )
        if not trees:
            return Gathered(None, sizes, rank)
        mine = [] if rows is None else [leaf for leaf in rows.leaves if _is_cut(leaf)]
        wholes = [
            self._stacked(like, mine[index] if mine else None, sizes, rank)
            for index, like in enumerate(leaf for leaf in tree.leaves(trees[0][0]) if _is_cut(leaf))
        ]
        parts = zip(*(whole.split([size for _, size in trees]) for whole in wholes), strict=True)
        filled = []
        for (template, _), part in zip(trees, parts, strict=True):
            rest = iter(part)
            filled.append(tree.map_tensors(lambda leaf, rest=rest: next(rest) if leaf.ndim else leaf, template))
        return Gathered(tree.cat(filled), sizes, rank)

    def _stacked(self, like: Tensor, mine: Tensor | None, sizes: list[int], rank: int) -> Tensor:
        """The rows of all ranks, one below the other: a sum of what is zero but for one's own rows."""
        whole = torch.zeros((sum(sizes), *like.shape[1:]), dtype=like.dtype, device=self.device)
        if mine is not None:
            begin = sum(sizes[:rank])
            whole[begin : begin + sizes[rank]] = mine
        numbers = torch.view_as_real(whole) if whole.is_complex() else whole
        dist.all_reduce(numbers.view(torch.uint8) if whole.dtype == torch.bool else numbers, group=self.group)
        return whole

    def summed(self, numbers: Sequence[float] | Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[float]:
        """Numbers added up over ranks (or reduced otherwise), in float64."""
        total = torch.as_tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, op, group=self.group)
        return total.tolist()

    def broadcast(self, tensors: Iterable[Tensor], *, source: int = 0, spares_equal: bool = False) -> None:
        """Copy one rank's tensors to all, in one message per device and dtype.

        Args:
            source: whose, by its number in the group.
            spares_equal: do not write what is equal already, since a graph may still need it. Waits for the device.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in {id(tensor): tensor for tensor in tensors if _is_dense(tensor)}.values():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        source = source if self.group is None else dist.get_global_rank(self.group, source)
        with torch.no_grad():
            for members in groups.values():
                whole = torch.cat([tensor.reshape(-1) for tensor in members])
                dist.broadcast(torch.view_as_real(whole) if whole.is_complex() else whole, source, group=self.group)
                split = whole.split([tensor.numel() for tensor in members])
                parts = [part.view(tensor.shape) for tensor, part in zip(members, split, strict=True)]
                pairs = list(zip(members, parts, strict=True))
                if spares_equal:
                    pairs = [pair for pair in pairs if not same_bits(*pair)]
                if pairs:  # one operation, where a model has hundreds of buffers
                    torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]

    def check_alike(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Compare checksums of tensors over ranks, one by one.

        Raises:
            PeerError: on every rank, if one differs by more than rounding.
        """
        mine = torch.stack([_checksum(tensor).to(self.device) for tensor in tensors]).flatten()
        extremes = self.summed(torch.cat([mine, -mine]), dist.ReduceOp.MAX)
        highs, lows = extremes[: len(mine)], extremes[len(mine) :]
        for index, tensor in enumerate(tensors):
            high, low, magnitude = highs[2 * index], -lows[2 * index], highs[2 * index + 1]
            if high - low > 1e-5 * magnitude:
                raise PeerError(
                    f"the {what} of the first window",
                    given=f"checksums from {low:g} to {high:g} over ranks, of a tensor of shape {tuple(tensor.shape)}",
                    expected="the same on every rank",
                    fix="look for what changes parameters on one rank alone; cross_check=False turns this check off",
                )

    def check_replicas(self, gradients: GradientBuffer) -> None:
        """Refuse replicas whose parameters or reduced gradients differ."""
        self.check_alike("parameters", [slot.param.detach() for slot in gradients.slots])
        self.check_alike("gradients", [slot.local.detach() for slot in gradients.slots])

    def add(self, gradients: GradientBuffer) -> None:
        """Gradients, added up over ranks."""
        for numbers, *_ in gradients.flats:
            dist.all_reduce(torch.view_as_real(numbers) if numbers.is_complex() else numbers, group=self.group)

    def add_up(self, gradients: GradientBuffer, tally: Tally | None) -> int:
        """Weights, losses and which parameters were used, for gradients that are added up already.

        Args:
            gradients: of this rank.
            tally: of this rank; None if the window has to be run again because of it.

        Returns:
            The first rank that had a micro-batch of its own, by its number in the group.

        Raises:
            Again: on every rank, if one has no tally.
        """
        begin = NUM_SUMS + self.num
        sums = [0.0] * NUM_SUMS if tally is None else tally.pack(torch.float64, self.device)
        flags = [0.0] * self.num + [float(slot.used) for slot in gradients.slots] + [float(tally is None)]
        flags[dist.get_rank(self.group)] = float(tally is not None and bool(tally.terms))
        *numbers, num_again = self.summed(joined([sums, flags], torch.float64, self.device))
        if tally is None or num_again:
            raise Again
        for slot, uses in zip(gradients.slots, numbers[begin:], strict=True):
            slot.used = uses > 0
        tally.absorb(numbers[:NUM_SUMS])
        return next((rank for rank, has in enumerate(numbers[NUM_SUMS:begin]) if has), 0)

    def spare(self, micro_batch: Any) -> Any:
        """In the first window with any, two samples (BatchNorm refuses one) from the first rank with some; later, the
        given; None before."""
        if self._has_lent:
            return micro_batch
        sample = None if micro_batch is None else tree.to_device(tree.select(micro_batch, slice(0, 2)), CPU)
        samples: list[Any] = [None] * self.num
        dist.all_gather_object(samples, sample, group=self.group)
        found = next((each for each in samples if each is not None), None)
        self._has_lent = found is not None
        return found

    def _expected(self, expected: Mapping[str, Weight] | Weight | None) -> dict[str, Weight] | None:
        """Weights counted ahead, added up; a rank without samples gives {}."""
        counts = checked_counts(expected)
        if counts is None:
            return None
        if not self._names:
            everywhere: list[Any] = [None] * self.num
            dist.all_gather_object(everywhere, sorted(counts), group=self.group)
            self._names = sorted({name for names in everywhere for name in names})
        known = counts or dict.fromkeys(self._names, 0.0)
        is_unknown = float(known.keys() != set(self._names))
        values = [known.get(name, 0.0) for name in self._names]
        numbers = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in (*values, is_unknown)]
        *totals, num_unknown = self.summed(torch.stack(numbers))
        if num_unknown:
            raise LossError(
                "what count returned",
                given=f"the terms {sorted(known)} on this rank",
                expected=f"{self._names} on every rank, in every window",
                fix="count every term on every rank, also where it is 0",
            )
        return dict(zip(self._names, totals, strict=True))
