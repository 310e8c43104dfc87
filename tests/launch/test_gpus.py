"""Ranks on GPUs: NCCL if each has one of its own, gloo if they share. Needs two GPUs."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from macrobatch import launch
from macrobatch.errors import PeerError

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

NCCL = "cpu:gloo,cuda:nccl"


def test_one_rank_per_gpu(start, cli, job, seen, check):
    found = seen(start(*cli, "launch", job))
    check(found, local_ranks=range(torch.cuda.device_count()), backend=NCCL)


def test_more_ranks_than_gpus(start, cli, job, seen, check):
    num_ranks = torch.cuda.device_count() + 1
    found = seen(start(*cli, "launch", "--nproc", str(num_ranks), job))
    check(found, local_ranks=range(num_ranks))


def test_a_scheduler_that_shows_each_rank_its_own_gpu_alone(start, job, seen, check):
    common = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
    programs = [
        start(sys.executable, job, CUDA_VISIBLE_DEVICES=f"{i}", SLURM_PROCID=f"{i}", SLURM_LOCALID=f"{i}", **common)
        for i in range(2)
    ]
    check(seen(*programs), local_ranks=[0, 1], backend=NCCL)


def both_kinds() -> tuple[list[float], list[float]]:
    rank = launch.init().rank
    on_gpu, on_cpu = torch.ones(2, device="cuda"), torch.ones(2)
    torch.distributed.all_reduce(on_gpu)
    torch.distributed.all_reduce(on_cpu)
    assert on_gpu.device.index == rank
    return on_gpu.tolist(), on_cpu.tolist()


def fail() -> None:
    if launch.init().rank == 1:
        raise ValueError("the first error")
    torch.distributed.all_reduce(torch.ones(2, device="cuda"))
    torch.cuda.synchronize()


SPAWNS = """
import sys
sys.path.insert(0, {folder!r})
import test_gpus
from macrobatch import launch
if __name__ == "__main__":
    print(launch.spawn(test_gpus.both_kinds, (), 2), flush=True)
    launch.spawn(test_gpus.fail, (), 2)
"""


def test_spawn(start, tmp_path):
    script = tmp_path / "spawns.py"
    script.write_text(SPAWNS.format(folder=__file__.rpartition("/")[0]), encoding="utf-8")
    began = time.monotonic()
    program = start(sys.executable, str(script))
    out, err = program.communicate(timeout=240)
    assert "[([2.0, 2.0], [2.0, 2.0]), ([2.0, 2.0], [2.0, 2.0])]" in out, err
    assert PeerError.__name__ in err
    assert "rank 1 of 2: given ValueError: the first error" in err
    assert time.monotonic() - began < 100  # not NCCL's ten minutes
