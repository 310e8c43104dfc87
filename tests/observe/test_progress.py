"""The progress bar: what it shows, when it looks, and that it cleans up."""

from __future__ import annotations

import gc
import io
import re
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import macrobatch as mb
from macrobatch.core.events import Event
from macrobatch.errors import ArgumentError
from macrobatch.observe import progress
from macrobatch.observe.progress import open_bar

ALWAYS_S = 1e-9  # less than any clock can tell: the bar is refreshed after every window
NEVER_S = 1e9


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=clock))
    return clock


def open_bars() -> set[Any]:
    return set(vars(tqdm)["_instances"])


@pytest.fixture(autouse=True)
def _no_bar_is_left_open() -> Iterator[None]:
    """Whatever a test does to the loop."""
    before = open_bars()
    yield
    assert open_bars() <= before


def make_step(loss_fn: Any = None, *, lr: float = 0.1, **options: Any) -> mb.TrainStep:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return mb.TrainStep(
        model, optimizer, loss_fn or (lambda model, x: model(x).square().mean()), micro_batch=2, **options
    )


def batches(num: int, num_rows: int = 4) -> list[Tensor]:
    return [torch.full((num_rows, 2), float(i + 1)) for i in range(num)]


TEXT = re.compile(
    r"(?:loss=(?P<loss>[^ ,]+), )?(?:lr=(?P<lr>[^ ,]+), )?(?P<rate>[^ ,]+) (?P<unit>samples|tokens)/s, "
    r"(?P<memory>[^ ,]+)B(?:, (?P<skipped>\d+) skipped)?"
)


def shown(file: io.StringIO) -> list[dict[str, str | None]]:
    """What stood behind the bar, refresh by refresh, where it changed by more than memory; None for what did not."""
    texts: list[dict[str, str | None]] = []
    for line in re.findall(r"(?:window/s|s/window), (.*?)\]", file.getvalue()):
        match = TEXT.fullmatch(line)
        assert match is not None, line
        if not texts or texts[-1] | {"memory": match["memory"]} != match.groupdict():
            texts.append(match.groupdict())
    return texts


def is_closed(file: io.StringIO) -> bool:
    return file.getvalue().endswith("\n")  # a bar that is left standing ends its line when it closes


# --- the text ---


def test_bar_shows_loss_learning_rate_throughput_and_memory(clock: Clock):
    step, file, losses = make_step(lr=0.25), io.StringIO(), []
    for batch in mb.track(batches(3), step, file=file, refresh_s=ALWAYS_S):
        losses.append(f"{step(batch).loss:.4g}")
        clock.now_s += 1
    texts = shown(file)
    assert [text["loss"] for text in texts] == losses
    assert len(set(losses)) == 3
    for text in texts:
        assert (text["lr"], text["rate"], text["unit"], text["skipped"]) == ("0.25", "4", "samples", None)
        assert re.fullmatch(r"\d+(\.\d+)?[kMGT]?", str(text["memory"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the accelerator's memory instead")
def test_bar_memory_is_the_process_peak_in_bytes(clock: Clock):
    step, file = make_step(), io.StringIO()
    for batch in mb.track(batches(1), step, file=file, refresh_s=ALWAYS_S):
        step(batch)
        clock.now_s += 1
    match = re.fullmatch(r"([\d.]+)([kMG])", str(shown(file)[-1]["memory"]))
    assert match is not None
    megabytes = float(match[1]) * {"k": 1e-3, "M": 1, "G": 1e3}[match[2]]
    assert 50 < megabytes < 100_000  # torch alone needs more than 50 MB, and no test has 100 GB


def test_bar_follows_the_scheduler(clock: Clock):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = mb.TrainStep(model, optimizer, lambda m, x: m(x).mean(), micro_batch=2, scheduler=scheduler)
    file = io.StringIO()
    for batch in mb.track(batches(3), step, file=file, refresh_s=ALWAYS_S):
        step(batch)
        clock.now_s += 1
    assert [text["lr"] for text in shown(file)] == ["0.5", "0.25", "0.125"]


def test_bar_counts_skipped_windows(clock: Clock):
    step, file = make_step(lambda model, x: mb.Loss(model(x).sum(), int(x[0, 0] % 2))), io.StringIO()
    for batch in mb.track(batches(5), step, file=file, refresh_s=ALWAYS_S):
        step(batch)
        clock.now_s += 1
    assert [text["skipped"] for text in shown(file)] == [None, "1", "1", "2", "2"]


def test_bar_without_skipped_windows_says_nothing_of_them():
    step, file = make_step(), io.StringIO()
    for batch in mb.track(batches(1), step, file=file, refresh_s=ALWAYS_S):
        step(batch)
    assert "skipped" not in file.getvalue()


def test_bar_without_a_step_shows_samples_and_memory_only(clock: Clock):
    file = io.StringIO()
    for _ in mb.track(batches(2, num_rows=6), file=file, refresh_s=ALWAYS_S):
        clock.now_s += 2
    (text,) = shown(file)
    del text["memory"]
    assert text == {"loss": None, "lr": None, "rate": "3", "unit": "samples", "skipped": None}


def test_bar_options_go_to_tqdm():
    file = io.StringIO()
    assert list(mb.track(iter(batches(2)), file=file, desc="epoch 1", total=7)) != []
    assert "epoch 1: " in file.getvalue()
    assert "2/7" in file.getvalue()


@pytest.mark.parametrize("make", [list, iter], ids=["sized", "not sized"])
def test_bar_knows_the_length_of_a_loader_that_has_one(make):
    file = io.StringIO()
    assert len(list(mb.track(make(batches(3)), file=file))) == 3
    assert ("3/3" in file.getvalue()) is (make is list)


def test_bar_takes_a_loader_that_does_not_know_its_length():
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.ones(6, 2))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert len(list(mb.track(loader, file=io.StringIO()))) == 3


@pytest.mark.parametrize("end", ["loader", "break", "exception"])
@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_bar_shows_the_last_state_at_the_end(clock: Clock, unit, end):
    step, file, losses = make_step(), io.StringIO(), []

    def train() -> None:
        for i, batch in enumerate(mb.track(batches(3), step, unit=unit, file=file, refresh_s=NEVER_S)):
            losses.append(f"{step(batch).loss:.4g}")
            clock.now_s += 2
            if i == 1 and end == "break":
                break
            if i == 1 and end == "exception":
                raise KeyError("the user's own")

    with pytest.raises(KeyError) if end == "exception" else nullcontext():
        train()
    (text,) = shown(file)
    assert len(losses) == (3 if end == "loader" else 2)
    assert (text["loss"], text["rate"], text["unit"]) == (losses[-1], "2", unit)


# --- terminals and files ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminals_bar_is_written_over(clock: Clock):
    step, file = make_step(), Terminal()
    for batch in mb.track(batches(3), step, file=file, refresh_s=ALWAYS_S):
        step(batch)
        clock.now_s += 1
    assert file.getvalue().count("\r") > 3
    assert file.getvalue().count("\n") == 1
    assert "100%" in file.getvalue()


def test_a_file_gets_plain_lines(clock: Clock):
    """One for each refresh, and one at the end: no carriage return, no escape sequence, no bar, no empty line."""
    step, file = make_step(), io.StringIO()
    for batch in mb.track(batches(3), step, file=file, desc="epoch 1", refresh_s=1.5):
        step(batch)
        clock.now_s += 1
    lines = file.getvalue().splitlines()
    assert [line.partition(" [")[0] for line in lines] == ["epoch 1: 2/3", "epoch 1: 3/3"]
    assert all("loss=" in line and line.isprintable() and "|" not in line for line in lines)


@pytest.mark.parametrize(("make", "num_looks"), [(Terminal, 3), (io.StringIO, 1)], ids=["terminal", "file"])
def test_looks_are_rare_without_a_terminal(clock: Clock, make, num_looks):
    step, file = make_step(nonfinite="ignore"), make()
    with Reads() as reads:
        for batch in mb.track(batches(3), step, file=file):
            step(batch)
            clock.now_s += 11
    assert len(shown(file)) == num_looks
    assert reads.num == 2 * num_looks  # the losses of two micro-batches


def test_bars_within_bars_are_lines_too():
    file = io.StringIO()
    for _ in mb.track(batches(2), file=file, desc="outer"):
        for _ in open_bar(batches(2), file=file, desc="inner"):
            pass
    lines = file.getvalue().splitlines()
    assert [line.partition(" [")[0] for line in lines] == ["inner: 2/2", "inner: 2/2", "outer: 2/2"]
    assert all(map(str.isprintable, lines))


# --- counting ---


def test_samples_per_second_count_every_row_since_the_start(clock: Clock):
    step, file = make_step(), io.StringIO()
    for batch in mb.track(batches(4, num_rows=6), step, file=file, refresh_s=1.5):
        step(batch)
        clock.now_s += 1
    texts = shown(file)
    assert [(text["rate"], text["unit"]) for text in texts] == [("6", "samples")] * 2  # 12 rows in 2 s, 24 in 4 s
    assert len({text["loss"] for text in texts}) == 2


def test_tokens_per_second_count_every_weight_once(clock: Clock):
    """Refreshed every second window or so; the windows in between count as well."""
    step = make_step(lambda model, x: mb.Loss(model(x).sum(), 10 * len(x) * int(x[0, 0])))
    file = io.StringIO()
    losses = []
    for batch in mb.track(batches(5), step, unit="tokens", file=file, refresh_s=1.5):
        losses += [f"{step(batch).loss:.4g}"]
        clock.now_s += 1
    # Window i weighs 40 i: 40 + 80 in 2 s, ... + 120 + 160 in 4 s; at the end ... + 200 in 5 s.
    assert [text["rate"] for text in shown(file)] == ["60", "100", "120"]
    assert [text["loss"] for text in shown(file)] == [losses[1], losses[3], losses[4]]
    assert len(set(losses)) == 5


def test_tokens_on_the_device_are_counted(clock: Clock):
    step = make_step(lambda model, x: mb.Loss(model(x).sum(), torch.tensor(5 * len(x))))
    file = io.StringIO()
    for batch in mb.track(batches(2), step, unit="tokens", file=file, refresh_s=ALWAYS_S):
        step(batch)
        clock.now_s += 1
    assert [(text["rate"], text["unit"]) for text in shown(file)] == [("20", "tokens")] * 2


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (1234, "1.23k"),
        (2_500_000, "2.5M"),
        (3e9, "3G"),
        (4e12, "4T"),
        (5e14, "500T"),
        (4e15, "4e+03T"),  # there is no prefix beyond
        pytest.param(999.9, "1k"),
        pytest.param(999_900, "1M"),
    ],
)
def test_rates_are_short(clock: Clock, rate: float, text: str):
    step, file = make_step(lambda model, x: mb.Loss(model(x).sum(), rate / 2)), io.StringIO()
    for batch in mb.track(batches(1), step, unit="tokens", file=file, refresh_s=ALWAYS_S):
        step(batch)  # two micro-batches
        clock.now_s += 1
    assert shown(file)[0]["rate"] == text


def test_rate_beyond_all_prefixes_does_not_end_the_loop(clock: Clock):
    step, file = make_step(lambda model, x: mb.Loss(model(x).sum(), 1e6)), io.StringIO()
    for batch in mb.track(batches(1), step, unit="tokens", file=file, refresh_s=NEVER_S):
        step(batch)  # and the clock stands still: 2 million in 0 s, counted as a nanosecond
    assert shown(file)[-1]["rate"] == "2e+03T"


# --- when it looks ---


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value was read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_reads_are_counted():
    with Reads() as reads:
        torch.ones(()).item()
        float(torch.ones(()))
    assert reads.num == 2


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_no_tensor_is_read_between_refreshes(unit):
    step = make_step(
        lambda model, x: mb.Loss(model(x).square().sum(), torch.tensor(len(x))), nonfinite="ignore", clip_norm=1.0
    )
    with Reads() as reads:
        for batch in mb.track(batches(5), step, unit=unit, file=io.StringIO(), refresh_s=NEVER_S):
            step(batch)
            assert reads.num == 0


def test_a_refresh_reads_the_last_window_only(clock: Clock):
    """Two micro-batches, a loss and a weight each."""
    step = make_step(lambda model, x: mb.Loss(model(x).square().sum(), torch.tensor(len(x))), nonfinite="ignore")
    with Reads() as reads:
        for i, batch in enumerate(mb.track(batches(6), step, file=io.StringIO(), refresh_s=2.5)):
            assert reads.num == 4 * (i // 3)
            step(batch)
            clock.now_s += 1


def test_a_disabled_bar_reads_and_writes_nothing():
    step, file = make_step(nonfinite="ignore"), io.StringIO()
    with Reads() as reads:
        for batch in mb.track(batches(3), step, file=file, refresh_s=ALWAYS_S, disable=True):
            assert step.listeners == []
            step(batch)
    assert reads.num == 0
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("unit", "disable"),
    [
        ("samples", True),
        ("samples", False),
        ("tokens", True),
    ],
)
def test_results_are_not_kept_for_a_bar_that_does_not_show_them(unit, disable):
    step, before = make_step(), num_results()
    loader = [torch.ones(2, 2)] * 10
    for i, batch in enumerate(
        mb.track(loader, step, unit=unit, file=io.StringIO(), refresh_s=NEVER_S, disable=disable)
    ):
        step(batch)
        if i + 1 == len(loader):
            assert num_results() <= before + 1  # of the loss, the last one is enough


def test_tokens_are_counted_at_the_latest_every_64_windows(clock: Clock):
    """So that a bar that is hardly ever refreshed does not keep every result."""
    step = make_step(
        lambda model, x: mb.Loss(model(x).square().sum(), torch.tensor(5 * len(x))), lr=1e-3, nonfinite="ignore"
    )
    file, before, nums = io.StringIO(), num_results(), []
    loader = [torch.ones(2, 2)] * 130
    with Reads() as reads:
        for i, batch in enumerate(mb.track(loader, step, unit="tokens", file=file, refresh_s=NEVER_S)):
            nums.append(reads.num)
            if i in (63, 127, 129):
                assert num_results() <= before + 64
            step(batch)
            clock.now_s += 1
    assert not any(nums[:64])
    assert nums[64] > 0
    assert set(nums[64:128]) == {nums[64]}
    assert set(nums[128:]) == {2 * nums[64]}
    assert shown(file)[-1]["rate"] == "10"  # each window once: 130 × 10 in 130 s


def num_results() -> int:
    return sum(type(thing) is mb.StepResult for thing in gc.get_objects())


# --- the loop ---


def test_track_yields_the_loaders_own_batches_in_order():
    loader = batches(4)
    tracked = list(mb.track(loader, file=io.StringIO()))
    assert [id(batch) for batch in tracked] == [id(batch) for batch in loader]


def test_track_draws_a_batch_only_when_it_is_asked_for():
    drawn: list[int] = []

    def loader() -> Iterator[Tensor]:
        for i, batch in enumerate(batches(3)):
            drawn.append(i)
            yield batch

    for i, _ in enumerate(mb.track(loader(), file=io.StringIO())):
        assert drawn == list(range(i + 1))


def test_track_changes_nothing_about_training():
    weights = []
    for wrap in (lambda loader, step: loader, lambda loader, step: mb.track(loader, step, file=io.StringIO())):
        step = make_step()
        for batch in wrap(batches(3), step):
            step(batch)
        weights.append(step.optimizers[0].param_groups[0]["params"][0].detach().clone())
    assert torch.equal(*weights)


def test_end_of_the_loader_closes_the_bar_and_removes_the_listener():
    step, file, others = make_step(), io.StringIO(), []
    step.listeners.append(others.append)
    for batch in mb.track(batches(2), step, file=file):
        assert len(step.listeners) == 2
        step(batch)
    assert is_closed(file)
    assert step.listeners == [others.append]


def test_break_closes_the_bar_and_removes_the_listener():
    step, file = make_step(), io.StringIO()
    for batch in mb.track(batches(5), step, file=file):
        step(batch)
        break
    assert is_closed(file)
    assert step.listeners == []


def test_exception_in_the_loop_closes_the_bar_and_removes_the_listener():
    step, file = make_step(), io.StringIO()

    def train() -> None:
        for batch in mb.track(batches(5), step, file=file):
            step(batch)
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        train()
    assert is_closed(file)
    assert step.listeners == []


def test_exception_in_the_loader_closes_the_bar_and_removes_the_listener():
    step, file = make_step(), io.StringIO()

    def loader() -> Iterator[Tensor]:
        yield batches(1)[0]
        raise OSError("disk")

    def train() -> None:
        for batch in mb.track(loader(), step, file=file):
            step(batch)

    with pytest.raises(OSError, match="disk"):
        train()
    assert is_closed(file)
    assert step.listeners == []


def test_close_of_the_iterator_closes_the_bar_and_removes_the_listener():
    step, file = make_step(), io.StringIO()
    tracked = mb.track(batches(5), step, file=file)
    step(next(tracked))
    assert not is_closed(file)
    tracked.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert is_closed(file)
    assert step.listeners == []


def test_track_that_is_never_started_listens_to_nothing():
    step = make_step()
    tracked = mb.track(batches(2), step, file=io.StringIO())
    assert step.listeners == []
    del tracked


def test_tracks_may_be_nested():
    step, outer, inner = make_step(), io.StringIO(), io.StringIO()
    for batch in mb.track(batches(2), step, file=outer):
        step(batch)
        for _ in mb.track(batches(1), file=inner):
            assert len(step.listeners) == 1
        assert is_closed(inner)
        assert not is_closed(outer)
    assert is_closed(outer)
    assert step.listeners == []


def test_other_listeners_hear_everything_while_a_bar_follows():
    events: list[Event] = []
    step = make_step(listeners=[events.append])
    for batch in mb.track(batches(2), step, file=io.StringIO()):
        step(batch)
    assert [type(event) for event in events] == [mb.MicroBatchDone, mb.MicroBatchDone, mb.Updated] * 2


def test_bar_without_a_step_goes_on_at_an_empty_share():
    assert len(list(mb.track([torch.ones(2, 2), None, torch.ones(3, 2)], file=io.StringIO()))) == 3


# --- bad input ---


@pytest.mark.parametrize("unit", ["sample", "", None, 3])
def test_unit_unknown_is_refused_at_the_call(unit):
    with pytest.raises(ArgumentError, match=r'unit: given .*"samples" or "tokens"'):
        mb.track(batches(1), unit=unit)


@pytest.mark.parametrize("refresh_s", [0, -1, "soon", True, float("nan")])
def test_refresh_out_of_domain_is_refused_at_the_call(refresh_s):
    with pytest.raises(ArgumentError, match="refresh_s"):
        mb.track(batches(1), refresh_s=refresh_s, file=io.StringIO())


def test_step_that_is_something_else_is_refused_at_the_call():
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="step"):
        mb.track(batches(1), optimizer, file=io.StringIO())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("loader", [None, 3], ids=str)
def test_what_cannot_be_iterated_is_refused_at_the_call(loader: Any):
    with pytest.raises(ArgumentError, match=f"loader: given {loader}; expected an iterable of macro-batches"):
        mb.track(loader)
