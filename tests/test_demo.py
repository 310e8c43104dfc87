"""The demo: what it measures is right, what it writes is whole, and Ctrl-C stops it cleanly."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from tqdm import tqdm

import macrobatch as mb
from macrobatch.demo import DemoOptions, DemoReport, job, run
from macrobatch.demo.data import Digits, load_digits, make_loader
from macrobatch.demo.interrupt import Interrupts
from macrobatch.demo.measure import FullBatchReference, SavedBytes, flat_gradient, flat_weights, relative_error
from macrobatch.demo.model import DigitResNet
from macrobatch.demo.record import Recorder
from macrobatch.demo.train import loss_fn, make_model, textbook_backward, train_full_batch
from macrobatch.errors import ArgumentError, MissingDependencyError

pytest.importorskip("sklearn", reason="the extra [demo] is not installed")
pytest.importorskip("matplotlib", reason="the extra [demo] is not installed")

pytestmark = pytest.mark.xdist_group("demo")  # one worker makes the report that they share

FILES = {"accuracy.png", "gradient_error.png", "index.html", "loss.png", "memory.png", "results.json"}

# fp32 has 2^-24 = 6e-8 relative rounding error; some ten layers and a cancelling sum add up to less than this.
FP32 = 1e-6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more, and lose much where tests run side by side."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def windows(digits: Digits) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images_BCHW, labels_B) for images_BCHW, labels_B in make_loader(digits, DemoOptions(epochs=1))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run(DemoOptions(epochs=1, out=out), console=Console(quiet=True))


@pytest.fixture
def sigint() -> Iterator[None]:
    """Python's own handler for Ctrl-C, also where the test run was started with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


# --- data and model --------------------------------------------------------------------------------------------------


def test_data_is_split_fairly(digits: Digits):
    assert (digits.num_train, digits.num_test) == (1437, 360)
    shares = [torch.bincount(labels_N) / len(labels_N) for labels_N in (digits.train_labels_N, digits.test_labels_N)]
    torch.testing.assert_close(*shares, rtol=0, atol=1 / 360)
    rows = torch.cat([digits.train_images_NCHW, digits.test_images_NCHW]).flatten(1)
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) == 1797  # no image on both sides


def test_last_window_is_short_and_ragged(windows: list[tuple[torch.Tensor, torch.Tensor]]):
    sizes = [len(labels_B) for _, labels_B in windows]
    assert sizes == [256] * 5 + [157]
    assert sizes[-1] % 16 == 13


def test_every_epoch_sees_every_sample_in_an_order_of_its_own(digits: Digits):
    options = DemoOptions(epochs=2, seed=3)
    sampler = make_loader(digits, options).sampler
    order = [index for window in sampler for index in window]
    first, second = order[:1437], order[1437:]
    assert sorted(first) == sorted(second) == list(range(1437))
    assert first != second
    assert order == [index for window in make_loader(digits, options).sampler for index in window]


def test_initial_weights_depend_on_seed_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(flat_weights(make_model(1)), flat_weights(make_model(1)))
    assert not torch.equal(flat_weights(make_model(1)), flat_weights(make_model(2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_do_not_see_each_other():
    model, images_BCHW = DigitResNet(), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([model(image_CHW[None]) for image_CHW in images_BCHW])
    torch.testing.assert_close(model(images_BCHW), alone)


# --- measurements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1], ids=["full window", "short window"])
def test_gradient_error_tells_right_from_wrong(number: int, windows: list[tuple[torch.Tensor, torch.Tensor]]):
    batch, options = windows[number], DemoOptions()
    model = make_model(seed=0)
    exact_P = FullBatchReference(model, loss_fn).gradient(flat_weights(model), batch)
    mb.accumulate(model, loss_fn, batch, micro_batch=options.micro_batch)
    ours = relative_error(flat_gradient(model), exact_P)
    model.zero_grad()
    textbook_backward(model, batch, options)
    textbook = relative_error(flat_gradient(model), exact_P)
    assert ours <= FP32
    if number == 0:
        assert textbook <= FP32
    else:
        assert textbook > 1e-3  # the control: an error of the loop must be seen
        # Ten of sixteen means: 6/16 of the gradient are missing, give or take the heavier last three samples.
        assert textbook == pytest.approx(6 / 16, abs=0.03)


def test_reference_does_not_touch_the_model():
    model, batch = DigitResNet(), (torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    weights_P = flat_weights(model)
    gradient_P = FullBatchReference(model, loss_fn).gradient(2 * weights_P, batch)
    assert gradient_P.dtype == torch.float64
    assert torch.equal(flat_weights(model), weights_P)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize(("micro_batch", "num_bytes"), [(32, 32 * 3 * 4), (8, 8 * 3 * 4)])
def test_saved_bytes_follow_the_formula(micro_batch: int, num_bytes: int):
    layer, images_BD = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(32, 4)
    with SavedBytes([*layer.parameters(), images_BD]) as saved:
        for part_BD in images_BD.split(micro_batch):
            layer(part_BD).sum().backward()
    assert saved.peak == num_bytes  # tanh saves its output; the linear layer its input and weight, which do not count


def test_saved_bytes_count_a_storage_once_and_only_while_it_lives():
    x_B = torch.randn(10, requires_grad=True)
    with SavedBytes([]) as saved:
        (x_B * x_B).sin().sum().backward()  # `*` saves x twice, `sin` saves the product
        (x_B * x_B).sum().backward()
    assert saved.peak == 2 * 10 * 4


def test_saved_bytes_leave_gradients_as_they_are():
    gradients = []
    for excluded in (None, []):
        model, batch = make_model(seed=0), (torch.ones(5, 1, 8, 8), torch.arange(5))
        if excluded is None:
            loss_fn(model, batch).backward()
        else:
            with SavedBytes(excluded):
                loss_fn(model, batch).backward()
        gradients.append(flat_gradient(model))
    assert torch.equal(*gradients)


# --- the job ---------------------------------------------------------------------------------------------------------


def test_run_writes_everything(report: DemoReport):
    out = report.options.out
    assert {path.name for path in out.iterdir()} == FILES == {path.name for path in report.files}
    assert (report.exit_code, report.stopped_early) == (0, False)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))


def test_results_are_what_was_measured(report: DemoReport):
    results = json.loads((report.options.out / "results.json").read_text())
    assert results == json.loads(json.dumps(report.to_json()))
    ours, full, textbook = results["trainings"]
    assert [training["name"] for training in results["trainings"]] == ["macrobatch", "full batch", "textbook"]
    assert ours["worst_error_full_windows"] <= FP32
    assert ours["worst_error_short_windows"] <= FP32
    assert full["worst_error_short_windows"] <= FP32
    assert textbook["worst_error_full_windows"] <= FP32
    assert textbook["worst_error_short_windows"] > 0.3
    assert ours["saved_bytes"] * 16 == pytest.approx(full["saved_bytes"], rel=1e-3)
    assert ours["losses"] == pytest.approx(full["losses"], rel=1e-3)  # the same training, but for rounding
    assert textbook["losses"][-1] < 0.7 * full["losses"][-1]  # reports too little on the short window
    assert [len(training["test_accuracies"]) for training in results["trainings"]] == [1, 1, 1]


def test_page_needs_nothing_else(report: DemoReport):
    page = (report.options.out / "index.html").read_text("utf-8")
    assert len(page) < 1_000_000
    sources = re.findall(r'(?:src|srcset|href|url)\s*[=(]\s*"?([^">)]{0,40})', page)
    assert len(sources) == 8  # four pictures, light and dark
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "prefers-color-scheme: dark" in page
    assert "stopped early" not in page.lower()
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)  # every placeholder is filled in
    for name in ("index.html", "results.json"):
        assert str(report.options.out.parent) not in (report.options.out / name).read_text("utf-8")


def test_ctrl_c_writes_what_was_finished(
    report: DemoReport,
    tmp_path: Path,
    sigint: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def interrupted(digits: Digits, options: DemoOptions, recorder: Recorder) -> None:
        signal.raise_signal(signal.SIGINT)
        train_full_batch(digits, options, recorder)

    monkeypatch.setitem(job.TRAININGS, "full batch", interrupted)
    (tmp_path / "memory.png").write_text("of an earlier run")
    stopped = run(DemoOptions(epochs=1, out=tmp_path), console=Console(width=120))
    assert (stopped.exit_code, stopped.stopped_early) == (130, True)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped_early"]
    ours, full = results["trainings"]
    assert ours["is_complete"]
    assert ours["losses"] == report.trainings["macrobatch"].losses  # to the bit: the seed decides everything
    assert (full["is_complete"], len(full["losses"])) == (False, 1)
    assert "Stopped early: this is what was finished" in (tmp_path / "index.html").read_text("utf-8")
    assert not list(tqdm._instances)  # pyright: ignore[reportAttributeAccessIssue] - every bar is closed
    printed = capsys.readouterr()
    assert printed.err.endswith("\n")  # and has left its line
    assert printed.out.endswith(f"Stopped early; what was finished is in {tmp_path / 'index.html'}\n")


def test_ctrl_c_before_anything_was_made(tmp_path: Path, sigint: None, monkeypatch: pytest.MonkeyPatch):
    def interrupted() -> Digits:
        signal.raise_signal(signal.SIGINT)
        return load_digits()

    monkeypatch.setattr(job, "load_digits", interrupted)
    (tmp_path / "loss.png").write_text("of an earlier run")
    stopped = run(DemoOptions(epochs=1, out=tmp_path), console=Console(quiet=True))
    assert stopped.exit_code == 130
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "results.json"}


def test_interrupt_from_elsewhere_is_a_stop_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted() -> Digits:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "load_digits", interrupted)
    stopped = run(DemoOptions(epochs=1, out=tmp_path), console=Console(quiet=True))
    assert (stopped.exit_code, stopped.stopped_early) == (130, True)


def test_second_ctrl_c_gives_up_and_leaves_the_folder_alone(
    tmp_path: Path, sigint: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*args: object) -> None:
        for seconds in (10.0, 20.0):
            monkeypatch.setattr("time.monotonic", lambda seconds=seconds: seconds)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(job.TRAININGS, "macrobatch", interrupted)
    (tmp_path / "index.html").write_text("of an earlier run")
    stopped = run(DemoOptions(epochs=1, out=tmp_path))
    assert (stopped.exit_code, stopped.num_presses, stopped.files) == (130, 2, [])
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "of an earlier run"
    assert capsys.readouterr().out == f"Stopped; nothing was written into {tmp_path}\n"


def test_presses(sigint: None, monkeypatch: pytest.MonkeyPatch):
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    with Interrupts() as interrupts:
        interrupts.pause()
        for now_s in (10.0, 10.1, 10.2):  # noqa: B007 - read by the clock above
            signal.raise_signal(signal.SIGINT)  # three at once are one
        assert interrupts.num_presses == 1
        with pytest.raises(KeyboardInterrupt):
            interrupts.pause()
        now_s = 20.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.seal()
        now_s = 30.0
        signal.raise_signal(signal.SIGINT)
        assert interrupts.num_presses == 3


def test_ignored_ctrl_c_stays_ignored(sigint: None):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
    assert interrupts.num_presses == 0
    assert signal.signal(signal.SIGINT, signal.default_int_handler) == signal.SIG_IGN


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_package_says_how_to_get_it(module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"run: pip install {package}\."):
        run(DemoOptions(out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 0},
        {"macro_batch": 2.5},
        {"micro_batch": True},
        {"micro_batch": 257},
        {"num_threads": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
    ],
    ids=str,
)
def test_option_out_of_its_domain_is_refused(given: dict[str, Any]):
    with pytest.raises(ArgumentError, match=f"^{next(iter(given))}: given {next(iter(given.values()))}; expected"):
        DemoOptions(**given)


def test_macro_batch_beyond_the_training_set_is_refused(tmp_path: Path):
    with pytest.raises(ArgumentError, match="macro_batch: given 1438; expected at most the 1437 samples"):
        run(DemoOptions(macro_batch=1438, out=tmp_path))


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ArgumentError, match=r"out: given .*; expected a folder"):
            run(DemoOptions(out=out))
