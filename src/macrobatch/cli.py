"""The command `macrobatch`: demo · verify · env."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from macrobatch import env
from macrobatch.errors import ArgumentError, MacrobatchError
from macrobatch.verify import verify as verify_gradient

__all__ = ["main"]

app = typer.Typer(
    name="macrobatch",
    help="Say the batch you want; get exactly that batch's gradient.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_DEBUG = "--debug"


@app.callback()
def _options(debug: Annotated[bool, typer.Option(_DEBUG, help="Show the traceback of an error.")] = False) -> None:
    pass  # main() looks for the flag itself: it must also hold for errors while options are read


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set, for each of the three ways.")] = 20,
    macro_batch: Annotated[int, typer.Option(min=1, help="Samples per update.")] = 256,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples per forward and backward.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for plots, page and numbers.")] = Path("runs/demo"),
) -> None:
    """Train a ResNet on handwritten digits three ways: exact windows, the whole batch, and the textbook loop.

    Needs scikit-learn and matplotlib (the extra "demo"). Ctrl-C stops early and writes what was finished.
    """
    from macrobatch.demo import DemoOptions, run

    options = DemoOptions(epochs=epochs, macro_batch=macro_batch, micro_batch=micro_batch, seed=seed, out=out)
    raise typer.Exit(run(options).exit_code)


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Returns (model, loss_fn, batch).")],
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples per micro-batch of the split to prove.")] = 2,
    against: Annotated[int, typer.Option(min=0, help="Compare with this split; 0 means the whole batch.")] = 0,
) -> None:
    """Prove on your own model that accumulation gives the whole batch's gradient, or name what breaks it.

    FUNCTION takes no argument and returns (model, loss_fn, batch), or a dict with these keys. Exit code 0 if exact,
    1 if not.
    """
    report = verify_gradient(**_case(target), micro_batch=micro_batch, against=against or None)
    Console(soft_wrap=True).print(str(report), style="green" if report.ok else "yellow", markup=False, highlight=False)
    raise typer.Exit(0 if report.ok else 1)


@app.command("env")
def show_env() -> None:
    """Print versions and devices, for a bug report."""
    table = Table(show_header=False, box=None)
    for name, value in env.description().items():
        table.add_row(name, value)
    Console().print(table)


def main() -> None:
    """Run the command line; errors are one message, with a traceback only on request."""
    debug = _DEBUG in sys.argv or env.debug()
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        app()
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        raise SystemExit(130) from None
    except MacrobatchError as error:
        if debug:
            raise
        console.print(f"error: {error}", style="red")
        raise SystemExit(2) from None
    except Exception as error:
        if debug:
            raise
        console.print(f"{type(error).__name__}: {error}\n({_DEBUG} shows where)", style="red")
        raise SystemExit(1) from None


def _case(target: str) -> dict[str, Any]:
    module_name, _, function_name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name.removesuffix(".py").replace("/", ".")), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(
            "MODULE:FUNCTION",
            given=f"{target!r} ({error})",
            expected="an importable module and a function in it",
            fix="run it from the folder of the module, for example: macrobatch verify train:case",
        ) from None
    case = function()
    names = ("model", "loss_fn", "batch")
    if isinstance(case, tuple) and len(case) == len(names):
        return dict(zip(names, case, strict=True))
    if isinstance(case, Mapping) and set(case) == set(names):
        return dict(case)
    raise ArgumentError(
        target, given=f"a {type(case).__name__}", expected="(model, loss_fn, batch)", fix="return these three"
    )
