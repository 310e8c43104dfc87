"""`macrobatch launch`: what it asks of torchrun, and jobs from the first line to the exit code."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from macrobatch.cli import main
from macrobatch.errors import ArgumentError
from macrobatch.launch.command import Options, run

ONE_HOST = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]

SCRIPT = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
sys.stdout.write(json.dumps({"argv": sys.argv[1:]} | {name: os.environ[name] for name in names}) + "\\n")
if os.environ["RANK"] == "1":
    sys.exit(7)
import time
time.sleep(60)  # torchrun ends it
"""

# As little as needs the other rank.
SUMS = """
import json, sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(())
dist.all_reduce(total)
sys.stdout.write(json.dumps({"rank": dist.get_rank(), "total": total.item(), "arguments": sys.argv[1:]}) + "\\n")
dist.destroy_process_group()
"""


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        (Options(), {}, ["--nproc-per-node=1", *ONE_HOST]),
        (Options(nproc=3, module=True), {}, ["--nproc-per-node=3", *ONE_HOST, "--module"]),
        (
            Options(nproc=8, nnodes="2", rdzv="host-a:29400"),
            {},
            ["--nproc-per-node=8", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=host-a:29400"],
        ),
        (
            Options(nproc=8, nnodes="1:4", rdzv="host-a"),
            {},
            ["--nproc-per-node=8", "--nnodes=1:4", "--rdzv-backend=c10d", "--rdzv-endpoint=host-a"],
        ),
        (
            Options(nproc=8, nnodes="2", rdzv="host-a:1234", node_rank=1),
            {},
            [
                "--nproc-per-node=8",
                "--nnodes=2",
                "--rdzv-backend=static",
                "--node-rank=1",
                "--master-addr=host-a",
                "--master-port=1234",
            ],
        ),
        (
            Options(nproc=8, nnodes="2", rdzv="host-a", node_rank=0),
            {},
            [
                "--nproc-per-node=8",
                "--nnodes=2",
                "--rdzv-backend=static",
                "--node-rank=0",
                "--master-addr=host-a",
                "--master-port=29500",
            ],
        ),
        # A Kubernetes PyTorchJob: torchrun itself reads the rest of these variables.
        (
            Options(),
            {"PET_NPROC_PER_NODE": "auto", "PET_NNODES": "2", "PET_MASTER_ADDR": "job-master-0", "PET_NODE_RANK": "1"},
            ["--nproc-per-node=1", "--nnodes=2"],
        ),
        (Options(nproc=4), {"PET_NPROC_PER_NODE": "2", "PET_NNODES": "1"}, ["--nproc-per-node=4", *ONE_HOST]),
        (Options(), {"PET_NPROC_PER_NODE": "2"}, ["--nproc-per-node=2", *ONE_HOST]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_gpu")
def test_arguments_of_torchrun(options, environ, expected):
    assert options.arguments(environ) == expected


def test_one_rank_per_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Options().arguments({})[0] == "--nproc-per-node=4"
    assert Options(nproc=2).arguments({})[0] == "--nproc-per-node=2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(nnodes="two"), r"--nnodes: given 'two'.*1:4"),
        (Options(nnodes="0"), r"--nnodes: given '0'.*a number of machines, at least 1"),
        (Options(nnodes="3:2"), r"--nnodes: given '3:2'.*MIN:MAX with 1 <= MIN <= MAX"),
        (Options(nnodes="1:2:3"), "--nnodes: given '1:2:3'"),
        (Options(nnodes="2"), r"--rdzv: given None.*HOST:PORT"),
        (Options(nnodes="2", rdzv="host-a:port"), r"--rdzv: given 'host-a:port'.*a port from 1 to 65535"),
        (Options(nnodes="2", rdzv="host-a:port", node_rank=0), r"--rdzv: given 'host-a:port'"),
        (Options(nnodes="2", rdzv="host-a:65536"), r"--rdzv: given 'host-a:65536'"),
        (Options(nnodes="2", rdzv=":29400"), r"--rdzv: given ':29400'.*HOST:PORT"),
        (Options(rdzv="host-a:1"), "add --nnodes"),
        (Options(node_rank=0), "add --nnodes"),
        (Options(nnodes="2", rdzv="host-a:1", node_rank=2), r"--node-rank: given 2 of 2 machines"),
        (Options(nnodes="1:2", rdzv="host-a:1", node_rank=0), "a fixed number of machines"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        options.arguments({})


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_a_job_in_each_task_of_another_launcher_is_refused(environ):
    with pytest.raises(ArgumentError, match=r"each would start a job of its own.*srun python train.py"):
        Options().arguments(environ)
    assert Options(nnodes="4", rdzv="host-a").arguments(environ)  # one torchrun a machine is fine


def test_two_jobs_at_once_and_all_that_follows_the_script_is_its_own(start, cli, job, seen, check, tmp_path):
    (tmp_path / "sums.py").write_text(SUMS, encoding="utf-8")
    jobs = [
        start(*cli, "launch", "--nproc", "2", script, "--nproc", name, "-x")
        for script, name in ((job, "one"), ("sums.py", "two"))
    ]
    first, second = map(seen, jobs)
    check(first, local_ranks=[0, 1])
    assert [each["total"] for each in second] == [2.0, 2.0]
    for ranks, name in ((first, "one"), (second, "two")):
        assert [each["arguments"] for each in ranks] == [["--nproc", name, "-x"]] * 2


def test_a_failed_rank_ends_the_job_with_its_exit_code(start, tmp_path):
    (tmp_path / "some_module.py").write_text(SCRIPT, encoding="utf-8")
    # On eight cores, whatever there are here: each of the three ranks gets two threads.
    code = "from macrobatch import cli, env; env.num_cores = lambda: 8; cli.main()"
    arguments = ("launch", "--nproc", "3", "-m", "some_module", "a", "--b")
    program = start(sys.executable, "-c", code, *arguments, OMP_NUM_THREADS=None)
    out, err = program.communicate(timeout=240)
    assert program.returncode == 7
    assert "error: rank 1 ended with exit code 7" in err
    assert "Traceback" not in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["OMP_NUM_THREADS"] for line in lines} == {"2"}
    assert {(line["WORLD_SIZE"], line["LOCAL_WORLD_SIZE"]) for line in lines} == {("3", "3")}
    assert all(line["argv"] == ["a", "--b"] for line in lines)


def test_help_names_the_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["macrobatch", "launch", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    out = capsys.readouterr().out
    assert all(name in out for name in ("--nproc", "--nnodes", "--node-rank", "--rdzv", "--module"))


def test_a_script_that_is_not_there_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"given the script 'train.py'; expected a file that is there.*--module"):
        run("train.py", [], Options())


def test_a_wrong_option_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["macrobatch", "launch", "--nnodes", "2", "script.py"])
    with pytest.raises(SystemExit, match="2"):
        main()
    err = capsys.readouterr().err
    assert "error: --rdzv: given None" in err
    assert "Traceback" not in err


def test_torch_distributed_launch(start, job, seen, check):
    # Its --local-rank reaches the script; its FutureWarning and torchrun's note on threads go to stderr.
    ranks = seen(start(sys.executable, "-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2", job))
    check(ranks, local_ranks=[0, 1])
    assert [each["arguments"] for each in ranks] == [["--local-rank=0"], ["--local-rank=1"]]
