"""`micro_batch="auto"` with a capture: sizes are tried in the way in which they are going to be run."""

from __future__ import annotations

import io
import itertools
import logging
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.profiler import profile

import macrobatch as mb
import macrobatch.plan.rehearsal
from macrobatch.plan.capture import Compiled
from macrobatch.plan.graphs import Graphs
from macrobatch.plan.memory import HostMemory
from macrobatch.plan.picture import print_survey
from macrobatch.plan.rehearsal import Rehearsal
from macrobatch.testing.reference import full_batch_gradient, gradients_of, relative_error
from tests.plan.tape import Tape

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch.compile's own
    pytest.mark.xdist_group("compile"),  # in one worker, which alone imports and warms up the compiler
]

ROWS, WIDTH = 240, 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MACROBATCH_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()


def batch_of(num_rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_rows, WIDTH, generator=generator)
    return x, torch.randint(0, 4, (num_rows,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, 4))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Clock:
    """Time as the loss functions of these tests have it pass, whatever else this machine does: each reading takes a
    millisecond, and `wait` as long as it is told, in compiled code too."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 0.001
        return self.now_s

    @torch.compiler.disable
    def wait(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """What sizes are timed by."""
    clock = Clock()
    monkeypatch.setattr(macrobatch.plan.rehearsal, "time", clock)
    return clock


def through_operators(patch: pytest.MonkeyPatch) -> None:
    """Compiled code is traced and differentiated ahead, and then run by PyTorch's own operators: to find out which of
    several is chosen, none of them need go through a C++ compiler."""
    original = torch.compile
    patch.setattr(torch, "compile", lambda loss_fn, **_: original(loss_fn, dynamic=False, backend="aot_eager"))


@pytest.fixture
def no_inductor(monkeypatch) -> None:
    through_operators(monkeypatch)


@pytest.fixture
def slow_eagerly(clock) -> Any:
    """A loss that takes longer for more than 100 samples, unless it is compiled."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            clock.wait(0.1 if len(batch[0]) > 100 else 0.01)
        return mean_loss(model, batch)

    return loss_fn


def build(loss_fn: Any, capture: Any, **options: Any) -> tuple[nn.Module, mb.TrainStep]:
    model = network()
    options.setdefault("micro_batch", "auto")
    return model, mb.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, capture=capture, **options)


@pytest.mark.usefixtures("no_inductor")
def test_sizes_of_a_compiled_step_are_measured_compiled(slow_eagerly):
    _, step = build(slow_eagerly, "compile")
    step(batch_of())
    survey = step.split.survey
    timed = [trial.size for trial in survey.trials if trial.seconds is not None]
    assert len(timed) <= 3, "each of them has to be compiled"
    assert survey.size > 100
    _, eager = build(slow_eagerly, None)
    eager(batch_of())
    assert eager.split.survey.size <= 100, "the control"


def test_auto_compiles_where_that_is_clearly_faster(caplog, slow_eagerly):
    for turn in range(2):
        model, step = build(slow_eagerly, "auto")
        model.eval()  # without dropout, any split has one gradient
        batch = batch_of()
        with caplog.at_level(logging.INFO, logger="macrobatch"):
            step(batch)
        assert isinstance(step._step.loss_fn, Compiled)
        assert step._step.loss_fn.is_compiled
        assert step.split.survey.compiled_s is not None
        assert relative_error(gradients_of(model), full_batch_gradient(model, mean_loss, batch)) <= 1e-6
        (line,) = [record.message for record in caplog.records]
        assert ", compiled;" in line
        assert (" compiled)" in line) == (turn == 0), "which sizes were tried so"
        assert ("as remembered" in line) == (turn == 1)
        caplog.clear()


@pytest.mark.usefixtures("no_inductor")
def test_auto_compiles_sizes_that_are_close_and_takes_the_fastest(clock):
    """Of this one, all at once is fastest as it is, and half of it when it is compiled."""

    def slow_eagerly_and_at_once(model: nn.Module, batch: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            clock.wait(0.008 + 0.2 * len(batch[0]) / ROWS)
        elif len(batch[0]) > ROWS / 2:
            clock.wait(0.1)
        return mean_loss(model, batch)

    _, eager = build(slow_eagerly_and_at_once, None)
    eager(batch_of())
    assert eager.split.survey.size == ROWS, "the control"
    _, step = build(slow_eagerly_and_at_once, "auto")
    step(batch_of())
    assert isinstance(step._step.loss_fn, Compiled)
    assert step.split.survey.size == ROWS / 2
    assert step.split.survey.seconds == step.split.survey.compiled_s
    compiled = {trial.size for trial in step.split.survey.trials if trial.compiled_s is not None}
    assert {ROWS, ROWS / 2} <= compiled
    assert len(compiled) <= 3
    for survey, expected in ((step.split.survey, True), (eager.split.survey, False)):
        text = io.StringIO()
        print_survey(survey, Console(file=text, width=80))
        assert ("compiled," in text.getvalue().partition("chosen")[0]) == expected
        assert "…" not in text.getvalue()


@pytest.mark.usefixtures("no_inductor")
def test_auto_compiles_nothing_if_a_size_disagrees_that_is_tried_after_another_has_won(clock):
    def wrong_in_halves(model: nn.Module, batch: Any) -> Tensor:
        loss = mean_loss(model, batch)
        if torch.compiler.is_compiling():
            return loss if len(batch[0]) > ROWS / 2 else 1.5 * loss
        clock.wait(0.008 + 0.2 * len(batch[0]) / ROWS)
        return loss

    model, step = build(wrong_in_halves, "auto")
    model.eval()
    step(batch_of())
    survey = step.split.survey
    compiled = {trial.size: trial.compiled_s for trial in survey.trials if trial.compiled_s is not None}
    assert compiled[ROWS] < 0.2, "the control: it had won"
    assert compiled[ROWS / 2] == float("inf")
    assert (survey.size, survey.compiled_s, step._step.loss_fn) == (ROWS, None, wrong_in_halves)
    assert relative_error(gradients_of(model), full_batch_gradient(model, mean_loss, batch_of())) <= 1e-6


def test_auto_draws_the_random_numbers_that_eager_code_draws(slow_eagerly):
    model, step = build(slow_eagerly, "auto")
    torch.manual_seed(3)
    step(batch_of())
    assert isinstance(step._step.loss_fn, Compiled)
    found = gradients_of(model)
    other, eager = build(mean_loss, None, micro_batch=step.split.size)
    torch.manual_seed(3)
    eager(batch_of())
    assert relative_error(found, gradients_of(other)) <= 1e-6  # another mask would be off by tenths
    torch.manual_seed(4)
    eager(batch_of())
    assert relative_error(found, gradients_of(other)) > 1e-2, "the control"


@pytest.mark.usefixtures("no_inductor")
def test_auto_does_not_trust_a_compiled_function_that_disagrees(caplog, slow_eagerly):
    def changes(model: nn.Module, batch: Any) -> Tensor:
        return slow_eagerly(model, batch) * (1.5 if torch.compiler.is_compiling() else 1.0)

    model, step = build(changes, "auto")
    model.eval()
    with caplog.at_level(logging.WARNING, logger="macrobatch"):
        step(batch_of())
    assert not isinstance(step._step.loss_fn, Compiled)
    assert relative_error(gradients_of(model), full_batch_gradient(model, mean_loss, batch_of())) <= 1e-6
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("capture: is not compiled, since its gradient is 5.0e-01 from that of the code")


@pytest.mark.usefixtures("no_inductor")
def test_auto_stays_eager_where_compiling_gains_nothing(caplog, clock):
    def fast_eagerly(model: nn.Module, batch: Any) -> Tensor:
        if torch.compiler.is_compiling():
            clock.wait(0.001)
        return mean_loss(model, batch)

    _, step = build(fast_eagerly, "auto")
    with caplog.at_level(logging.INFO, logger="macrobatch"):
        step(batch_of())
    assert step._step.loss_fn is fast_eagerly
    assert step.split.survey.compiled_s is None
    compiled = [trial.size for trial in step.split.survey.trials if trial.compiled_s is not None]
    assert len(compiled) == 1, "the first has shown that it does not pay"
    assert caplog.records[-1].message.endswith(f", {compiled[0]} compiled in vain)")


def test_sizes_of_recorded_steps_are_measured_replayed_and_in_twice_the_memory():
    sizes = {}
    for name, graphs in (("eager", None), ("recorded", Graphs(Tape()))):
        with HostMemory() as memory:
            _, step = build(mean_loss, graphs, micro_batch=mb.Auto(memory=memory, remembers=False, memory_fraction=1.0))
            memory.limit_bytes = memory.num_bytes + 150_000
            step.split.cut(batch_of(2000))
        sizes[name] = step.split.survey.largest
        if graphs is not None:
            assert graphs._recorder.num_replays > 0
            assert graphs.num_recordings == 0, "of what was tried, nothing is kept"
    assert 0.4 * sizes["eager"] <= sizes["recorded"] <= 0.6 * sizes["eager"]


def test_copies_of_the_gradients_that_verification_makes_are_counted():
    """Here weights have far more numbers than a micro-batch, so they are what a window takes."""
    peaks: dict[bool, tuple[int, int]] = {}
    width, rows = 400, 4
    for verifies in (False, True):
        with HostMemory() as memory:
            model = nn.Linear(width, width)
            graphs = Graphs(Tape(), verifies=verifies)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            step = mb.TrainStep(
                model, optimizer, lambda model, x: model(x).square().mean(), micro_batch=rows, capture=graphs
            )
            x = torch.randn(3 * rows, width)
            predicted = Rehearsal(step._step, memory, None).peak_bytes(x[:rows])
            assert predicted is not None
            with memory.measured() as peak:
                for _ in range(3):
                    step(x)
            assert graphs.num_recordings == 1
        peaks[verifies] = predicted, peak.num_bytes
        # A tape keeps each result within a micro-step where a graph uses the memory again: some ten of this size.
        assert abs(predicted - peak.num_bytes) <= 10 * rows * width * 4
    gradient_bytes = (width + 1) * width * 4
    assert peaks[True][1] - peaks[False][1] >= 2 * gradient_bytes, "the control: they are made"


def test_memory_is_measured_eagerly_though_compiled_code_takes_less():
    """The line has more sizes than are compiled, and the eager run is what a graph is compared with."""
    ran_eagerly: set[int] = set()

    def chain(model: nn.Module, batch: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            ran_eagerly.add(len(batch[0]))
        hidden = model(batch[0])
        for _ in range(8):
            hidden = hidden.tanh() * hidden.exp().sigmoid()
        return hidden.square().mean()

    with pytest.MonkeyPatch.context() as patch:
        through_operators(patch)
        _, step = build(chain, "compile")
    step.split.cut(batch_of())
    tried = {trial.size for trial in step.split.survey.trials if trial.peak_bytes is not None}
    timed = {trial.size for trial in step.split.survey.trials if trial.seconds is not None}
    assert ran_eagerly == tried
    assert timed < tried, "only these were compiled"
    model, batch = network(), batch_of()
    loss_fn = Compiled(chain)
    peaks = [allocated_at_once(model, run, batch) for run in (chain, loss_fn)]
    assert loss_fn.is_compiled
    assert peaks[1] < peaks[0] / 2, "seventeen results of the chain against what begins it"


def allocated_at_once(model: nn.Module, loss_fn: Any, batch: Any) -> int:
    """Bytes, as the profiler sees them: compiled code does not ask PyTorch's operators for memory."""
    for _ in range(2):
        loss_fn(model, batch).backward()
    with profile(profile_memory=True) as profiled:
        loss_fn(model, batch).backward()
    assert profiled.kineto_results is not None
    changes = [event.nbytes() for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def test_the_smallest_size_is_taken_if_memory_runs_out_whenever_it_is_timed():
    def greedy(model: nn.Module, batch: Any) -> Tensor:
        nonlocal num_calls
        num_calls += is_timed()
        if is_timed():
            raise torch.OutOfMemoryError("out of memory")
        return mean_loss(model, batch)

    def is_timed() -> bool:
        return any(frame.name == "seconds" for frame in traceback.extract_stack())

    num_calls = 0
    _, step = build(greedy, None)
    step(batch_of())
    survey = step.split.survey
    timed = [trial.size for trial in survey.trials if trial.seconds is not None]
    assert num_calls > 0
    assert survey.largest == ROWS
    assert survey.size == step.split.size == min(timed)
