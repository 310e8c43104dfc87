"""The test scripts that accelerate itself ships, read from where it is installed, with `macrobatch.` before their
imports, on two ranks. They are functions that take nothing, a state, an accelerator or a switch."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tests.accelerate.doors import OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")

SCRIPTS = ["test_sync", "test_ops", "test_script", "test_distributed_data_loop"]
ENVIRONMENT = {
    "test_sync": {"MACROBATCH_NORMALIZE": "constant"},  # its last window is short, and expected to be divided by N
    "test_ops": {"ACCELERATE_DEBUG_MODE": "1"},  # read when a state is made; the script sets state.debug later
}
SWITCHES = {
    "split_batches": [False, True],
    "dispatch_batches": [False, True],
    "sync_each_batch": [False],  # of replicas, it changes what .grad shows within a window, and no window's gradient
    "use_seedable_sampler": [False, True],
    "iterable": [False, True],
}
NOT_RUN = {
    "test_noop_sync": "it is for one process, and is run there, below",
    "test_reinstantiated_state": "an accelerator goes on after a reset of the state, instead of raising an error",
    "test_join_raises_warning_for_non_ddp_distributed": "sharded models are refused, since a rank would wait for ever",
    "test_stateful_dataloader_save_state": "each rank saves to a folder of its own; here, all have to name one",
    "test_split_between_processes_dataset": "it needs the package datasets",
}


def path_of(script: str) -> Path:
    spec = importlib.util.find_spec("accelerate")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "test_utils" / "scripts" / f"{script}.py"


def loaded(script: str, *, originally: bool = False) -> Any:
    """The script as a module, on ours; its plugins may count as the original's do."""
    source = path_of(script).read_text(encoding="utf-8")
    source = re.sub(r"^(\s*from) accelerate\b(?!\.test_utils)", r"\1 macrobatch.accelerate", source, flags=re.MULTILINE)
    if originally:
        source = source.replace("GradientAccumulationPlugin(", "GradientAccumulationPlugin(original=True, ")
    module = ModuleType(script)
    exec(compile(source, str(path_of(script)), "exec"), vars(module))
    assert "macrobatch.accelerate" in source
    vars(module)["are_the_same_tensors"] = are_the_same  # the original's asks the original's state
    return module


def are_the_same(tensor: torch.Tensor) -> bool:
    from macrobatch.accelerate.utils import gather

    everywhere = gather(tensor[None].clone())
    return all(torch.equal(each, tensor) for each in everywhere)


def checks(script: str) -> list[str]:
    """The names of the script's checks."""
    tree = ast.parse(path_of(script).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if re.match(r"test_|check_seed", name) or name.endswith("_check")]


def loaders(module: Any) -> list[DataLoader[Any]]:
    """Those that the script's main passes, without workers."""
    data = module.DummyDataset()

    def batches() -> BatchSampler:
        return BatchSampler(RandomSampler(data), batch_size=module.BATCH_SIZE, drop_last=False)

    return [
        *(DataLoader(data, shuffle=shuffle, batch_size=module.BATCH_SIZE) for shuffle in (False, True)),
        DataLoader(data, batch_sampler=batches()),
        DataLoader(data, sampler=batches(), batch_size=None, collate_fn=module.default_collate),
    ]


def run(script: str, name: str, originally: bool = False) -> int:
    """Run a check with all its switches; returns how often."""
    with entered(OURS) as door:
        os.environ.update({} if originally else ENVIRONMENT.get(script, {}), ACCELERATE_USE_CPU="1")
        module = loaded(script, originally=originally)
        check = getattr(module, name)
        parameters = list(inspect.signature(check).parameters)
        values: dict[str, list[Any]] = {
            **SWITCHES,
            "sync_each_batch": [False, True] if originally else SWITCHES["sync_each_batch"],
            "data_loader": loaders(module) if "data_loader" in parameters else [],
        }
        combinations = list(itertools.product(*(values.get(each, [None]) for each in parameters)))
        for combination in combinations:
            given = dict(zip(parameters, combination, strict=True))
            if "state" in given:
                given["state"] = door.PartialState()
            elif "accelerator" in given:
                plugin = door.GradientAccumulationPlugin(original=originally)
                given["accelerator"] = door.Accelerator(gradient_accumulation_plugin=plugin)
            torch.manual_seed(0)  # as in processes that have just begun, alike on all ranks
            check(**given)
            door.state.AcceleratorState._reset_state()
            door.state.GradientState._reset_state()
        return len(combinations)


CHECKS = [(script, name) for script in SCRIPTS for name in checks(script) if name not in NOT_RUN]


@pytest.mark.parametrize(("script", "name"), CHECKS)
def test_on_two_ranks(ranks: Any, script: str, name: str):
    assert min(ranks(2).run(run, script, name)) >= 1


@pytest.mark.parametrize("name", [name for script, name in CHECKS if script == "test_sync"])
def test_counted_as_in_the_original(ranks: Any, name: str):
    counts = ranks(2).run(run, "test_sync", name, True)
    assert counts == [8 if name.startswith("test_gradient_accumulation") else 1] * 2


@pytest.mark.parametrize("originally", [False, True])
def test_no_sync_in_one_process(originally: bool):
    assert run("test_sync", "test_noop_sync", originally) == 1


def test_whatever_is_not_run_is_there():
    assert len(CHECKS) > 30
    assert NOT_RUN.keys() <= {name for script in SCRIPTS for name in checks(script)}
