"""Bringing processes together: by the launcher's command, by the variables of others, alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from macrobatch.colossalai import launching
from macrobatch.colossalai.context import ConfigException, ParallelMode
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.launching import LaunchError
from macrobatch.colossalai.utils import free_port
from macrobatch.testing.scripts import run_script, without_launchers

pytestmark = pytest.mark.xdist_group("ranks")

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.launching import get_default_parser, launch_from_torch
from macrobatch.colossalai.logging import get_dist_logger

if "--config" in sys.argv:
    args = get_default_parser().parse_args()
    assert args.local_rank is not None
    config = args.config
else:
    config = "./config.py"
launch_from_torch(config=config)
total = torch.ones(())
dist.all_reduce(total)
drawn = torch.rand(()).item()
sys.stdout.write(f"ranks {total.item():.0f}, batch {gpc.config.BATCH_SIZE}, drawn {drawn:.6f}\\n")
get_dist_logger().info("only once", ranks=[0])
"""


@pytest.fixture
def clean(monkeypatch):
    """An environment without a launcher's variables."""
    for name in os.environ.keys() - without_launchers().keys():
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def alone():
    yield
    gpc.destroy()


def launch(config=None, **given):
    arguments = {"rank": 0, "world_size": 1, "host": "localhost", "port": 29500, "verbose": False} | given
    launching.launch({} if config is None else config, **arguments)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "config.py").write_text("BATCH_SIZE = 128\ngradient_accumulation = 4\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_launch_command(script):
    program = ("-m", "torch.distributed.launch", "--nproc_per_node", "2")
    program += ("--master_addr", "localhost", "--master_port", str(free_port()), "script.py")
    done = subprocess.run(
        [sys.executable, *program, "--config", "./config.py"],
        cwd=script.parent,
        env=without_launchers() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},  # two ranks may have one GPU
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    check_output(done.stdout, done.stderr, num_ranks=2)


def test_one_launched_rank_without_a_parser(script):
    """As by the command, which the examples' test gives for one rank."""
    done = run_script(script, num_ranks=1, folder=script.parent, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert done.codes == [0], done.stderr
    check_output(done.stdout[0], done.stderr[0], num_ranks=1)


def check_output(stdout: str, stderr: str, num_ranks: int) -> None:
    torch.manual_seed(1024)
    line = f"ranks {num_ranks}, batch 128, drawn {torch.rand(()).item():.6f}"
    assert stdout.splitlines() == [line] * num_ranks
    said = [line for line in stderr.splitlines() if line.startswith("colossalai - ")]
    assert [line.split("INFO: ")[1] for line in said] == [
        "no GPU here: the backend is gloo instead of nccl",
        said[-2].split("INFO: ")[1],
        "only once",
    ]
    assert f"data parallel size {num_ranks}, " in said[-2]
    assert "destroy_process_group" not in stderr  # no group was left open


@pytest.mark.parametrize("spelling", ["--local_rank", "--local-rank"])
def test_the_parser_knows_both_spellings(spelling):
    parser = launching.get_default_parser()
    args = parser.parse_args([f"{spelling}=3", "--world_size", "4", "--backend", "gloo"])
    assert (args.local_rank, args.world_size, args.backend, args.config) == (3, 4, "gloo", None)


# --- alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_one_process_needs_no_network_and_no_port(capsys):
    launch({"BATCH_SIZE": 128}, host="host.that.is.nowhere", verbose=True)
    assert dist.get_world_size() == 1
    assert gpc.config.BATCH_SIZE == 128
    assert gpc.is_initialized(ParallelMode.DATA)
    assert gpc.get_group(ParallelMode.TENSOR).size() == 1
    assert len([line for line in capsys.readouterr().err.splitlines() if "launched" in line]) == 1


@pytest.mark.usefixtures("alone")
def test_the_seed_is_1024_unless_it_is_given(capsys):
    launch({"seed": 7})
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    gpc.set_seed(1024)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert "without effect in the config: seed = 7" in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_a_second_launch_is_refused_and_changes_nothing():
    launch({"A": 1})
    with pytest.raises(LaunchError, match="a second call") as caught:
        launch({"A": 2})
    assert isinstance(caught.value, RuntimeError)
    assert gpc.config.A == 1
    gpc.destroy()
    launch({"A": 2})
    assert gpc.config.A == 2


@pytest.mark.usefixtures("alone")
def test_features_that_another_key_hides_are_told(capsys):
    launch({"CONFIG": {"fp16": {}}})
    assert "CONFIG['fp16']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": None}, "launch_from_torch"),
        ({"rank": 1}, "rank < world_size"),
        ({"rank": -1}, "integer >= 0"),
        ({"world_size": 0}, "integer >= 1"),
        ({"world_size": 2.0}, "integer >= 1"),
        ({"local_rank": "0"}, "local_rank"),
        ({"host": ""}, "host"),
        ({"host": "a b"}, "host"),
        ({"host": None}, "host"),
        ({"port": 0}, "1 to 65535"),
        ({"port": "29500"}, "1 to 65535"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"backend": "smoke"}, "gloo"),
    ],
    ids=str,
)
def test_an_argument_that_is_refused_before_anything_is_done(given, said):
    gpc.load_config({"BEFORE": 1})
    with pytest.raises(ValueError, match=said):
        launch(**given)
    assert not dist.is_initialized()
    assert gpc.config == {"BEFORE": 1}


def test_a_config_that_is_refused_before_anything_is_done():
    with pytest.raises(ConfigException, match="clip_grad_norm"):
        launch({"gradient_clipping": 1.0})
    with pytest.raises(ConfigException, match="a dict"):
        launch(config=4)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "tcp://localhost:29500"),
        ("127.0.0.1", "tcp://127.0.0.1:29500"),
        ("::1", "tcp://[::1]:29500"),
        ("[::1]", "tcp://[::1]:29500"),
        ("node-1.cluster", "tcp://node-1.cluster:29500"),
    ],
)
def test_only_an_ipv6_address_is_in_brackets(host, address):
    assert launching._address(host, 29500) == address


# --- from other launchers --------------------------------------------------------------------------------------------

FROM_TORCH = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
FROM_OPENMPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
FROM_SLURM = {"SLURM_PROCID": "0", "SLURM_NPROCS": "1"}


def from_environment(kind):
    address = () if kind == "torch" else ("localhost", 29500)
    getattr(launching, f"launch_from_{kind}")({}, *address, verbose=False)


KINDS = [("torch", FROM_TORCH), ("openmpi", FROM_OPENMPI), ("slurm", FROM_SLURM)]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("kind", "variables"), KINDS, ids=[kind for kind, _ in KINDS])
def test_variables_of_a_launcher(clean, kind, variables):
    for name, value in variables.items():
        clean.setenv(name, value)
    from_environment(kind)
    assert gpc.world_size == 1


@pytest.mark.parametrize(
    ("kind", "missing"), [(kind, name) for kind, variables in KINDS for name in variables], ids=lambda value: value
)
def test_a_variable_that_is_missing_is_named(clean, kind, missing):
    for name, value in dict(KINDS)[kind].items():
        if name != missing:
            clean.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"no {missing}"):
        from_environment(kind)
    clean.setenv(missing, "" if missing == "MASTER_ADDR" else "one")
    with pytest.raises(RuntimeError, match=missing):
        from_environment(kind)


# --- over ranks ------------------------------------------------------------------------------------------------------

JOIN = """
import os
import sys
import torch
import torch.distributed as dist
from macrobatch.colossalai.launching import launch
rank, host, port = int(os.environ["NUMBER"]), sys.argv[1], int(sys.argv[2])
launch({}, rank=rank, world_size=2, host=host, port=port, verbose=False)
total = torch.tensor(float(rank))
dist.all_reduce(total)
sys.stdout.write(str(total.item()))
"""


def test_two_processes_meet_at_an_ipv6_address(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(JOIN)
    environ = {"CUDA_VISIBLE_DEVICES": ""}  # two ranks may have one GPU
    processes = [{"NUMBER": "0"}, {"NUMBER": "1"}]
    done = run_script(script, "::1", str(free_port()), processes=processes, environ=environ, timeout_s=90)
    if any("Address family not supported" in err or "Cannot assign requested address" in err for err in done.stderr):
        pytest.skip("no IPv6 on this machine")
    assert done.stdout == ["1.0", "1.0"], done
