"""The benchmarks run from end to end, tiny and on a CPU; nothing is said of times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from macrobatch.testing.scripts import run_script

pytestmark = pytest.mark.xdist_group("ranks")

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str, out: Path) -> str:
    done = run_script(FOLDER / f"{script}.py", *arguments, "--out", str(out), timeout_s=600)
    assert done.codes == [0], "".join(done.stdout + done.stderr)
    return done.stdout[0]


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_wgrad_measures_every_contender_and_survives_one_that_fails(tmp_path):
    ways = ["eager", "nonsense"]
    run("wgrad", "--tiny", "--device", "cpu", "--seconds", "0.01", "--ways", *ways, out=tmp_path)
    found = rows(tmp_path / "wgrad-cpu-tiny.json")
    assert len([row for row in found if "problem" not in row]) == 5
    assert all("nonsense" in row["problem"] for row in found if row["name"].startswith("nonsense"))
    error = {row["name"].split(": ")[1]: row["error"] for row in found if "problem" not in row}
    assert error["macrobatch, fused_linear"] < error["by hand, bf16 buffer"]


def test_doors_measure_and_report(tmp_path):
    words = ["hand loop", "TrainStep", "--budget", "0.01"]
    run("doors", "--tiny", "--device", "cpu", "--seconds", "0.01", "--work", "mlp", "--only", *words, out=tmp_path)
    found = json.loads((tmp_path / "doors-cpu-tiny.json").read_text(encoding="utf-8"))["results"]["mlp"]
    assert found[0]["error"] < 1e-6  # float32
    assert all(row["problem"] == "not run: out of time" for row in found[1:])
    said = run("run", "--tiny", "--device", "cpu", "--report", out=tmp_path)
    assert "| MLP 3072-512-512-10, micro-batch 8 |" in said
    assert (tmp_path / "suite-cpu-tiny.json").exists()


def test_waits_writes_a_trace(tmp_path):
    run("waits", "--tiny", "--device", "cpu", "--seconds", "0.01", out=tmp_path)
    assert (tmp_path / "waits-cpu-tiny.chrome.json.gz").stat().st_size > 1000
    assert all(row["within"] == 0 for row in rows(tmp_path / "waits-cpu-tiny.json") if row["name"].startswith("cuda"))


@pytest.mark.parametrize("script", ["lengths", "ranks", "overhead"])
def test_other_scripts_say_what_they_take(script, tmp_path):
    assert "--out" in run(script, "--help", out=tmp_path)
