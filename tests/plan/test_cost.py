"""The arithmetic of windows over ranks: known cases, monotonicity, and what was measured on two GPUs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from macrobatch.cli import main
from macrobatch.errors import ArgumentError
from macrobatch.plan.command import POLICIES, ScalingOptions, draw_scaling, print_scaling
from macrobatch.plan.cost import LINKS, Link, StepTime, Training
from macrobatch.plan.picture import print_survey
from macrobatch.plan.survey import Survey, Trial

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FREE = Link(1e30, 0.0)
SHARDED = [name for name in POLICIES if name != "replicas"]


def training(**changes: Any) -> Training:
    settings: dict[str, Any] = {
        "step": StepTime(2e-3, 1e-3),
        "global_batch": 1024,
        "max_micro_batch": 16,
        "gradient_bytes": 400e6,
        "parameter_bytes": 200e6,
    }
    return Training(**(settings | changes))


# --- collectives ---


def test_one_rank_has_nobody_to_talk_to():
    link = Link(1e9, 1.0)
    assert link.all_reduce_s(1e9, 1) == link.gather_s(1e9, 1) == 0


def test_two_ranks_send_half_there_and_half_back():
    assert Link(1e9, 0.0).all_reduce_s(1e9, 2) == pytest.approx(1.0)
    assert Link(1e9, 0.0).gather_s(1e9, 2) == pytest.approx(0.5)


def test_small_messages_go_by_tree_and_large_ones_by_ring():
    link = Link(1e9, 1e-3)
    assert link.all_reduce_s(0, 1024) == pytest.approx(2 * 10 * 1e-3)
    assert link.all_reduce_s(1e12, 4) == pytest.approx(2 * 3 * (1e-3 + 250))


def test_a_hundred_thousand_ranks_cost_hardly_more_than_a_thousand():
    link = LINKS["400g"]
    assert link.all_reduce_s(1e9, 100_000) < 1.05 * link.all_reduce_s(1e9, 1000)


# --- windows ---


def test_without_communication_and_fixed_time_scaling_is_perfect():
    perfect = training(step=StepTime(0.0, 1e-3))
    for world_size in (1, 2, 64, 1024):
        assert perfect.best(FREE, world_size).efficiency == pytest.approx(1.0)


def test_a_window_is_its_micro_steps():
    estimate = training(global_batch=70, update_s=0.5).window(FREE, 2, 16)
    assert estimate.num_micro_batches == 3  # 16 + 16 + 3 of a share of 35
    assert estimate.compute_s == pytest.approx(3 * 2e-3 + 35e-3)
    assert estimate.window_s == pytest.approx(0.041 + 0.5)
    assert estimate.samples_per_s == pytest.approx(70 / 0.541)


def test_only_the_last_backward_hides_the_all_reduce():
    link = Link(400e6 / 0.1, 0.0)  # two ranks: 100 ms
    whole = training(overlap=0.0).window(link, 2, 16)
    hidden = training().window(link, 2, 16)
    assert whole.exposed_s == pytest.approx(0.1)
    assert hidden.exposed_s == pytest.approx(0.1 - 2 / 3 * 18e-3)
    fast = training(num_pieces=20).window(Link(400e6 / 2e-3, 0.0), 2, 16)
    assert fast.exposed_s == pytest.approx(2e-3 / 20)  # the last piece has nothing left to hide under


def test_policies_gather_and_reduce_as_often_as_they_say():
    # No overlap, one piece, two ranks: gathering takes 1 s, reducing 2 s; four micro-batches.
    link, alone = Link(1e9, 0.0), {"overlap": 0.0, "num_pieces": 1, "gradient_bytes": 4e9, "parameter_bytes": 2e9}
    job = {"global_batch": 8, "max_micro_batch": 1, **alone}
    exposed = {name: training(policy=POLICIES[name], **job).window(link, 2, 1).exposed_s for name in SHARDED}
    assert exposed == pytest.approx(
        {"keep-last": 1 + 2, "keep-each": 1 + 4 * 2, "reshard-last": 8 + 2, "reshard-each": 8 + 4 * 2}
    )


def test_launches_are_counted_for_every_piece():
    for name, num_collectives in (("keep-last", 2), ("reshard-each", 3 * 4)):
        job = training(policy=POLICIES[name], global_batch=8, max_micro_batch=1, num_pieces=5, launch_s=1.0)
        assert job.window(FREE, 2, 1).exposed_s == pytest.approx(5 * num_collectives)


def test_best_is_the_fastest_that_fits():
    job = training()
    for world_size in (1, 3, 64, 1000, 4096):
        best = job.best(LINKS["10g"], world_size)
        share = math.ceil(1024 / world_size)
        times = {size: job.window(LINKS["10g"], world_size, size).window_s for size in range(1, min(16, share) + 1)}
        assert best.window_s == min(times.values())
        assert best.micro_batch == min(size for size, time in times.items() if time == best.window_s)


@given(
    st.integers(1, 100_000),
    st.sampled_from([*POLICIES]),
    st.floats(0, 0.1),
    st.floats(1e6, 1e12),
    st.floats(0, 1e-3),
    st.integers(1, 16),
)
@settings(max_examples=200, deadline=None)
def test_nothing_is_faster_than_perfect_and_better_links_never_hurt(
    world, policy, fixed_s, bytes_per_s, latency_s, size
):
    job = training(step=StepTime(fixed_s, 1e-3), policy=POLICIES[policy], global_batch=100_000)
    link = Link(bytes_per_s, latency_s)
    estimate = job.window(link, world, size)
    assert 0 < estimate.efficiency <= 1 + 1e-9
    assert estimate.exposed_s >= 0
    for better in (Link(2 * bytes_per_s, latency_s), Link(bytes_per_s, latency_s / 2)):
        assert job.window(better, world, size).window_s <= estimate.window_s * (1 + 1e-9)


# --- measured: 2 × H200, benchmarks/ranks.py ---


def measured(name: str) -> dict[tuple[str, int], float]:
    """Seconds per window, by contender and micro-batch."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return {(row["name"], row["micro_batch"]): row["window_s"][1] for row in rows if "error" not in row}


def sharded(step_s: float, launch_s: float, policy: str) -> float:
    """A window of the 1.2 B GPT: 32 sequences over 2 ranks in micro-batches of 2, 22 units of FSDP2."""
    num_parameters = 1_215_311_872
    return (
        Training(
            step=StepTime(0.0, step_s / 2),
            global_batch=32,
            max_micro_batch=2,
            gradient_bytes=4 * num_parameters,
            parameter_bytes=2 * num_parameters,
            policy=POLICIES[policy],
            num_pieces=22,
            launch_s=launch_s,
        )
        .window(LINKS["nvlink"], 2, 2)
        .window_s
    )


def test_sharded_policies_as_measured():
    # Two unknowns, the micro-step and the cost of starting a collective, are fitted to our four policies. The three
    # windows by hand, and the order of the policies, are predicted. These windows wait for the host: of one policy, the
    # medians of two turns differed by up to 20 % (keep-last: 85 and 101 k tokens/s), and by hand it took 17 % longer.
    seconds = {name.replace(", reduce ", "-"): value for (name, _), value in measured("ranks-fsdp1b-cuda").items()}
    ours = {policy: seconds[f"macrobatch, {policy}"] for policy in SHARDED}
    by_hand = {policy: seconds[f"FSDP2 by hand, {policy}"] for policy in ("keep-last", "reshard-last")}
    by_hand["reshard-each"] = seconds["torchtitan's default"]

    def misses(point: tuple[float, float], against: dict[str, float]) -> dict[str, float]:
        return {policy: sharded(*point, policy) / value - 1 for policy, value in against.items()}

    grid = [(step * 1e-3, launch * 2e-5) for step in range(20, 90) for launch in range(100)]
    fitted = min(grid, key=lambda point: sum(miss**2 for miss in misses(point, ours).values()))
    assert max(map(abs, misses(fitted, ours).values())) < 0.12
    assert max(map(abs, misses(fitted, by_hand).values())) < 0.20
    predicted = {policy: sharded(*fitted, policy) for policy in SHARDED}
    assert sorted(SHARDED, key=lambda policy: predicted[policy]) == sorted(SHARDED, key=lambda policy: ours[policy])
    # The control: without the cost of starting, on this link everything would hide, which is far off.
    assert misses((fitted[0], 0.0), ours)["reshard-each"] < -0.4


def test_replicas_as_measured():
    # The micro-step of the captured contender, from its two sizes: one unknown more would be needed for a check of it.
    seconds = measured("ranks-gpt124-cuda")
    captured = [seconds["macrobatch, captured, fused", size] for size in (4, 8)]
    reduce_s = LINKS["nvlink"].all_reduce_s(4 * 163_109_376, 2)
    step = StepTime.fit([4, 8], [(captured[0] - reduce_s) / 8, (captured[1] - reduce_s) / 4])
    job = training(
        step=step, global_batch=64, max_micro_batch=8, gradient_bytes=4 * 163_109_376, overlap=0.0, num_pieces=1
    )
    for size, value in zip((4, 8), captured, strict=True):
        assert job.window(LINKS["nvlink"], 2, size).window_s == pytest.approx(value, rel=1e-6)
    # From one GPU to two: the micro-step of the same contender on one GPU, measured in another run.
    rows = json.loads((RESULTS / "doors-cuda.json").read_text())["results"]["gpt124"]
    rows = [row for row in rows if row["name"].startswith("TrainStep, compile, fused")]
    alone = {row["micro_batch"]: row["rate"][1] for row in rows if "problem" not in row}
    tokens = 64 * 1024
    step = StepTime.fit([*alone], [tokens / rate * size / 64 for size, rate in alone.items()])
    job = dataclasses.replace(job, step=step)
    # 8 was measured before the weights were rounded once per window, as they are in all the others.
    for size, value, off in zip((4, 8), captured, (0.10, 0.15), strict=True):
        assert job.window(LINKS["nvlink"], 2, size).window_s == pytest.approx(value, rel=off)
    # The control: two GPUs are not simply half of one.
    assert job.window(LINKS["nvlink"], 1, 4).window_s / 2 < 0.97 * captured[0]
    # A limit of the line: where the host is what is waited for, the time of a small micro-batch does not fall with its
    # size. From DDP's 4 and 8 it would follow that three quarters of a micro-step of 4 are fixed.
    eager = [seconds["DDP, no_sync, bucket views", size] for size in (4, 8)]
    fixed_s = StepTime.fit([4, 8], [eager[0] / 8, eager[1] / 4]).fixed_s
    assert fixed_s > 0.7 * eager[0] / 8


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"global_batch": 0}, "global_batch"),
        ({"max_micro_batch": 1.0}, "max_micro_batch"),
        ({"gradient_bytes": -1}, "gradient_bytes"),
        ({"update_s": float("nan")}, "update_s"),
        ({"overlap": 1.1}, "overlap"),
        ({"policy": "keep-last"}, "policy"),
        ({"step": 0.1}, "step"),
        ({"num_pieces": True}, "num_pieces"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_training_is_refused(changes, named):
    with pytest.raises(ArgumentError, match=named):
        training(**changes)


def test_bad_questions_are_refused():
    job = training()
    for world_size, micro_batch, named in (
        (0, 1, "world_size"),
        (1.0, 1, "world_size"),
        (1, 0, "micro"),
        (1, 17, "micro"),
    ):
        with pytest.raises(ArgumentError, match=named):
            job.window(FREE, world_size, micro_batch)
    with pytest.raises(ArgumentError, match="bytes_per_s"):
        Link(0.0)
    with pytest.raises(ArgumentError, match="latency_s"):
        Link(1.0, -1.0)
    for sizes, seconds in (([4], [1.0]), ([4, 4], [1.0, 1.0]), ([4, 8], [1.0]), ([4, 8], [0.0, 1.0])):
        with pytest.raises(ArgumentError, match=r"StepTime\.fit"):
            StepTime.fit(sizes, seconds)


# --- the command ---

OPTIONS = ScalingOptions(
    world=[1, 8, 100_000],
    link=["400g", "2e9:1e-5"],
    step=["4:11.3", "8:20.0"],
    parameters=1e8,
    global_batch=4096,
)


def test_table_has_a_row_for_each_link_and_world():
    written = io.StringIO()
    print_scaling(OPTIONS, Console(width=120, file=written))
    lines = [line for line in written.getvalue().splitlines() if "400g" in line or "2e9:1e-5" in line]
    assert len(lines) == 6
    assert all("100.0%" in line for line in (lines[0], lines[3]))


def test_tables_are_whole_in_80_columns():
    """Nothing is cut off, and no number needs an exponent, also where there are many."""
    written = io.StringIO()
    world, link = [1, 8, 100_000], ["nvlink", "50e9:5e-6"]
    options = dataclasses.replace(OPTIONS, world=world, link=link, global_batch=65_536)
    print_scaling(options, Console(width=80, file=written))
    trials = [Trial(2, 10**9), Trial(500, 10**11, 1e-3), Trial(100_000, None)]
    survey = Survey(
        trials=trials,
        unit="samples",
        total=100_000,
        limit_bytes=141 * 10**9,
        reserved_bytes=10**10,
        largest=500,
        size=500,
        reason="the fastest of what fits, which is a long reason",
    )
    print_survey(survey, Console(width=80, file=written))
    text = written.getvalue()
    assert "…" not in text
    assert "e+" not in text
    for whole in ("ciency", "samples/s", "100,000", "500,000", "141,000 MB", "over the limit", survey.reason):
        assert whole in text


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name, options in (("many", OPTIONS), ("one", dataclasses.replace(OPTIONS, world=[1]))):
        path = tmp_path / f"{name}.png"
        draw_scaling(options, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["macrobatch", "plan", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_command_prints_and_draws(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "120")
    picture = tmp_path / "scaling.png"
    assert run(monkeypatch, "--world", "8", "--link", "400g", "--policy", "keep-last", "--plot", str(picture)) == 0
    assert "keep-last" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments", [("--link", "x"), ("--step", "4:1"), ("--world", "0"), ("--policy", "x")], ids=str
)
def test_command_refuses_and_prints_no_table(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"link": ["carrier pigeon"]}, "--link"),
        ({"link": ["1e9"]}, "--link"),
        ({"link": ["0:0"]}, "bytes_per_s"),
        ({"step": ["4-11"]}, "--step"),
        ({"step": ["4.5:11", "8:20"]}, "--step"),
        ({"step": ["4:11"]}, "StepTime"),
        ({"policy": "zero-3"}, "--policy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_refused(changes, named):
    options = dataclasses.replace(OPTIONS, **changes)
    with pytest.raises(ArgumentError, match=named):
        print_scaling(options, Console(file=io.StringIO()))
