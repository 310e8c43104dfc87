"""The group of ranks: joined with what the launcher left, its backend chosen together, its end."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from macrobatch import launch
from macrobatch.errors import ArgumentError
from macrobatch.launch import group
from macrobatch.ranks import Ranks
from macrobatch.testing.scripts import run_script

pytestmark = pytest.mark.xdist_group("ranks")


def test_alone_there_is_no_group():
    assert launch.init() == Ranks()
    assert not dist.is_initialized()
    launch.shutdown()  # nothing to do


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan"), True, "10"], ids=str)
def test_a_timeout_that_is_none_is_refused(timeout_s):
    with pytest.raises(ArgumentError, match="timeout_s"):
        launch.init(timeout_s=timeout_s)


def test_ranks_of_srun_make_a_group_without_more_variables(job, check):
    common = {
        "SLURM_JOB_ID": str(os.getpid()),  # the port follows from it
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "n01",  # not needed, and not looked up, on one machine
        "SLURM_NODEID": "0",
    }
    own = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    done = run_script(job, processes=own, environ=common)
    assert done.codes == [0, 0], done.stderr
    check([json.loads(text) for text in done.stdout], local_ranks=[0, 1])


def test_an_exception_ends_a_rank_without_waiting_for_the_others(monkeypatch):
    ended = []
    monkeypatch.setattr(group, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
    group._end()
    assert not ended
    monkeypatch.delattr(sys, "last_value")
    group._end()
    assert ended


# --- whose GPU is it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["GPU-a", "GPU-b", "GPU-c"], True),
        (["GPU-a", "GPU-b", "GPU-a"], False),  # three ranks on two GPUs
        (["GPU-a", None, "GPU-c"], False),  # one machine without
        ([None, None, None], False),
    ],
    ids=str,
)
def test_nccl_needs_a_gpu_of_its_own_for_every_rank(monkeypatch, tmp_path, names, expected):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: device)

    def decide(rank: int) -> bool:
        store = FileStore(str(tmp_path / "store"), len(names))
        store.set_timeout(timedelta(seconds=20))
        device: Any = None if names[rank] is None else SimpleNamespace(uuid=names[rank])
        return group._has_own_gpu_everywhere(store, rank, len(names), device)

    with ThreadPoolExecutor(len(names)) as ranks:
        assert list(ranks.map(decide, range(len(names)))) == [expected] * len(names)


@pytest.mark.parametrize(("num_gpus", "local_rank", "expected"), [(4, 2, 2), (1, 3, 0), (2, 3, 1)])
def test_a_rank_takes_the_gpu_of_its_number(monkeypatch, num_gpus, local_rank, expected):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert group._take_gpu(local_rank) == torch.device("cuda", expected)
    assert taken == [torch.device("cuda", expected)]
