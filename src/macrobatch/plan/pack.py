"""A window's samples, of any lengths, divided over ranks and packed into micro-batches under a hard cap on tokens.

A plan is a pure function of the lengths: every rank that computes it gets the same one, without a word to the others.

Shape letters: N samples of the window.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from macrobatch.checks import check_flag, check_integer
from macrobatch.errors import ArgumentError
from macrobatch.plan.lengths import LengthCost, Lengths, checked_lengths

__all__ = ["Layout", "Packing", "TokenBudget", "balance"]

Layout = Literal["packed", "padded"]
"""How a micro-batch holds its samples: *packed* into one row, end to end, or *padded* to the longest."""

Indices = NDArray[np.int64]
Costs = NDArray[np.float64]

_NUM_TRIES = 8  # cheapest micro-batches that are looked at for room, before the emptiest one is
_NUM_HALVINGS = 20  # of the interval that the padded layout's largest cost is searched in


@dataclass(frozen=True, eq=False)
class Packing:
    """Which samples make up which micro-batch of which rank.

    Attributes:
        micro_batches: by rank, its micro-batches in the order to run them; each is an int64 array of positions in the
            window. Ranks may have different numbers of them, or none, if there are too few samples.
        lengths: (N,) int64, tokens of each sample.
        layout: what the cap was put on.
        loads: by rank, the cost of its micro-batches together.
    """

    micro_batches: tuple[tuple[Indices, ...], ...]
    lengths: Indices
    layout: Layout
    loads: Costs

    def of(self, rank: int) -> list[list[int]]:
        """A rank's micro-batches as plain lists."""
        return [indices.tolist() for indices in self.micro_batches[rank]]

    @cached_property
    def order(self) -> Indices:
        """(N,) all samples as they are run: rank after rank, micro-batch after micro-batch."""
        return np.concatenate([indices for rank in self.micro_batches for indices in rank])

    @cached_property
    def inverse(self) -> Indices:
        """(N,) the way back: `outputs[inverse]` has the order of the window, if `outputs` has that of `order`."""
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(len(inverse))
        return inverse

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum())

    @property
    def num_slots(self) -> int:
        """Tokens that are computed, padding included."""
        return sum(_num_slots(self.lengths[indices], self.layout) for rank in self.micro_batches for indices in rank)

    @property
    def imbalance(self) -> float:
        """Load of the busiest rank over the mean load: how much longer the window takes than it would if balanced."""
        return float(self.loads.max() / self.loads.mean())


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """A hard cap on the tokens of a micro-batch, and how a window of samples of any lengths is fitted to it.

    Packed: the samples go to the ranks by `balance`; on each, to as few micro-batches as hold them, the costliest
    first and into the cheapest with room. Padded: all samples are sorted by length and cut into micro-batches of about
    the same cost, which go to the ranks by `balance`.

    Args:
        max_tokens: never exceeded: packed, by the sum of a micro-batch's lengths; padded, by its rows × longest.
        layout: "packed" or "padded".
        cost: what a sample of a length costs, the same on every rank.
        equal: as many micro-batches on each rank, for a sync strategy that runs as many anyway (`ShardedSync`); short
            of that only if there are too few samples.

    Raises:
        ArgumentError: an argument is out of its domain.

    ```pycon
    >>> packing = TokenBudget(8, equal=True).pack([7, 2, 5, 1, 4, 5], world_size=2)
    >>> packing.of(0), packing.of(1)
    ([[0], [4, 3]], [[2, 1], [5]])
    >>> outputs = [10 * sample for sample in packing.order]
    >>> [int(outputs[at]) for at in packing.inverse]
    [0, 10, 20, 30, 40, 50]

    ```
    """

    max_tokens: int
    layout: Layout = "packed"
    cost: LengthCost = LengthCost()  # noqa: RUF009 (frozen)
    equal: bool = False

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, "the tokens in a micro-batch", fix="pass max_tokens=16384")
        for name, value, kind, fix in (
            ("layout", self.layout in get_args(Layout), f"one of {get_args(Layout)}", 'pass layout="packed"'),
            ("cost", isinstance(self.cost, LengthCost), "a LengthCost", "pass cost=LengthCost.of_width(768)"),
        ):
            if not value:
                raise ArgumentError(name, given=repr(getattr(self, name)), expected=kind, fix=fix)
        check_flag("equal", self.equal)

    def pack(self, lengths: Sequence[int] | Lengths | Tensor, *, world_size: int = 1) -> Packing:
        """Divide a window's samples over ranks and micro-batches, so that no rank waits long for another.

        Args:
            lengths: (N,) tokens of each sample of the window over all ranks, integers >= 1.
            world_size: number of ranks.

        Raises:
            ArgumentError: no lengths, or no integers.
            BatchError: a sample is longer than the cap, or empty.
        """
        check_integer("world_size", world_size, "the number of ranks", fix="pass world_size=8")
        lengths_N = checked_lengths(lengths, self.max_tokens)
        divide = _packed if self.layout == "packed" else _padded
        ranks = divide(lengths_N, self, world_size)
        loads = np.array([sum(self.micro_batch_cost(lengths_N[indices]) for indices in parts) for parts in ranks])
        return Packing(tuple(map(tuple, ranks)), lengths_N, self.layout, loads)

    def micro_batch_cost(self, lengths: Lengths) -> float:
        """What a micro-batch of samples of these lengths costs."""
        if self.layout == "packed":
            return float(self.cost.of_lengths(lengths).sum())
        return len(lengths) * float(self.cost.of_lengths(lengths.max(keepdims=True))[0])


def balance(costs: Sequence[float] | Costs, num_parts: int) -> list[Indices]:
    """Divide items into parts of about the same total cost: the costliest item first, each to the cheapest part.

    Args:
        costs: (N,) finite numbers >= 0.
        num_parts: an integer >= 1.

    Returns:
        The items of each part, costliest first. The costliest part is at most 4/3 − 1/(3·num_parts) times as costly
        as in the best possible division.

    Source:
        R. Graham, Bounds on multiprocessing timing anomalies, SIAM Journal on Applied Mathematics 17 (1969).

    ```pycon
    >>> [part.tolist() for part in balance([5, 1, 4, 2, 4], 2)]
    [[0, 3, 1], [2, 4]]

    ```
    """
    check_integer("num_parts", num_parts, "the parts to divide into", fix="pass num_parts=8")
    try:
        costs_N = np.asarray(costs, dtype=np.float64)
    except (TypeError, ValueError):
        costs_N = np.empty((0, 0))
    if costs_N.ndim != 1 or not bool(np.all(np.isfinite(costs_N) & (costs_N >= 0))):
        raise ArgumentError("costs", given=f"{costs!r:.60}", expected="finite numbers >= 0", fix="check the cost model")
    loads = [(0.0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    costs_list = costs_N.tolist()
    for item in np.argsort(-costs_N, kind="stable").tolist():
        load, part = loads[0]
        heapq.heapreplace(loads, (load + costs_list[item], part))
        parts[part].append(item)
    return [np.array(part, dtype=np.int64) for part in parts]


def _packed(lengths_N: Lengths, budget: TokenBudget, world_size: int) -> list[list[Indices]]:
    costs_N = budget.cost.of_lengths(lengths_N)
    shares = balance(costs_N, world_size)

    def filled(share: Indices, at_least: int) -> list[Indices]:
        return _filled(share, lengths_N, costs_N, budget.max_tokens, at_least)

    ranks = [filled(share, 1) for share in shares]
    most = max(map(len, ranks))
    while budget.equal and any(len(parts) < min(most, len(share)) for parts, share in zip(ranks, shares, strict=True)):
        ranks = [
            parts if len(parts) == most else filled(share, min(most, len(share)))
            for parts, share in zip(ranks, shares, strict=True)
        ]
        most = max(map(len, ranks))
    return ranks


def _filled(share: Indices, lengths_N: Lengths, costs_N: Costs, max_tokens: int, at_least: int) -> list[Indices]:
    """A rank's samples, costliest first, in as few micro-batches as this rule finds room in; costliest first."""
    if not len(share):
        return []
    tokens = lengths_N[share]
    num = max(at_least, -(-int(tokens.sum()) // max_tokens), int((2 * tokens > max_tokens).sum()))
    while (parts := _attempt(share.tolist(), tokens.tolist(), costs_N[share].tolist(), max_tokens, num)) is None:
        num += 1 + num // 64
    held = [np.array(part, dtype=np.int64) for part in parts if part]
    return sorted(held, key=lambda part: -float(costs_N[part].sum()))


def _attempt(
    samples: list[int], tokens: list[int], costs: list[float], max_tokens: int, num: int
) -> list[list[int]] | None:
    """Samples in `num` micro-batches under the cap, or None if one finds no room."""
    parts: list[list[int]] = [[] for _ in range(num)]
    loads, room = [0.0] * num, [max_tokens] * num
    by_cost = [(0.0, part) for part in range(num)]  # heaps; an entry that is not the part's latest is passed over
    by_room = [(-max_tokens, part) for part in range(num)]
    for sample, length, cost in zip(samples, tokens, costs, strict=True):
        found, full = None, []
        while found is None and by_cost and len(full) < _NUM_TRIES:
            load, part = entry = heapq.heappop(by_cost)
            if load == loads[part] and room[part] >= length:
                found = part
            elif load == loads[part]:
                full.append(entry)
        for entry in full:
            heapq.heappush(by_cost, entry)
        if found is None:
            while -by_room[0][0] != room[by_room[0][1]]:
                heapq.heappop(by_room)
            found = by_room[0][1]
            if room[found] < length:
                return None
        parts[found].append(sample)
        loads[found] += cost
        room[found] -= length
        heapq.heappush(by_cost, (loads[found], found))
        heapq.heappush(by_room, (-room[found], found))
    return parts


def _padded(lengths_N: Lengths, budget: TokenBudget, world_size: int) -> list[list[Indices]]:
    order = np.argsort(-lengths_N, kind="stable")
    most = (budget.max_tokens // lengths_N[order]).tolist()
    costs = budget.cost.of_lengths(lengths_N[order]).tolist()
    sizes = _cut(most, costs, float("inf"), len(most))
    num = min(-(-len(sizes) // world_size) * world_size, len(most))
    low, high = 0.0, max(costs) * max(most)
    for _ in range(
        _NUM_HALVINGS if len(sizes) < len(most) else 0
    ):  # the smallest largest cost that so many micro-batches allow
        middle = (low + high) / 2
        trial = _cut(most, costs, middle, num)
        sizes, low, high = (trial, low, middle) if trial else (sizes, middle, high)
    groups = np.split(order, np.cumsum(sizes)[:-1])
    if budget.equal:
        groups = _halved(groups, num, lengths_N, budget)
    group_costs = np.array([budget.micro_batch_cost(lengths_N[group]) for group in groups])
    ranks = _dealt(group_costs, world_size) if budget.equal else balance(group_costs, world_size)
    return [[groups[member] for member in members.tolist()] for members in ranks]


def _cut(most: list[int], costs: list[float], max_cost: float, max_num: int) -> list[int]:
    """Sizes of consecutive micro-batches of samples that are sorted, longest first; empty if it takes too many.

    Args:
        most: by sample, how many rows fit if it is the longest.
        costs: by sample.
        max_cost: of a micro-batch, which is its rows × the cost of its longest; exceeded only by single rows.
        max_num: of micro-batches.
    """
    sizes: list[int] = []
    at = 0
    while at < len(most):
        if len(sizes) == max_num:
            return []
        sizes.append(min(most[at], int(max(min(max_cost / costs[at], len(most)), 1)), len(most) - at))
        at += sizes[-1]
    return sizes


def _halved(groups: list[Indices], num: int, lengths_N: Lengths, budget: TokenBudget) -> list[Indices]:
    """Cut the costliest micro-batches of several samples in two until there are `num`."""
    heap = [
        (-budget.micro_batch_cost(lengths_N[group]), at, group) for at, group in enumerate(groups) if len(group) > 1
    ]
    heapq.heapify(heap)
    done = [group for group in groups if len(group) == 1]
    count = len(groups)
    while heap and count < num:
        _, _, group = heapq.heappop(heap)
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            count += 1
            if len(half) > 1:
                heapq.heappush(heap, (-budget.micro_batch_cost(lengths_N[half]), count, half))
            else:
                done.append(half)
        count -= 1
    return done + [group for _, _, group in sorted(heap, key=lambda entry: entry[:2])]


def _dealt(costs: Costs, world_size: int) -> list[Indices]:
    """One each to all ranks, costliest first, and of these the costliest to the rank that has least so far: what runs
    side by side costs about the same."""
    order = np.argsort(-costs, kind="stable")
    loads = np.zeros(world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    for begin in range(0, len(order), world_size):
        members = order[begin : begin + world_size]
        for rank, member in zip(np.argsort(loads, kind="stable").tolist(), members.tolist(), strict=False):
            ranks[rank].append(member)
            loads[rank] += costs[member]
    return [np.array(members, dtype=np.int64) for members in ranks]


def _num_slots(lengths: Lengths, layout: Layout) -> int:
    return int(lengths.sum()) if layout == "packed" else len(lengths) * int(lengths.max())
