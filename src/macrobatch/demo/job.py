"""The job from start to end: train three ways, check the gradients against fp64, write the results."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console

from macrobatch.demo.data import Digits, load_digits, make_loader
from macrobatch.demo.interrupt import Interrupts
from macrobatch.demo.measure import FullBatchReference, relative_error
from macrobatch.demo.options import DemoOptions
from macrobatch.demo.page import make_page
from macrobatch.demo.plots import PLOTS, THEMES, draw
from macrobatch.demo.record import GradientError, Recorder, TrainingRecord
from macrobatch.demo.report import DemoReport, make_table, verdict
from macrobatch.demo.train import loss_fn, make_model, train_full_batch, train_macrobatch, train_textbook
from macrobatch.errors import ArgumentError, MissingDependencyError
from macrobatch.observe.progress import open_bar

__all__ = ["run"]

TRAININGS: dict[str, Callable[[Digits, DemoOptions, Recorder], None]] = {
    "macrobatch": train_macrobatch,
    "full batch": train_full_batch,
    "textbook": train_textbook,
}


def run(options: DemoOptions, *, console: Console | None = None) -> DemoReport:
    """Train three ways, compare, write `index.html`, four PNG files and `results.json` into `options.out`.

    Ctrl-C stops at the end of the window; what was finished is written and marked as stopped early. A second Ctrl-C
    gives up at once and leaves the folder as it was.

    Args:
        options: what to train, and where to write.
        console: where table and messages go; None means the terminal. Progress bars go to stderr.

    Returns:
        All numbers; its `exit_code` is 0, or 130 after Ctrl-C.

    Raises:
        MissingDependencyError: scikit-learn or matplotlib is not installed.
        ArgumentError: a macro-batch is larger than the training set, or `out` is not a folder.
    """
    _require_dependencies()
    _require_folder(options.out)
    console = console or Console()
    report = DemoReport(options=options)
    with Interrupts() as interrupts, _threads(options.num_threads):
        try:
            _measure(report, interrupts)
        except KeyboardInterrupt:
            # Something else than Ctrl-C may have raised it, an embedding program for instance.
            interrupts.num_presses = max(interrupts.num_presses, 1)
        with suppress(KeyboardInterrupt):
            if interrupts.num_presses < 2:
                _write(report, interrupts)
    report.num_presses = interrupts.num_presses
    _tell(report, console)
    return report


def _measure(report: DemoReport, interrupts: Interrupts) -> None:
    """Fill the report; wherever it is interrupted, the report has what was finished."""
    options = report.options
    digits = load_digits()
    if options.macro_batch > digits.num_train:
        raise ArgumentError(
            "macro_batch",
            given=repr(options.macro_batch),
            expected=f"at most the {digits.num_train} samples of the training set",
            fix="pass macro_batch=256",
        )
    report.digits = digits
    num_updates = len(make_loader(digits, options))
    for name, train in TRAININGS.items():
        interrupts.pause()
        record = TrainingRecord(name=name, num_updates=num_updates, macro_batch=options.macro_batch)
        report.trainings[name] = record
        recorder = Recorder(record, digits, options=options, pause=interrupts.pause)
        train(digits, options, recorder)
        _check_gradients(recorder, options.seed, interrupts)
    report.is_complete = True


def _check_gradients(recorder: Recorder, seed: int, interrupts: Interrupts) -> None:
    """Compare what the optimizer saw with the full batch in fp64."""
    reference = FullBatchReference(make_model(seed), loss_fn)
    for window in open_bar(recorder.windows_seen, desc=f"{recorder.record.name} against fp64"):
        error = relative_error(window.gradient_P, reference.gradient(window.weights_P, window.batch))
        recorder.record.gradient_errors.append(
            GradientError(update=window.update, num_samples=len(window.batch[1]), relative_error=error)
        )
        interrupts.pause()


def _write(report: DemoReport, interrupts: Interrupts) -> None:
    """All files or none: they are made in memory first, then each is put in place by a renaming."""
    drawn = {name: plot for name, plot in PLOTS.items() if any(record.losses for record in report.trainings.values())}
    pictures = {(name, theme): draw(report, plot, THEMES[theme]) for name, plot in drawn.items() for theme in THEMES}
    contents = {name: pictures[name, "light"] for name in drawn}
    contents["results.json"] = json.dumps(report.to_json(), indent=2, allow_nan=False).encode()
    contents["index.html"] = make_page(report, pictures).encode()
    interrupts.seal()
    out = report.options.out
    out.mkdir(parents=True, exist_ok=True)
    for name in PLOTS.keys() - drawn.keys():
        (out / name).unlink(missing_ok=True)
    for name, content in contents.items():
        unfinished = out / f".{name}.unfinished"
        unfinished.write_bytes(content)
        unfinished.replace(out / name)
        report.files.append(out / name)


def _tell(report: DemoReport, console: Console) -> None:
    page = report.options.out / "index.html"
    if any(record.losses for record in report.trainings.values()):
        console.print(make_table(report))
        console.print(verdict(report) or "Too little was measured to compare.", highlight=False)
    if not report.files:
        line = f"Stopped; nothing was written into {report.options.out}"
    elif report.stopped_early:
        line = f"Stopped early; what was finished is in {page}"
    else:
        line = f"Results: {page}"
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _require_dependencies() -> None:
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            "macrobatch demo",
            given=f"no {' and no '.join(missing)}",
            expected="scikit-learn (the images) and matplotlib (the plots)",
            fix=f"run: pip install {' '.join(missing)}",
        )


def _require_folder(out: Path) -> None:
    # Found out before the training, not after it.
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ArgumentError("out", given=str(out), expected="a folder to write into", fix="pass another folder")


@contextmanager
def _threads(num_threads: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
