"""One HTML file that needs nothing else: pictures inside, system fonts, light or dark as the reader's system is."""

from __future__ import annotations

import base64
from html import escape
from importlib import resources
from string import Template

import torch

import macrobatch as mb
from macrobatch.demo.options import DemoOptions
from macrobatch.demo.report import HEADINGS, DemoReport, rows, verdict

__all__ = ["make_page"]

# By file name: what a reader who cannot see the picture is told, and the caption.
_CAPTIONS = {
    "gradient_error.png": (
        "Relative gradient error of each window on a logarithmic scale",
        "Filled: the short last window of each epoch. What lies near 1e-6 is the rounding of fp32.",
    ),
    "memory.png": (
        "Bars of the activation memory of the three ways",
        "Micro-batches hold the activations of a few samples at a time, whoever accumulates.",
    ),
    "loss.png": (
        "Loss of each update for the three ways",
        "The teeth of the textbook curve are its short windows: fewer means, divided by the same N. They are no "
        "progress.",
    ),
    "accuracy.png": (
        "Test accuracy after each epoch for the three ways",
        "All start from the same weights. macrobatch and the full batch differ by rounding alone, which can move "
        "single images to the other side.",
    ),
}


def make_page(report: DemoReport, pictures: dict[tuple[str, str], bytes]) -> str:
    """The page as text.

    Args:
        report: what it is about.
        pictures: PNG by (file name, "light" or "dark").
    """
    options, digits = report.options, report.digits
    num_train, num_test = (digits.num_train, digits.num_test) if digits else (0, 0)
    full, short = divmod(num_train, options.macro_batch)
    template = resources.files("macrobatch.demo").joinpath("page.html").read_text("utf-8")
    return Template(template).substitute(
        stopped='<p class="stopped">Stopped early: this is what was finished.</p>' if report.stopped_early else "",
        headings="".join(f'<th scope="col">{escape(heading)}</th>' for heading in HEADINGS),
        rows="\n".join(_row(cells) for cells in rows(report)),
        verdict=escape(verdict(report)),
        figures="\n".join(_figure(name, pictures) for name in _CAPTIONS if (name, "light") in pictures),
        windows=escape(_windows(full, short, options)),
        num_train=f"{num_train:,}",
        num_test=num_test,
        one_image=f"{100 / num_test:.2f} %" if num_test else "–",
        windows_per_epoch=full + bool(short),
        macro_batch=options.macro_batch,
        micro_batch=options.micro_batch,
        num_micro_batches=options.num_micro_batches,
        epochs=options.epochs,
        seed=options.seed,
        version=escape(mb.__version__),
        torch=escape(torch.__version__),
    )


def _windows(full: int, short: int, options: DemoOptions) -> str:
    if not short:
        return f"An epoch is {full} full windows and no short one: the textbook loop is right here."
    micro_batches, rest = divmod(short, options.micro_batch)
    ragged = f", the last of which has {rest} samples" if rest else ""
    return (
        f"An epoch is {full} full windows and a short one of {short} samples: {micro_batches + bool(rest)} "
        f"micro-batches{ragged}. The textbook loop divides by {options.num_micro_batches} there as well, so it takes "
        "too small a step, and it reports a loss that is too low by as much. On full windows its gradient is right."
    )


def _row(cells: tuple[str, ...]) -> str:
    name, *values = cells
    # Errors that deserve a percentage are the wrong ones.
    marks = [' class="bad"' if "%)" in value else "" for value in values]
    marked = "".join(f"<td{mark}>{escape(value)}</td>" for mark, value in zip(marks, values, strict=True))
    return f'<tr><th scope="row">{escape(name)}</th>{marked}</tr>'


def _figure(name: str, pictures: dict[tuple[str, str], bytes]) -> str:
    alternative, caption = _CAPTIONS[name]
    light, dark = (_data_url(pictures[name, theme]) for theme in ("light", "dark"))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(alternative)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
