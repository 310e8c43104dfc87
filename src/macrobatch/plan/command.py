"""What `macrobatch plan` prints and draws."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from macrobatch.errors import ArgumentError
from macrobatch.plan.cost import LINKS, Link, StepTime, Training
from macrobatch.plan.picture import TABLE, new_figure
from macrobatch.sync import Policy

__all__ = ["POLICIES", "ScalingOptions", "draw_scaling", "print_scaling"]

POLICIES: Mapping[str, Policy | None] = MappingProxyType(
    {
        "replicas": None,
        "keep-last": Policy(keep_parameters=True, reduce_last=True),
        "keep-each": Policy(keep_parameters=True, reduce_last=False),
        "reshard-last": Policy(keep_parameters=False, reduce_last=True),
        "reshard-each": Policy(keep_parameters=False, reduce_last=False),
    }
)
"""How ranks agree, by the name on the command line: all have everything, or shards are held and reduced like this."""

_NUMBER = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"
_COLORS = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe and Ito's palette
_STYLES = ("-", "--", "-.", ":")
_INK, _FAINT = "#222222", "#dddddd"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingOptions:
    """What was asked for on the command line.

    Args:
        world: numbers of ranks.
        link: each a name of `LINKS`, or bytes per second and seconds of latency, as in "50e9:5e-6".
        step: each a size of a micro-batch and the milliseconds of its forward and backward, as in "8:20.0"; at least
            two. The largest is taken for the largest that fits.
        parameters: number of parameters; gradients travel in 4 bytes, gathered parameters in 2.
        global_batch: samples of the macro-batch.
        policy: a name of `POLICIES`.

    Raises:
        ArgumentError: an option cannot be read.
    """

    world: Sequence[int]
    link: Sequence[str]
    step: Sequence[str]
    parameters: float
    global_batch: int
    policy: str = "replicas"

    def links(self) -> dict[str, Link]:
        """By what they were called."""
        return {text: LINKS[text] if text in LINKS else _link(text) for text in self.link}

    def training(self) -> Training:
        """The model to ask."""
        points = [_pair("--step", text, "SIZE:MILLISECONDS, for example 8:20.0") for text in self.step]
        if self.policy not in POLICIES:
            raise ArgumentError(
                "--policy", given=repr(self.policy), expected=f"one of {[*POLICIES]}", fix="leave it out"
            )
        if not all(size.is_integer() for size, _ in points):
            raise ArgumentError("--step", given=[*self.step], expected="whole sizes", fix="measure 4 and 8 samples")
        sizes = [int(size) for size, _ in points]
        return Training(
            step=StepTime.fit(sizes, [milliseconds / 1e3 for _, milliseconds in points]),
            global_batch=self.global_batch,
            max_micro_batch=max(sizes),
            gradient_bytes=4 * self.parameters,
            parameter_bytes=2 * self.parameters,
            policy=POLICIES[self.policy],
        )


def print_scaling(options: ScalingOptions, console: Console) -> None:
    """A table: for each link and number of ranks, the best micro-batch and what the window then takes."""
    training, links = options.training(), options.links()
    table = Table(
        title=f"A macro-batch of {training.global_batch:,} samples",
        caption=f"{_subject(options, training)}\nwaits: part of the window in which nothing but communication goes on\n"
        "efficiency: of the speed of one rank, times their number",
        **TABLE,
    )
    table.add_column("link", vertical="bottom")
    for name in (
        "ranks",
        "micro-\nbatch,\nsamples",
        "micro-\nbatches\nper rank",
        "window,\nms",
        "waits,\nms",
        "samples/s",
        "effi-\nciency",
    ):
        table.add_column(name, justify="right", vertical="bottom")
    for name, link in links.items():
        for world_size in options.world:
            best = training.best(link, world_size)
            table.add_row(
                name,
                f"{world_size:,}",
                f"{best.micro_batch:,}",
                f"{best.num_micro_batches:,}",
                f"{best.window_s * 1e3:,.1f}",
                f"{best.exposed_s * 1e3:,.1f}",
                f"{best.samples_per_s:,.0f}",
                f"{best.efficiency:.1%}",
                end_section=world_size == options.world[-1],
            )
    console.print(table)


def draw_scaling(options: ScalingOptions, path: Path) -> None:
    """A picture of the efficiency over the number of ranks, one line for each link, from 1 to the most that was asked.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    training, links = options.training(), options.links()
    most = max(*options.world, 2)
    worlds = [*itertools.takewhile(lambda world: world < most, (2**power for power in range(64))), most]
    figure = new_figure(4.4)
    figure.suptitle(_subject(options, training), fontsize=10, color=_INK)
    axes: Any = figure.subplots()
    for (name, link), color, style in zip(
        links.items(), itertools.cycle(_COLORS), itertools.cycle(_STYLES), strict=False
    ):
        efficiencies = [100 * training.best(link, world).efficiency for world in worlds]
        label = f"{name} ({link.bytes_per_s / 1e9:g} GB/s, {link.latency_s * 1e6:g} µs)"
        axes.plot(worlds, efficiencies, linestyle=style, color=color, linewidth=2, label=label)
    axes.set(xscale="log", xlim=(1, most), ylim=(0, 103), xlabel="ranks", ylabel="efficiency, % of perfect scaling")
    axes.set_xticks([world for world in (10**power for power in range(12)) if world <= most])
    axes.xaxis.set_major_formatter(lambda world, _: f"{world:,.0f}")
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.spines[["right"]].set_visible(False)
    share: Any = axes.secondary_xaxis("top", functions=(_identity, _identity))
    share.set_xticks(axes.get_xticks())
    share.xaxis.set_major_formatter(lambda world, _: _short(training.global_batch / max(world, 1)))
    share.set_xlabel(f"samples per rank, of a macro-batch of {training.global_batch:,}", color=_INK)
    axes.legend(frameon=False, loc="lower left", title="link per rank")
    figure.savefig(path, dpi=150)


def _subject(options: ScalingOptions, training: Training) -> str:
    step = training.step
    return (
        f"{options.parameters / 1e6:,.4g} million parameters, {options.policy}; "
        f"micro-step {step.fixed_s * 1e3:.3g} ms + {step.per_sample_s * 1e3:.3g} ms per sample"
    )


def _identity(values: Any) -> Any:
    return values


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _pair(option: str, text: str, expected: str) -> tuple[float, float]:
    match = re.fullmatch(f"{_NUMBER}:{_NUMBER}", text.strip())
    if match is None:
        raise ArgumentError(option, given=repr(text), expected=expected, fix=f"give {option} two numbers with a colon")
    return float(match[1]), float(match[2])


def _link(text: str) -> Link:
    return Link(*_pair("--link", text, f"one of {[*LINKS]}, or BYTES_PER_S:LATENCY_S, for example 50e9:5e-6"))
