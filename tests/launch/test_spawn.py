"""Ranks as processes of this machine: their results by rank, and what is heard of one that fails."""

from __future__ import annotations

import operator
import re
import sys

import pytest
import torch

from macrobatch.errors import ArgumentError
from macrobatch.launch import spawn

# As in a notebook: what is defined here has no file, and is run in forks of this process.
NOTEBOOK = """
import os, signal, time
import torch
import torch.distributed as dist
from macrobatch import errors, launch

x = torch.randn(300, 300) @ torch.randn(300, 300)  # OpenMP's threads are there already

def total(n):
    ranks = launch.init()
    x = torch.full((n,), float(ranks.rank + 1))
    dist.all_reduce(x)
    y = torch.randn(300, 300) @ torch.randn(300, 300)
    return ranks.rank, x.tolist(), dist.get_backend(), len(y)

def fail(how):
    ranks = launch.init()
    if ranks.rank == 1:
        if how == "raise":
            raise ValueError("no such digit")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise SystemExit(3)
    dist.barrier()

def hang():
    if launch.init().rank == 1:
        raise ValueError("the first error")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)

def caught(function, *args):
    began = time.monotonic()
    try:
        launch.spawn(function, args, 2, timeout_s=180)
    except errors.PeerError as error:
        print(f"<<{function.__name__} {args} after {time.monotonic() - began:.1f} s: {error}>>", flush=True)

print(launch.spawn(total, (2,), 2, timeout_s=180), flush=True)
caught(fail, "raise")
caught(fail, "die")
caught(fail, "exit")
caught(hang)
"""


def test_forks_of_a_notebook(start):
    program = start(sys.executable, "-W", "error", "-c", NOTEBOOK)
    out, err = program.communicate(timeout=240)
    assert program.returncode == 0, err
    assert "[(0, [3.0, 3.0], 'gloo', 300), (1, [3.0, 3.0], 'gloo', 300)]" in out
    raised, died, left, hung = re.findall(r"<<(.*?)>>", out, flags=re.DOTALL)
    assert "rank 1 of 2: given ValueError: no such digit; expected every rank to return" in raised
    assert re.search(r"Traceback.*in fail\n.*ValueError: no such digit", raised, flags=re.DOTALL)
    assert "rank 1 of 2: given process 1 terminated with signal SIGKILL" in died
    assert "rank 1 of 2: given process 1 terminated with exit code 3" in left
    assert "the first error" in hung
    for ending in (raised, died, left, hung):
        # 3 s to end by themselves, 3 s more to react to SIGTERM, and some for a busy machine
        assert float(re.findall(r"after ([\d.]+) s", ending)[0]) < 60


def test_fresh_interpreters(tmp_path, start):
    (tmp_path / "work.py").write_text(
        "import torch, torch.distributed as dist\n"
        "from macrobatch import errors, launch\n"
        "def share(x):\n"
        "    ranks = launch.init()\n"
        "    dist.all_reduce(x)\n"
        "    if ranks.rank == 1 and x[0] > 2:\n"
        "        raise ValueError('too much')\n"
        "    return x.mul(ranks.rank).tolist(), torch.get_num_threads() >= 1\n"
        "if __name__ == '__main__':\n"
        "    print(launch.spawn(share, (torch.ones(2),), 2, timeout_s=180), flush=True)\n",
        encoding="utf-8",
    )
    out, err = start(sys.executable, "-W", "error", "work.py").communicate(timeout=240)
    assert out.strip() == "[([0.0, 0.0], True), ([2.0, 2.0], True)]", err


def test_one_process_is_the_plain_call():
    assert spawn(operator.add, (1, 2), 1) == [3]
    with pytest.raises(ZeroDivisionError):
        spawn(operator.truediv, (1, 0), 1)


def test_one_process_per_gpu_or_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert spawn(operator.neg, (1,)) == [-1]


@pytest.mark.parametrize("num_processes", [0, -1, 1.0, True, "2"], ids=str)
def test_a_number_of_processes_that_is_none_is_refused(num_processes):
    with pytest.raises(ArgumentError, match="num_processes"):
        spawn(operator.neg, (1,), num_processes)


def test_an_unknown_start_method_is_refused():
    with pytest.raises(ArgumentError, match="start_method: given 'forkserver'"):
        spawn(operator.neg, (1,), 2, start_method="forkserver")  # pyright: ignore[reportArgumentType]


def test_a_function_that_other_interpreters_cannot_find_is_refused():
    with pytest.raises(ArgumentError, match=r"function: given .*find by its name.*top of a module"):
        spawn(lambda: None, (), 2)


def test_forks_of_a_process_that_uses_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ArgumentError, match=r"has used a GPU.*restart the notebook"):
        spawn(operator.neg, (1,), 2, start_method="fork")


def test_ranks_that_spawn_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="one of several ranks already"):
        spawn(operator.neg, (1,), 1)
