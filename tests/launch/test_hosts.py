"""Two hosts, which are network namespaces with names and addresses of their own, and all ways to run ranks on both.

host-1 198.51.100.1 ── one cable ── 198.51.100.2 host-2
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ADDRESSES = {"host-1": "198.51.100.1", "host-2": "198.51.100.2"}  # kept for documentation: nobody has them
ETC = Path("/etc/netns")  # what `ip netns exec` shows instead of files in /etc


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


class Hosts:
    """What stands in for several machines. Made by root alone."""

    def __init__(self) -> None:
        self._namespaces = {host: f"macrobatch-{os.getpid()}-{host[-1]}" for host in ADDRESSES}

    def set_up(self) -> None:
        for namespace in self._namespaces.values():
            ip("netns", "add", namespace)
            (ETC / namespace).mkdir(parents=True)
            names = "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
            (ETC / namespace / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        one, two = self._namespaces.values()
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
        for host, namespace in self._namespaces.items():
            ip("-n", namespace, "address", "add", f"{ADDRESSES[host]}/24", "dev", "cable")
            ip("-n", namespace, "link", "set", "cable", "up")
            ip("-n", namespace, "link", "set", "lo", "up")

    def command(self, host: str, *command: str) -> tuple[str, ...]:
        """A command as on this host."""
        enter = ("ip", "netns", "exec", self._namespaces[host], "unshare", "--uts")
        return (*enter, "sh", "-c", 'hostname "$0" && exec "$@"', host, *command)

    def tear_down(self) -> None:
        for namespace in self._namespaces.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", namespace)
            shutil.rmtree(ETC / namespace, ignore_errors=True)
        with contextlib.suppress(OSError):
            ETC.rmdir()  # unless others have something there


@pytest.fixture
def hosts():
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}, which is not on this machine")
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    made = Hosts()
    try:
        try:
            made.set_up()
            subprocess.run(made.command("host-1", "true"), check=True, capture_output=True, text=True)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"no network namespaces here: {error} {getattr(error, 'stderr', '')}")
        yield made
    finally:
        made.tear_down()


def test_two_hosts_of_two_ranks_under_torchrun(hosts, start, cli, job, seen, check):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=host-1:29400")
    ranks = seen(
        start(*hosts.command("host-1", *torchrun, *meeting, job)),
        # `macrobatch launch` is a torchrun like any other.
        start(*hosts.command("host-2", *cli, "launch", "--nproc=2", "--nnodes=2", "--rdzv=host-1:29400", job)),
    )
    check(ranks, local_ranks=[0, 1, 0, 1])
    assert [each["host"] for each in ranks] == ["host-1", "host-1", "host-2", "host-2"]
    assert {each["local_world_size"] for each in ranks} == {2}


def test_two_hosts_of_a_slurm_job(hosts, start, job, seen, check):
    common = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "host-[1-2]",
    }

    def task(number: int, host: str) -> subprocess.Popen[str]:
        mine = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURM_LOCALID": "0"}
        return start(*hosts.command(host, sys.executable, job), **common, **mine)

    ranks = seen(*(task(number, host) for number, host in enumerate(ADDRESSES)))
    check(ranks, local_ranks=[0, 0])
    assert [each["host"] for each in ranks] == ["host-1", "host-2"]


def test_two_pods_of_a_pytorchjob(hosts, start, cli, job, seen, check):
    common = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
        "PET_MASTER_ADDR": "host-1",
        "PET_MASTER_PORT": "23456",
        "MASTER_ADDR": "host-1",
        "MASTER_PORT": "23456",
        "WORLD_SIZE": "2",
    }

    def pod(number: int, host: str) -> subprocess.Popen[str]:
        mine = {"PET_NODE_RANK": str(number), "RANK": str(number)}
        return start(*hosts.command(host, *cli, "launch", job), **common, **mine)

    ranks = seen(*(pod(number, host) for number, host in enumerate(ADDRESSES)))
    check(ranks, local_ranks=[0, 0])
    assert [each["host"] for each in ranks] == ["host-1", "host-2"]
