"""Starting programs, for the tests of how ranks are started."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from macrobatch.ranks import Ranks
from macrobatch.testing.scripts import without_launchers

HERE = Path(__file__).parent

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def job() -> str:
    """The script that ranks run."""
    return str(HERE / "job.py")


@pytest.fixture
def start(tmp_path: Path):
    """Starts a program without the variables of any launcher, and ends it with the test."""
    started: list[subprocess.Popen[str]] = []

    def start_program(*command: str, **environ: str | None) -> subprocess.Popen[str]:
        clean = without_launchers() | {"OMP_NUM_THREADS": "1"}  # the ranks share few cores
        program = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={name: value for name, value in (clean | environ).items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(program)
        return program

    yield start_program
    for program in started:
        with program:  # closes its pipes
            if program.poll() is None:
                program.terminate()  # torchrun ends its ranks
                try:
                    program.wait(10)
                except subprocess.TimeoutExpired:
                    program.kill()


@pytest.fixture
def cli() -> tuple[str, ...]:
    """The command line."""
    return (sys.executable, "-c", "from macrobatch.cli import main; main()")


@pytest.fixture
def seen():
    """What the ranks of programs printed, by rank, after these have ended well."""

    def wait(*programs: subprocess.Popen[str], timeout_s: float = 240) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for program in programs:
            out, err = program.communicate(timeout=timeout_s)
            assert program.returncode == 0, f"{out}\n{err}"
            lines += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return sorted(lines, key=lambda line: line["rank"])

    return wait


@pytest.fixture(scope="session")
def weights() -> list[float]:
    """What the update of the whole macro-batch gives in one process."""
    spec = importlib.util.spec_from_file_location("launch_job", HERE / "job.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.update(Ranks())


@pytest.fixture
def check(weights: list[float]):
    """Checks what ranks saw: all of them there, and each with the weights of the single process."""

    def check_ranks(
        seen: Sequence[dict[str, Any]], *, local_ranks: Sequence[int], backend: str = "cpu:gloo,cuda:gloo"
    ) -> None:
        assert [each["rank"] for each in seen] == list(range(len(local_ranks)))
        assert {each["world_size"] for each in seen} == {len(local_ranks)}
        assert [each["local_rank"] for each in seen] == list(local_ranks)
        assert {each["backend"] for each in seen} == {backend}
        for each in seen:
            assert each["weights"] == pytest.approx(weights, rel=1e-13)  # sums in another order, or on a GPU

    return check_ranks
