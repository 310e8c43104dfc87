"""The state objects: constructible anywhere, agreeing, and one job under torchrun, also without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from macrobatch.accelerate.state import AcceleratorState, GradientState, PartialState, do_nothing, is_initialized
from macrobatch.accelerate.utils.environment import patch_environment
from macrobatch.errors import ArgumentError
from macrobatch.testing.scripts import run_script
from tests.accelerate.doors import ORIGINAL, OURS

pytestmark = pytest.mark.xdist_group("ranks")

SCRIPT = """
import os
import sys
from {door} import PartialState
state = PartialState()
facts = (state.num_processes, state.is_main_process, state.backend, state.distributed_type.value, state.device)
with open(f"{{sys.argv[1]}}/{door}.{{os.environ['RANK']}}", "w") as file:
    print(*facts, end="", file=file)
"""


def launched(door: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What two processes with torchrun's variables find; under torchrun itself, see `test_examples.py`."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(door=door), encoding="utf-8")
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    done = run_script(script, str(folder), num_ranks=2)
    assert done.codes == [0, 0], done.stderr
    return sorted(path.read_text(encoding="utf-8") for path in folder.glob(f"{door}.*"))


@pytest.mark.better("W20")
@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_torchrun_without_gpu_is_two_jobs_in_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert launched(ORIGINAL, tmp_path, monkeypatch) == ["1 True None NO cpu"] * 2  # the control


@pytest.mark.better("W20")
@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_torchrun_without_gpu_is_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert launched(OURS, tmp_path, monkeypatch) == ["2 False gloo MULTI_CPU cpu", "2 True gloo MULTI_CPU cpu"]


def facts(door: str) -> dict[str, Any]:
    """What a state says on this rank."""
    state = import_module(f"{door}.state")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with patch_environment(**(variables if world_size > 1 else {})):
        state.AcceleratorState._reset_state(True)
        try:
            plugin = import_module(f"{door}.utils").TorchDynamoPlugin()
            one = state.AcceleratorState("bf16", cpu=True, dynamo_plugin=plugin, _from_accelerator=True)
            other = state.PartialState()
            names = (
                "num_processes process_index local_process_index device backend distributed_type is_main_process "
                "is_local_main_process is_last_process use_distributed debug fork_launched"
            )
            found = {name: shown(getattr(one, name)) for name in names.split()}
            assert found == {name: shown(getattr(other, name)) for name in names.split()}
            found["precision"] = str(state.AcceleratorState().mixed_precision)
            found["only"] = [
                other.on_main_process(rank.__add__)(0),
                other.on_last_process(rank.__add__)(0),
                other.on_process(rank.__add__, process_index=1)(0),
                other.on_local_process(rank.__add__, local_process_index=0)(0),
            ]
            return found | {"shares": shares(other)}
        finally:
            state.AcceleratorState._reset_state(True)


def shown(value: Any) -> str:
    """As text; of a device its type, since the original numbers CPUs."""
    return str(getattr(value, "value", getattr(value, "type", value)))


def shares(state: Any) -> list[Any]:
    found: list[Any] = []
    for inputs in ([1, 2, 3], (1,), torch.arange(3), {"a": [1, 2, 3], "b": torch.arange(3)}, [1, 2, 3, 4]):
        for apply_padding in (False, True):
            copied = dict(inputs) if isinstance(inputs, dict) else inputs
            if apply_padding and isinstance(inputs, tuple):
                continue  # the original adds a list to a tuple
            with state.split_between_processes(copied, apply_padding=apply_padding) as share:
                found.append(plain(share))
    return found


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_facts_of_one_process_are_the_originals():
    assert facts(OURS) == facts(ORIGINAL)


def test_facts_of_two_ranks_are_the_originals(ranks: Callable[..., Any]):
    found = ranks(2).run(facts, OURS)
    assert found == ranks(2).run(facts, ORIGINAL)
    assert [each["only"] for each in found] == [[0, None, None, 0], [None, 1, 1, None]]


def split_dict_twice(door: str) -> list[int]:
    state = import_module(f"{door}.state")
    rank = dist.get_rank()
    with patch_environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2):
        state.AcceleratorState._reset_state(True)
        partial, inputs, lengths = state.PartialState(cpu=True), {"a": [1, 2, 3, 4]}, []
        for _ in range(2):
            with partial.split_between_processes(inputs) as share:
                lengths.append(len(share["a"]))
        state.AcceleratorState._reset_state(True)
        return lengths


def test_splitting_leaves_a_dict_as_it_is(ranks: Callable[..., Any]):
    assert ranks(2).run(split_dict_twice, ORIGINAL) == [[2, 1]] * 2  # the control: it cuts the caller's own
    assert ranks(2).run(split_dict_twice, OURS) == [[2, 2]] * 2


def test_padding_of_a_tuple(ranks: Callable[..., Any]):
    assert ranks(2).run(padded_tuple) == [(1, 2), (3, 3)]


def padded_tuple() -> tuple[int, ...]:
    state = PartialState()
    try:
        with state.split_between_processes((1, 2, 3), apply_padding=True) as share:
            return share
    finally:
        PartialState._reset_state()


def in_turns(folder: Path) -> list[str]:
    state = PartialState()
    with state.main_process_first():
        path = folder / "made once"
        path.write_text(path.read_text() + "x" if path.exists() else "x")
        seen = path.read_text()
    state.wait_for_everyone()
    PartialState._reset_state()
    return [seen, path.read_text()]


def test_main_process_goes_first(tmp_path: Path, ranks: Callable[..., Any]):
    assert ranks(2).run(in_turns, tmp_path) == [["x", "xx"], ["xx", "xx"]]


def heard_of(culprit: int) -> str:
    state = PartialState(cpu=True)
    try:
        with state.main_process_first():
            if state.process_index == culprit:
                raise OSError("no network")
    except Exception as error:
        return type(error).__name__
    return ""


def fails_first() -> list[str]:
    """What a rank hears of an error of the one that goes first, of the other's, and of nobody's."""
    return [heard_of(culprit) for culprit in (0, 1, 2)]


def test_nobody_waits_for_a_main_process_that_fails(ranks: Callable[..., Any]):
    assert ranks(2, timeout_s=20.0).run(fails_first) == [["OSError", "", ""], ["PeerError", "OSError", ""]]


def test_state_is_made_by_whoever_comes_first():
    assert not is_initialized()
    AcceleratorState(mixed_precision="bf16")
    assert is_initialized()
    assert AcceleratorState().mixed_precision == "bf16"
    assert AcceleratorState().num_processes == PartialState().num_processes == 1
    with pytest.raises(ArgumentError, match="'bf16', as the first"):
        AcceleratorState(mixed_precision="fp16")


def test_precision_of_the_environment_counts_where_none_is_passed():
    with patch_environment(ACCELERATE_MIXED_PRECISION="BF16"):
        assert AcceleratorState().mixed_precision == "bf16"
        AcceleratorState._reset_state()
        assert AcceleratorState(mixed_precision="no").mixed_precision == "no"


@pytest.mark.parametrize("precision", ["fp8", "float16", "f16"])
def test_unknown_precision_is_refused_before_anything_is_made(precision: str):
    with patch_environment(ACCELERATE_MIXED_PRECISION=precision), pytest.raises(ArgumentError, match="mixed_precision"):
        AcceleratorState()
    assert not is_initialized()
    assert not PartialState._shared_state


def test_reset_state_says_what_to_do():
    state = PartialState()
    PartialState._reset_state()
    with pytest.raises(AttributeError, match="construct an Accelerator or a PartialState"):
        _ = state.num_processes


def test_unequal_lengths_are_refused(ranks: Callable[..., Any]):
    assert all("expected one length" in text for text in ranks(2).run(split_unequal))


def split_unequal() -> str:
    try:
        with PartialState().split_between_processes({"a": [1], "b": [1, 2]}):
            return "no error"
    except ArgumentError as error:
        return str(error)
    finally:
        PartialState._reset_state()


def test_print_and_nothing(capsys: pytest.CaptureFixture[str]):
    PartialState().print("once", end="!")
    assert capsys.readouterr().out == "once!"
    assert do_nothing(1, key=2) is None
    assert GradientState().num_steps == 1


def test_the_environment_may_choose_the_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu:3")
    assert str(PartialState().device) == "cpu:3"
