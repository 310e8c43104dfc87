"""The command `macrobatch`: launch · demo · verify · plan · env."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from macrobatch import env
from macrobatch.errors import ArgumentError, MacrobatchError
from macrobatch.plan.split import Auto
from macrobatch.train import TrainStep
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
_PARAMETERS, _GLOBAL_BATCH, _POLICY = 163e6, 65536, "replicas"  # GPT-2's, where nothing was measured


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
    _console(soft_wrap=True, highlight=False).print(str(report), style="green" if report.ok else "yellow")
    raise typer.Exit(0 if report.ok else 1)


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    script: Annotated[str, typer.Argument(help="The script, or a module with --module.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments: all that follows it.")] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Ranks on this machine.", show_default="one per GPU, or 1")
    ] = None,
    nnodes: Annotated[
        str | None, typer.Option(help='Number of machines, or a range as in "1:4".', show_default="1")
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Which machine this is; 0 is the one in --rdzv.", show_default="found out"),
    ] = None,
    rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where several machines meet.")] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="Run a module, as python -m does.")] = False,
) -> None:
    """Run a script on every GPU of this machine, or of several: torchrun with good defaults.

    One machine needs no option; jobs beside each other get ports of their own.

    On several machines, give all of them the same --nnodes and --rdzv.

    Each rank gets its share of the cores as OMP_NUM_THREADS, unless that is set.

    The exit code is that of the rank that failed first.
    """
    from macrobatch.launch.command import Options, run

    options = Options(nproc=nproc, nnodes=nnodes, node_rank=node_rank, rdzv=rdzv, module=module)
    exit_code, failure = run(script, args or [], options)
    if failure is not None:
        typer.secho(f"error: {failure}", fg="red", err=True)
    raise typer.Exit(exit_code)


@app.command()
def plan(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FUNCTION]",
            help="Returns (model, optimizer, loss_fn, batch): find the size of its micro-batches out.",
        ),
    ] = None,
    world: Annotated[list[int] | None, typer.Option(min=1, help="Number of ranks; repeat it.")] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help='nvlink, 400g, 100g, 10g, or BYTES_PER_S:LATENCY_S as in "50e9:5e-6"; repeat it.'),
    ] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE:MS", help="Samples in a micro-batch and its milliseconds; at least two sizes."),
    ] = None,
    parameters: Annotated[float, typer.Option(min=1, help="Number of parameters.")] = _PARAMETERS,
    global_batch: Annotated[
        int, typer.Option(min=1, help="Samples of the macro-batch over all ranks.")
    ] = _GLOBAL_BATCH,
    policy: Annotated[
        str, typer.Option(help="replicas, or for shards keep-last, keep-each, reshard-last, reshard-each.")
    ] = _POLICY,
    plot: Annotated[Path | None, typer.Option(help="Draw what was found into this PNG.")] = None,
) -> None:
    """Find the fastest micro-batch that fits for your own model here, or estimate any number of ranks.

    With MODULE:FUNCTION, a function without arguments: measures memory and time of a few sizes on this machine. It may
    return a dict instead, with further arguments of TrainStep, such as precision or count, beside these four.

    Without: estimates a window's time and efficiency, from the time of a micro-step on one rank. Without --step, it is
    that of GPT-2 (T 1024, bf16, captured) on an H200.
    """
    if plot is not None:
        from macrobatch.plan.picture import check_picture

        check_picture(plot)
    if target is not None:
        _refuse_estimates(
            {
                "--world": world,
                "--link": link,
                "--step": step,
                "--parameters": parameters != _PARAMETERS,
                "--global-batch": global_batch != _GLOBAL_BATCH,
                "--policy": policy != _POLICY,
            }
        )
        _plan_for(_case(target, ("model", "optimizer", "loss_fn", "batch"), further=True), plot)
        return
    from macrobatch.plan.command import ScalingOptions, draw_scaling, print_scaling

    options = ScalingOptions(
        world=world or [1, 8, 64, 512, 4096, 32768, 100_000],
        link=link or ["nvlink", "400g", "100g", "10g"],
        step=step or ["4:11.3", "8:20.0"],
        parameters=parameters,
        global_batch=global_batch,
        policy=policy,
    )
    if plot is not None:
        draw_scaling(options, plot)
    print_scaling(options, _console())


@app.command("env")
def show_env() -> None:
    """Print versions and devices, for a bug report."""
    table = Table(show_header=False, box=None)
    for name, value in env.description().items():
        table.add_row(name, value)
    _console().print(table)


def main() -> None:
    """Run the command line; errors are one message, with a traceback only on request. Exit code 2 for any of them."""
    debug = _DEBUG in sys.argv or env.debug()
    console = _console(stderr=True, soft_wrap=True, highlight=False)
    try:
        app([word for word in sys.argv[1:] if word != _DEBUG])
    except Exception as error:
        if debug:
            traceback.print_exc()
            raise SystemExit(2) from None
        of_ours = isinstance(error, MacrobatchError)
        text = f"error: {error}" if of_ours else f"{type(error).__name__}: {error}\n({_DEBUG} shows where)"
        console.print(text, style="red")
        raise SystemExit(2) from None


def _console(**options: Any) -> Console:
    """What it prints, paths and messages above all, is shown as it is: no ":two:" becomes a picture of a 2."""
    return Console(markup=False, emoji=False, **options)


def _refuse_estimates(given: Mapping[str, object]) -> None:
    """Options of the estimate say nothing about what is measured here."""
    names = [name for name, value in given.items() if value]
    if names:
        raise ArgumentError(
            "plan",
            given=f"{', '.join(names)} beside MODULE:FUNCTION",
            expected="a function to measure here, or options to estimate from",
            fix="measure first, then leave the function out and pass two of the times as --step SIZE:MS",
        )


def _plan_for(case: dict[str, Any], plot: Path | None) -> None:
    from macrobatch.plan.autosize import Autosize
    from macrobatch.plan.picture import draw_survey, print_survey

    batch = case.pop("batch")
    case.setdefault("micro_batch", Auto(remembers=False))
    step = TrainStep(**case)
    if not isinstance(step.split, Autosize):
        raise ArgumentError(
            "micro_batch", given=repr(step.split), expected="an Auto, to be measured", fix="leave it out"
        )
    step.split.cut(batch)
    survey = step.split.survey
    assert survey is not None
    print_survey(survey, _console())
    if plot is not None:
        draw_survey(survey, plot)


def _case(
    target: str, names: tuple[str, ...] = ("model", "loss_fn", "batch"), *, further: bool = False
) -> dict[str, Any]:
    """What a function of the user's returns, by name."""
    location, _, name = target.rpartition(":")
    try:
        function = getattr(_module(location), name)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ArgumentError(
            "MODULE:FUNCTION",
            given=f"{target!r} ({error})",
            expected="an importable module or a file, and a function in it",
            fix="name it as in train.py:case, where case is a function of train.py",
        ) from error
    if not callable(function):
        raise ArgumentError(
            target,
            given=f"a {type(function).__name__}",
            expected="a function without arguments",
            fix="write def case()",
        )
    case: Any = function()
    fields = case._asdict() if hasattr(case, "_asdict") else case
    if isinstance(fields, tuple) and len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    if isinstance(fields, Mapping) and (set(fields) >= set(names) if further else set(fields) == set(names)):
        return dict(fields)
    number = {3: "three", 4: "four"}[len(names)]
    raise ArgumentError(
        target, given=f"a {type(case).__name__}", expected=f"({', '.join(names)})", fix=f"return these {number}"
    )


def _module(location: str) -> ModuleType:
    """A module by its name, or by its file."""
    sys.path.insert(0, os.getcwd())
    path = Path(location)
    if path.suffix != ".py":
        return importlib.import_module(location.replace("/", "."))
    path = path.resolve(strict=True)
    name, root = path.stem, path.parent
    while (root / "__init__.py").exists():  # a part of a package, which may import its neighbours
        name, root = f"{root.name}.{name}", root.parent
    sys.path.insert(0, str(root))
    if "." in name:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)  # by its file: json.py is not the standard library's
    spec.loader.exec_module(module)
    return module
