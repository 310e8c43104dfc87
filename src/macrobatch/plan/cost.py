"""What a window would take on any number of ranks: arithmetic on a few measured numbers, to choose by.

The model, for a share of n samples per rank, run as k micro-batches, and collectives in p pieces:

```text
window    = k·fixed + n·per_sample                 the micro-steps of the busiest rank
          + communication that nothing hides
          + update
ring      = 2·(W−1)·(latency + bytes/W/bandwidth)  an all-reduce; the faster of the two is taken
tree      = 2·⌈log2 W⌉·latency + 2·bytes/bandwidth
gather    = ⌈log2 W⌉·latency + (W−1)/W·bytes/bandwidth    an all-gather or reduce-scatter
```

A collective of the forward hides under the forward, a third of the micro-step; one of the backward under the rest. Its
first or last piece cannot hide. Not in the model: ranks that are slower than others, links that others use too, and
kernels that are slow on few samples in another way than by a fixed time.

Sources: R. Thakur, R. Rabenseifner, W. Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19
(2005), for ring and gather; P. Sanders, J. Speck, J. Träff, Two-tree algorithms for full bandwidth broadcast, reduction
and scan, Parallel Computing 35 (2009), for the tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from macrobatch.checks import check_integer, check_number, is_number
from macrobatch.errors import ArgumentError
from macrobatch.plan.lengths import nonnegative_fit
from macrobatch.sync import Policy

__all__ = ["LINKS", "Estimate", "Link", "StepTime", "Training"]

_FORWARD = 1 / 3  # of a micro-step; a backward is two matrix products for each one of the forward


@dataclass(frozen=True, slots=True)
class StepTime:
    """Forward and backward of a micro-batch of `b` samples: `fixed_s + per_sample_s · b`.

    Args:
        fixed_s: >= 0, what launches take.
        per_sample_s: > 0.

    ```pycon
    >>> step = StepTime.fit([4, 8], [0.0112, 0.0198])
    >>> f"{step.fixed_s * 1e3:.1f} ms + {step.per_sample_s * 1e3:.2f} ms per sample"
    '2.6 ms + 2.15 ms per sample'

    ```
    """

    fixed_s: float
    per_sample_s: float

    def __post_init__(self) -> None:
        check_number("fixed_s", self.fixed_s, fix=_MEASURE)
        check_number("per_sample_s", self.per_sample_s, is_positive=True, fix=_MEASURE)

    @classmethod
    def fit(cls, sizes: Sequence[int], seconds: Sequence[float]) -> StepTime:
        """The least relative squares through measured points, neither coefficient negative.

        Args:
            sizes: samples per micro-batch, at least two different ones.
            seconds: of a micro-step at each size.

        Raises:
            ArgumentError: too few points, or numbers that are not > 0.
        """
        numbers = [*sizes, *seconds]
        if len(set(sizes)) < 2 or len(sizes) != len(seconds) or not all(is_number(n) and n > 0 for n in numbers):
            raise ArgumentError(
                "StepTime.fit",
                given=f"sizes {sizes!r:.60}, seconds {seconds!r:.60}",
                expected="as many of both, > 0, at two different sizes or more",
                fix="time a micro-step of 4 samples and one of 8",
            )
        fixed_s, per_sample_s = nonnegative_fit([1.0] * len(sizes), sizes, seconds)
        return cls(fixed_s, max(per_sample_s, 1e-9 * fixed_s))

    def seconds(self, size: float) -> float:
        """Of one micro-step."""
        return self.fixed_s + self.per_sample_s * size


@dataclass(frozen=True, slots=True)
class Link:
    """What every rank is connected by: the slowest stretch of the way.

    Args:
        bytes_per_s: > 0, in one direction, per rank.
        latency_s: >= 0, of one message.

    ```pycon
    >>> link = Link(50e9, 5e-6)
    >>> [f"{link.all_reduce_s(500e6, world_size) * 1e3:.1f} ms" for world_size in (1, 2, 8, 100_000)]
    ['0.0 ms', '10.0 ms', '17.6 ms', '20.2 ms']

    ```
    """

    bytes_per_s: float
    latency_s: float = 5e-6

    def __post_init__(self) -> None:
        check_number("bytes_per_s", self.bytes_per_s, is_positive=True, fix=_MEASURE)
        check_number("latency_s", self.latency_s, fix=_MEASURE)

    def all_reduce_s(self, num_bytes: float, world_size: int) -> float:
        """By ring or by tree, whichever is faster."""
        if world_size == 1:
            return 0.0
        ring_s = 2 * (world_size - 1) * (self.latency_s + num_bytes / world_size / self.bytes_per_s)
        tree_s = 2 * (math.ceil(math.log2(world_size)) * self.latency_s + num_bytes / self.bytes_per_s)
        return min(ring_s, tree_s)

    def gather_s(self, num_bytes: float, world_size: int) -> float:
        """An all-gather to `num_bytes`, or a reduce-scatter of them."""
        if world_size == 1:
            return 0.0
        share = (world_size - 1) / world_size
        return math.ceil(math.log2(world_size)) * self.latency_s + share * num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a window takes, by the model.

    Attributes:
        num_micro_batches: of the busiest rank.
        compute_s: its micro-steps.
        exposed_s: communication that nothing hides.
        update_s: the optimizer.
        samples_per_s: of all ranks.
        efficiency: how much of the speed of one rank, times the number of ranks, is left; 1 is perfect scaling.
    """

    world_size: int
    micro_batch: int
    num_micro_batches: int
    compute_s: float
    exposed_s: float
    update_s: float
    samples_per_s: float
    efficiency: float

    @property
    def window_s(self) -> float:
        """All of it."""
        return self.compute_s + self.exposed_s + self.update_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A model, its macro-batch and the time of its micro-step: what a window costs follows from these and a link.

    Args:
        step: measured on one rank.
        global_batch: samples of the macro-batch over all ranks.
        max_micro_batch: the largest micro-batch that fits.
        gradient_bytes: of all gradients as they travel; 4 per parameter in fp32.
        parameter_bytes: of all parameters as they are gathered; used with a policy.
        policy: None for replicas, whose gradients are all-reduced in the last micro-batch; a `Policy` for shards.
        num_pieces: collectives that the gradients, or the parameters, travel in.
        update_s: of the optimizer.
        launch_s: what starting one collective keeps the device waiting, where the host is what it waits for.
        overlap: how much of a backward or forward may hide communication: 0 where a collective follows a captured
            graph, 1 where all runs side by side.

    Raises:
        ArgumentError: an argument is out of its domain.

    ```pycon
    >>> training = Training(
    ...     step=StepTime(2.6e-3, 2.15e-3), global_batch=4096, max_micro_batch=32, gradient_bytes=500e6
    ... )
    >>> for world_size in (1, 64, 1024):
    ...     best = training.best(LINKS["400g"], world_size)
    ...     print(best.micro_batch, best.num_micro_batches, f"{best.efficiency:.2f}")
    32 128 1.00
    32 2 0.99
    4 1 0.35

    ```
    """

    step: StepTime
    global_batch: int
    max_micro_batch: int
    gradient_bytes: float
    parameter_bytes: float = 0.0
    policy: Policy | None = None
    num_pieces: int = 16
    update_s: float = 0.0
    launch_s: float = 0.0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        for name in ("global_batch", "max_micro_batch", "num_pieces"):
            check_integer(name, getattr(self, name), fix=f"pass {name}=8")
        for name in ("gradient_bytes", "parameter_bytes", "update_s", "launch_s", "overlap"):
            check_number(name, getattr(self, name), fix=_MEASURE)
        for name, is_right, expected, fix in (
            ("step", isinstance(self.step, StepTime), "a StepTime", "pass StepTime.fit([4, 8], [0.011, 0.020])"),
            ("policy", self.policy is None or isinstance(self.policy, Policy), "a Policy or None", "leave it out"),
            ("overlap", self.overlap <= 1, "a number from 0 to 1", "pass overlap=1.0"),
        ):
            if not is_right:
                raise ArgumentError(name, given=repr(getattr(self, name)), expected=expected, fix=fix)

    def window(self, link: Link, world_size: int, micro_batch: int) -> Estimate:
        """The macro-batch on so many ranks, in micro-batches of so many samples.

        Raises:
            ArgumentError: not integers >= 1, or a micro-batch that does not fit.
        """
        check_integer("world_size", world_size, fix="pass world_size=8")
        check_integer("micro_batch", micro_batch, fix="pass micro_batch=8")
        if micro_batch > self.max_micro_batch:
            raise ArgumentError(
                "micro_batch",
                given=repr(micro_batch),
                expected=f"at most max_micro_batch={self.max_micro_batch}",
                fix="raise max_micro_batch, if it fits",
            )
        alone_s = self._window_s(link, 1, self.max_micro_batch)
        num, compute_s, exposed_s = self._parts(link, world_size, micro_batch)
        window_s = compute_s + exposed_s + self.update_s
        return Estimate(
            world_size=world_size,
            micro_batch=micro_batch,
            num_micro_batches=num,
            compute_s=compute_s,
            exposed_s=exposed_s,
            update_s=self.update_s,
            samples_per_s=self.global_batch / window_s,
            efficiency=alone_s / (world_size * window_s),
        )

    def best(self, link: Link, world_size: int) -> Estimate:
        """The fastest micro-batch that fits, on so many ranks; of equally fast ones, the smallest."""
        check_integer("world_size", world_size, fix="pass world_size=8")
        most = min(self.max_micro_batch, self._share(world_size))
        sizes = range(1, most + 1)
        return self.window(link, world_size, min(sizes, key=lambda size: self._window_s(link, world_size, size)))

    def _share(self, world_size: int) -> int:
        return -(-self.global_batch // world_size)

    def _window_s(self, link: Link, world_size: int, micro_batch: int) -> float:
        return sum(self._parts(link, world_size, micro_batch)[1:]) + self.update_s

    def _parts(self, link: Link, world_size: int, micro_batch: int) -> tuple[int, float, float]:
        """Micro-batches, seconds of their micro-steps, seconds of communication that is not hidden."""
        share = self._share(world_size)
        num = -(-share // micro_batch)
        last = share - (num - 1) * micro_batch
        compute_s = num * self.step.fixed_s + share * self.step.per_sample_s
        if world_size == 1:
            return num, compute_s, 0.0
        reduce_s, gather_s = self._collectives_s(link, world_size)
        if self.policy is None:
            return num, compute_s, self._exposed_s([reduce_s], last, 1 - _FORWARD)
        kinds = [(micro_batch, True, False, 1), (micro_batch, False, False, num - 2), (last, False, True, 1)]
        exposed_s = 0.0
        for size, is_first, is_last, times in kinds if num > 1 else [(last, True, True, 1)]:
            reshards, reduces = not self.policy.keep_parameters, is_last or not self.policy.reduce_last
            forward_s = self._exposed_s([gather_s] * (reshards or is_first), size, _FORWARD)
            backward_s = self._exposed_s([gather_s] * reshards + [reduce_s] * reduces, size, 1 - _FORWARD)
            exposed_s += times * (forward_s + backward_s)
        return num, compute_s, exposed_s

    def _collectives_s(self, link: Link, world_size: int) -> tuple[float, float]:
        """Seconds to reduce all gradients, and to gather all parameters, piece by piece."""
        gradients, parameters = self.gradient_bytes / self.num_pieces, self.parameter_bytes / self.num_pieces
        reduce_s = (link.all_reduce_s if self.policy is None else link.gather_s)(gradients, world_size)
        return self.num_pieces * reduce_s, self.num_pieces * link.gather_s(parameters, world_size)

    def _exposed_s(self, collectives_s: list[float], size: int, part: float) -> float:
        """What a part of a micro-step does not hide of collectives, and what starting their pieces takes."""
        hidden_s = self.overlap * part * self.step.seconds(size)
        edge_s = max(collectives_s, default=0.0) / self.num_pieces
        launch_s = len(collectives_s) * self.num_pieces * self.launch_s
        return max(edge_s, sum(collectives_s) - hidden_s) + launch_s


_MEASURE = "measure it, in seconds or bytes"

LINKS: Mapping[str, Link] = MappingProxyType(
    {
        "nvlink": Link(450e9, 2e-6),
        "400g": Link(50e9, 5e-6),
        "100g": Link(12.5e9, 10e-6),
        "10g": Link(1.25e9, 30e-6),
    }
)
"""Nominal figures: NVLink of an H100 or H200, and networks by their bits per second and rank."""
