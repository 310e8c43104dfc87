"""Starting ranks from a process, and training them apart."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from macrobatch.accelerate import Accelerator
from macrobatch.accelerate.launchers import debug_launcher, notebook_launcher
from macrobatch.accelerate.local_sgd import LocalSGD
from macrobatch.accelerate.state import AcceleratorState, PartialState
from macrobatch.errors import ArgumentError, PeerError, WindowError

pytestmark = pytest.mark.xdist_group("ranks")


def write_facts(folder: Path) -> str:
    state = AcceleratorState()
    text = f"{state.num_processes} {state.distributed_type.value} {state.backend} {state.mixed_precision}"
    (folder / str(state.process_index)).write_text(text, encoding="utf-8")
    return text


def facts(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of forks where threads run
def test_debug_launcher_starts_ranks_of_a_closure_beside_a_busy_port(tmp_path: Path):
    def job(suffix: str) -> None:
        state = PartialState()
        (tmp_path / f"{state.process_index}{suffix}").write_text(str(state.num_processes), encoding="utf-8")

    with socket.socket() as busy:  # the original's only port
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            busy.bind(("127.0.0.1", 29500))
            busy.listen()
        except OSError:
            pass  # somebody else has it: as good
        debug_launcher(job, (".rank",), num_processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.rank", "1.rank"]
    assert facts(tmp_path) == ["2", "2"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_notebook_launcher_passes_precision_on(tmp_path: Path):
    notebook_launcher(lambda folder: write_facts(folder) and None, (tmp_path,), num_processes=2, mixed_precision="bf16")
    assert facts(tmp_path) == ["2 MULTI_CPU gloo bf16"] * 2


def test_one_process_is_a_plain_call(tmp_path: Path):
    assert notebook_launcher(write_facts, (tmp_path,), num_processes=1) == "1 NO None no"


def test_debug_launcher_of_one_process_may_be_called_again(tmp_path: Path):
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        debug_launcher(write_facts, (folder,), num_processes=1)
        assert facts(folder) == ["1 NO None no"]
    with pytest.raises(ValueError, match="on purpose"):
        debug_launcher(train_then_fail, num_processes=1)
    debug_launcher(train_then_fail, (False,), num_processes=1)
    assert not PartialState._shared_state


def train_then_fail(fails: bool = True) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    assert accelerator.device.type == "cpu"
    model, optimizer = accelerator.prepare(model := nn.Linear(1, 1), torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
    if fails:
        raise ValueError("on purpose")


def fail() -> None:
    raise ValueError("on purpose")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_failure_of_a_rank_is_told():
    with pytest.raises(PeerError, match="on purpose"):
        debug_launcher(lambda: fail(), num_processes=2)


def test_launch_beside_an_accelerator_is_refused():
    PartialState()
    for launcher in (debug_launcher, notebook_launcher):
        with pytest.raises(WindowError, match="already"):
            launcher(fail, num_processes=2)


def launch_within() -> str:
    AcceleratorState._reset_state(True)  # of what ran on these ranks before
    try:
        notebook_launcher(fail, num_processes=2)
    except ArgumentError as error:
        return str(error)
    return "no error"


def test_nested_launch_is_refused(ranks: Any):
    assert all("one of several ranks already" in text for text in ranks(2).run(launch_within))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_nodes": 2}, ArgumentError),
        ({"max_restarts": 3}, ArgumentError),
        ({"mixed_precision": "fp8"}, ArgumentError),
        ({"num_processes": 0}, ArgumentError),
        ({"num_processes": "2"}, ArgumentError),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception]):
    with pytest.raises(error, match="To fix it"):
        notebook_launcher(fail, **arguments)


# --- local SGD ---


def averages() -> list[float]:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    seen: list[float] = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for _ in range(3):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.full((1, 1), -1.0 - dist.get_rank())).sum())
                optimizer.step()
                optimizer.zero_grad()
            local.step()
            seen.append(float(model.weight.detach()))
    AcceleratorState._reset_state(True)
    return [*seen, float(model.weight.detach())]


def test_local_sgd_averages_every_so_many_steps_and_at_the_end(ranks: Any):
    # Each step adds 1 on rank 0 and 2 on rank 1: 1, 2 and 2, 4; average 3; then 4 and 5; average at the end 4.5.
    assert ranks(2).run(averages) == [[1.0, 3.0, 4.0, 4.5], [2.0, 3.0, 5.0, 4.5]]


@pytest.mark.parametrize("steps", [0, -1, 1.5, "2", None], ids=repr)
def test_local_sgd_refuses_what_is_no_count(steps: Any):
    with pytest.raises(ArgumentError, match="local_sgd_steps"):
        LocalSGD(SimpleNamespace(num_processes=1), nn.Linear(1, 1), steps)
