"""`macrobatch launch`: torchrun with defaults for one machine, and the exit code of the rank that failed."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from macrobatch import env
from macrobatch.errors import ArgumentError
from macrobatch.launch.ranks import detect

__all__ = ["Options", "Outcome", "run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to start a script. What is None follows from the machine, or from torchrun's own PET_ variables.

    Attributes:
        nproc: ranks on this machine; by default one per GPU, one if there is none.
        nnodes: machines, "2", or "1:4" for any number from 1 to 4.
        node_rank: number of this machine, 0 for the one that `rdzv` names. Without it, torchrun numbers the machines.
        rdzv: where several machines meet, "host:port".
        module: whether the script is the name of a module, as for `python -m`.
    """

    nproc: int | None = None
    nnodes: str | None = None
    node_rank: int | None = None
    rdzv: str | None = None
    module: bool = False

    def arguments(self, environ: Mapping[str, str] = os.environ) -> list[str]:
        """The same for torchrun, all that comes before the script.

        Raises:
            ArgumentError: options that do not fit together.

        ```pycon
        >>> Options(nproc=2).arguments({})
        ['--nproc-per-node=2', '--nnodes=1', '--rdzv-backend=c10d', '--rdzv-endpoint=localhost:0',
        '--local-addr=localhost']
        >>> Options(nproc=8, nnodes="2", rdzv="node1:29400").arguments({})
        ['--nproc-per-node=8', '--nnodes=2', '--rdzv-backend=c10d', '--rdzv-endpoint=node1:29400']

        ```
        """
        found = [f"--nproc-per-node={self._nproc(environ)}"]
        nnodes = self.nnodes or environ.get("PET_NNODES", "1")
        lowest, highest = _checked_nnodes(nnodes)
        if highest == 1:
            self._check_alone(environ)
            found += ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
        else:
            found += [f"--nnodes={nnodes}", *self._meeting(environ, lowest, highest)]
        return [*found, "--module"] if self.module else found

    def _nproc(self, environ: Mapping[str, str]) -> int:
        if self.nproc is not None:
            return self.nproc
        wish = environ.get("PET_NPROC_PER_NODE", "auto")
        return (torch.cuda.device_count() or 1) if wish == "auto" else torchrun.determine_local_world_size(wish)

    def _check_alone(self, environ: Mapping[str, str]) -> None:
        if self.rdzv is not None or self.node_rank is not None:
            raise ArgumentError(
                "launch",
                given="--rdzv or --node-rank for one machine",
                expected="--nnodes with them",
                fix="add --nnodes with the number of machines, or leave them out",
            )
        found = detect(environ)
        if found.launcher in ("slurm", "openmpi", "pmi") and found.ranks.world_size > 1:
            raise ArgumentError(
                "launch",
                given=f"a process that {found.launcher} started {found.ranks.world_size} times",
                expected="to be started once: each would start a job of its own",
                fix="start the script itself that way (srun python train.py), or add --nnodes and --rdzv",
            )

    def _meeting(self, environ: Mapping[str, str], lowest: int, highest: int) -> list[str]:
        if self.rdzv is None:
            if environ.keys() & {"PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"}:
                return [] if self.node_rank is None else [f"--node-rank={self.node_rank}"]
            raise ArgumentError(
                "--rdzv",
                given=None,
                expected="an address at which the machines meet",
                fix="pass --rdzv HOST:PORT on every machine, HOST being one of them",
            )
        _checked_meeting(self.rdzv)
        if self.node_rank is None:
            return ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.rdzv}"]
        if lowest != highest or not 0 <= self.node_rank < highest:
            raise ArgumentError(
                "--node-rank",
                given=f"{self.node_rank} of {self.nnodes} machines",
                expected="a fixed number of machines, and 0 to one less than it",
                fix="leave --node-rank out and let torchrun number the machines",
            )
        host, port = _checked_meeting(self.rdzv)
        return [
            "--rdzv-backend=static",
            f"--node-rank={self.node_rank}",
            f"--master-addr={host}",
            f"--master-port={port}",
        ]


class Outcome(NamedTuple):
    """How a job ended: the exit code, 0 if all is well, and otherwise a line that says what happened."""

    exit_code: int
    failure: str | None = None


def run(script: str, arguments: Sequence[str], options: Options) -> Outcome:
    """Start a script on all ranks of this machine and wait for them.

    Each rank gets its share of the physical cores as OMP_NUM_THREADS, unless that is set.

    Returns:
        The exit code of the rank that failed first; 128 + N if that was signal N.

    Raises:
        ArgumentError: options that do not fit together, or no such script.
    """
    before = options.arguments()
    if not options.module and not Path(script).exists():
        raise ArgumentError(
            "launch",
            given=f"the script {script!r}",
            expected="a file that is there",
            fix="check the path from the folder you are in; a module, as for python -m, goes with --module",
        )
    parsed = torchrun.parse_args([*before, script])
    parsed.training_script_args = list(arguments)  # torchrun's parser trips over some that resemble its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, env.num_cores() // int(parsed.nproc_per_node))))
    try:
        torchrun.run(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ending = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            ending = signal.Signals(-failure.exitcode).name
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        return Outcome(code, f"rank {rank} ended with {ending}; what it said itself is above")
    except SignalException as error:
        return Outcome(128 + error.sigval, f"ended by {signal.Signals(error.sigval).name}")
    return Outcome(0)


def _checked_meeting(rdzv: str) -> tuple[str, int]:
    """Host and port of an address; without a port, torchrun's own."""
    host, colon, port = rdzv.rpartition(":")
    if not colon:
        host, port = rdzv, "29500"
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ArgumentError(
            "--rdzv",
            given=repr(rdzv),
            expected="HOST:PORT, with a port from 1 to 65535",
            fix="pass --rdzv HOST:29400, HOST being the name of one of the machines",
        )
    return host, int(port)


def _checked_nnodes(nnodes: str) -> tuple[int, int]:
    lowest, _, highest = nnodes.partition(":")
    if not lowest.isdecimal() or not (highest or lowest).isdecimal() or not 1 <= int(lowest) <= int(highest or lowest):
        raise ArgumentError(
            "--nnodes",
            given=repr(nnodes),
            expected='a number of machines, at least 1, or a range MIN:MAX with 1 <= MIN <= MAX, as in "1:4"',
            fix="pass --nnodes 2, for example",
        )
    return int(lowest), int(highest or lowest)
