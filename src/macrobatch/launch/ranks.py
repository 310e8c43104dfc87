"""Which rank this process is, and where the ranks meet, from the variables of whoever started it."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from macrobatch.errors import ArgumentError
from macrobatch.launch.hostlist import first_host, repeated
from macrobatch.ranks import Ranks

__all__ = ["Rendezvous", "detect", "from_openmpi", "from_pmi", "from_slurm", "from_torch"]

Environ = Mapping[str, str]

_DEFAULT_PORT = 29500  # of torch.distributed.launch
_LOOPBACK = ("localhost", "127.", "::1", "[::1]")
_JOB_IDS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """A process's numbers, and the address at which all ranks meet.

    Attributes:
        ranks: which rank this process is.
        launcher: who started it: "torch", "openmpi", "slurm", "pmi", or "none".
        address: host of rank 0; None if there are no other ranks.
        port: a port there, the same on all ranks; None if there are no other ranks.
    """

    ranks: Ranks = field(default_factory=Ranks)
    launcher: str = "none"
    address: str | None = None
    port: int | None = None

    def variables(self) -> dict[str, str]:
        """The same as torch.distributed's environment variables.

        ```pycon
        >>> detect({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}).variables()
        {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1'}

        ```
        """
        found = {
            "RANK": self.ranks.rank,
            "WORLD_SIZE": self.ranks.world_size,
            "LOCAL_RANK": self.ranks.local_rank,
            "LOCAL_WORLD_SIZE": self.ranks.local_world_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in found.items() if value is not None}


def detect(environ: Environ = os.environ) -> Rendezvous:
    """This process's place, by the first launcher that has set its variables; alone if none has.

    In this order: torchrun, torch.distributed.launch and all that set RANK; OpenMPI; MPICH and Intel MPI; Slurm.
    (MPI inside of a Slurm job is started by Slurm too, so Slurm comes last.)

    Raises:
        ArgumentError: variables that are missing, are not numbers, or contradict each other.

    ```pycon
    >>> detect({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x2)",
    ...     "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[01-02]", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    Rendezvous(ranks=Ranks(rank=3, world_size=4, local_rank=1, local_world_size=2), launcher='slurm', address='node01',
    port=20007)
    >>> detect({}).ranks
    Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)

    ```
    """
    for find in (from_torch, from_openmpi, from_pmi, from_slurm):
        found = find(environ)
        if found is not None:
            return found
    return Rendezvous()


def from_torch(environ: Environ = os.environ) -> Rendezvous | None:
    """By RANK and WORLD_SIZE. None if neither is there.

    LOCAL_RANK and LOCAL_WORLD_SIZE may be missing where they follow from the rest: one process per pod in a Kubernetes
    PyTorchJob, or all on one machine, which a missing MASTER_ADDR or one like `localhost` tells.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    given = _present(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank = int(environ["LOCAL_RANK"]) if "LOCAL_RANK" in environ else None
        local_size = int(environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in environ else None
    except (KeyError, ValueError):
        raise ArgumentError(
            "environment",
            given=given,
            expected="RANK and WORLD_SIZE as integers (LOCAL_RANK and LOCAL_WORLD_SIZE beside them)",
            fix="start the script with torchrun, or unset these variables",
        ) from None
    _refuse_leftovers(environ, given)
    if local_rank is None and environ.get("PET_NNODES") == str(world_size):
        local_rank, local_size = 0, 1  # a PyTorchJob whose container runs the script without torchrun
    ranks = _ranks(environ, rank, world_size, local_rank, local_size)
    return _rendezvous(environ, ranks, "torch")


def from_openmpi(environ: Environ = os.environ) -> Rendezvous | None:
    """By the variables of OpenMPI's mpirun. None if they are not there."""
    return _from_mpi(
        environ,
        "openmpi",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    )


def from_pmi(environ: Environ = os.environ) -> Rendezvous | None:
    """By the variables of MPICH's and Intel MPI's mpiexec. None if they are not there, or are Slurm's own."""
    if "SLURM_STEP_ID" in environ and "MPI_LOCALRANKID" not in environ:
        return None
    return _from_mpi(environ, "pmi", ("PMI_RANK", "PMI_SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"))


def from_slurm(environ: Environ = os.environ) -> Rendezvous | None:
    """By the variables of Slurm's srun, those of the step before those of the job. None if they are not there.

    A batch script has them as well, for itself. What it runs without srun is one process, however many tasks it asked
    for, and hears so in a warning.
    """
    if "SLURM_PROCID" not in environ:
        return None
    size = _first(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    rank, world_size = _integers(environ, "SLURM_PROCID", size)
    if "SLURM_JOB_ID" in environ and not {"SLURM_STEP_ID", "SLURM_STEPID"} & environ.keys():
        if world_size > 1:
            warnings.warn(
                f"this Slurm job has {world_size} tasks, but srun did not start this process, so it runs alone. "
                "To run on all tasks, start it with srun",
                stacklevel=2,
            )
        return None
    local_rank = _integers(environ, "SLURM_LOCALID")[0] if "SLURM_LOCALID" in environ else None
    ranks = _ranks(environ, rank, world_size, local_rank, _slurm_local_size(environ, world_size))
    return _rendezvous(environ, ranks, "slurm")


def _slurm_local_size(environ: Environ, world_size: int) -> int | None:
    name = _first(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if name in environ:
        parts = repeated(environ[name])
        if sum(number * times for number, times in parts) != world_size:
            raise _unusable(
                _present(environ, name, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
                "tasks per node that add up to the number of tasks",
                "start the ranks with srun, or unset what is left over from another job",
            )
        node = _integers(environ, "SLURM_NODEID")[0] if "SLURM_NODEID" in environ else 0
        for number, times in parts:
            if 0 <= node < times:
                return number
            node -= times
        raise _unusable(
            _present(environ, name, "SLURM_NODEID"),
            "SLURM_NODEID to be one of the nodes",
            "start the ranks with srun, or unset what is left over from another job",
        )
    if "SLURM_NTASKS_PER_NODE" in environ:
        return min(_integers(environ, "SLURM_NTASKS_PER_NODE")[0], world_size)  # it is an upper limit
    return None


def _from_mpi(environ: Environ, launcher: str, everywhere: tuple[str, str], here: tuple[str, str]) -> Rendezvous | None:
    if not set(everywhere) & environ.keys():
        return None
    rank, world_size = _integers(environ, *everywhere)
    local_rank, local_size = _integers(environ, *here) if set(here) & environ.keys() else (None, None)
    return _rendezvous(environ, _ranks(environ, rank, world_size, local_rank, local_size), launcher)


def _ranks(environ: Environ, rank: int, world_size: int, local_rank: int | None, local_size: int | None) -> Ranks:
    """Ranks whose local numbers may have to be inferred: one rank, or all on this machine."""
    address = environ.get("MASTER_ADDR", "")
    if (local_rank is None or local_size is None) and world_size > 1 and address and not address.startswith(_LOOPBACK):
        raise _unusable(
            {"MASTER_ADDR": address} | _present(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            "to be told how many ranks share a machine, where there may be several",
            "start the script with torchrun, or export LOCAL_RANK and LOCAL_WORLD_SIZE "
            "(0 and 1 if each machine has one process)",
        )
    local_rank = rank if local_rank is None else local_rank
    local_size = world_size if local_size is None else local_size
    if local_size > world_size:
        raise _unusable(
            f"{local_size} ranks on this machine and {world_size} in all",
            "no more ranks on a machine than in all",
            "unset what is left over from another launcher",
        )
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_size)


def _rendezvous(environ: Environ, ranks: Ranks, launcher: str) -> Rendezvous:
    if ranks.world_size == 1:
        return Rendezvous(ranks=ranks, launcher=launcher)
    return Rendezvous(ranks=ranks, launcher=launcher, address=_address(environ, ranks), port=_port(environ))


def _address(environ: Environ, ranks: Ranks) -> str:
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    if ranks.local_world_size == ranks.world_size:
        return "127.0.0.1"
    hosts = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if hosts in environ:
        return first_host(environ[hosts])
    raise _unusable(
        f"{ranks.world_size} ranks, {ranks.local_world_size} of them on this machine, and no MASTER_ADDR",
        "the host of rank 0",
        'pass it on: mpirun -x MASTER_ADDR="$(hostname)" if rank 0 runs where mpirun does',
    )


def _port(environ: Environ) -> int:
    """MASTER_PORT, or one that follows from the job's number, so that all ranks find the same one without asking."""
    if "MASTER_PORT" in environ:
        (port,) = _integers(environ, "MASTER_PORT")
        if not 1 <= port <= 65535:
            raise _unusable(_present(environ, "MASTER_PORT"), "a port, 1 to 65535", "unset it, or choose a free one")
        return port
    job = environ.get(_first(environ, *_JOB_IDS))
    if job is None:
        return _DEFAULT_PORT
    number = int(job) if job.isdecimal() else zlib.crc32(job.encode())
    step = environ.get("SLURM_STEP_ID", "0")
    # Jobs with neighbouring numbers get ports of their own, and so do the steps of one job. No system hands out ports
    # from 20000 to 29999 by itself.
    return 20000 + (number + 2503 * (int(step) if step.isdecimal() else 0)) % 10000


def _refuse_leftovers(environ: Environ, given: dict[str, str]) -> None:
    """RANK from elsewhere in a process of mpirun's: every process would take itself for the same rank.

    (torchrun inside of mpirun is fine, and sets TORCHELASTIC_RUN_ID.)
    """
    theirs = _present(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    ours = [given["RANK"], given["WORLD_SIZE"]]
    if len(theirs) == len(ours) and list(theirs.values()) != ours and "TORCHELASTIC_RUN_ID" not in environ:
        raise _unusable(
            {"RANK": given["RANK"], "WORLD_SIZE": given["WORLD_SIZE"]} | theirs,
            "torch's variables and OpenMPI's to agree",
            "unset RANK and WORLD_SIZE before mpirun",
        )


def _integers(environ: Environ, *names: str) -> list[int]:
    try:
        return [int(environ[name]) for name in names]
    except (KeyError, ValueError):
        raise _unusable(
            _present(environ, *names),
            " and ".join(names) + (" as integers" if len(names) > 1 else " as an integer"),
            "start the ranks with their launcher, or unset these variables",
        ) from None


def _first(environ: Environ, *names: str) -> str:
    """The first of these names that is there, or else the last."""
    return next((name for name in names if name in environ), names[-1])


def _present(environ: Environ, *names: str) -> dict[str, str]:
    return {name: environ[name] for name in names if name in environ}


def _unusable(given: object, expected: str, fix: str) -> ArgumentError:
    return ArgumentError("environment", given=given, expected=expected, fix=fix)
