"""Every environment that a launcher may leave, as its processes see it, and what is wrong with broken ones."""

from __future__ import annotations

import pytest

from macrobatch.errors import ArgumentError
from macrobatch.launch.hostlist import first_host, repeated
from macrobatch.launch.ranks import Rendezvous, detect, from_slurm, from_torch
from macrobatch.ranks import Ranks

# Captured from the launchers themselves; what is not of interest is left out.
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "40123",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu7,n[01-02]",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu7,n[01-02]",
    "SLURM_NPROCS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu7,n[01-02]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
SLURM_BATCH = {  # of the batch script itself, before any srun
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "n01",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_MCA_ess_base_jobid": "845479937",
    "PMIX_NAMESPACE": "845479937",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def ranks(rank: int, world_size: int, local_rank: int, local_world_size: int) -> Ranks:
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Rendezvous()),
        ({"HOME": "/root", "LOCAL_RANK": "1"}, Rendezvous()),
        (TORCHRUN, Rendezvous(ranks=ranks(3, 4, 1, 2), launcher="torch", address="host-a", port=40123)),
        (SLURM, Rendezvous(ranks=ranks(3, 5, 1, 2), launcher="slurm", address="gpu7", port=24711)),
        (OPENMPI, Rendezvous(ranks=ranks(1, 2, 1, 2), launcher="openmpi", address="127.0.0.1", port=29937)),
        (MPICH, Rendezvous(ranks=ranks(1, 2, 1, 2), launcher="pmi", address="127.0.0.1", port=29500)),
    ],
    ids=["alone", "no ranks", "torchrun", "slurm", "openmpi", "mpich"],
)
def test_each_launcher_is_found(environ, expected):
    assert detect(environ) == expected


def test_the_process_environment_is_the_default(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert detect().ranks.rank == 3


def test_variables_are_what_torch_reads():
    assert detect(TORCHRUN).variables() == {
        name: value for name, value in TORCHRUN.items() if name not in ("GROUP_RANK", "TORCHELASTIC_RUN_ID")
    }
    assert detect(detect(SLURM).variables()) == Rendezvous(
        ranks=ranks(3, 5, 1, 2), launcher="torch", address="gpu7", port=24711
    )


# --- torchrun and what else sets RANK --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, ranks(1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, ranks(1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.1.1", "LOCAL_RANK": "1"}, ranks(1, 2, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "host-a"}, ranks(0, 1, 0, 1)),
        # A Kubernetes PyTorchJob of three pods that runs the script itself.
        ({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "PET_NNODES": "3"}, ranks(2, 3, 0, 1)),
    ],
    ids=str,
)
def test_local_ranks_are_inferred_where_they_follow(environ, expected):
    assert detect(environ).ranks == expected


@pytest.mark.parametrize("local", [{}, {"LOCAL_RANK": "0"}, {"LOCAL_WORLD_SIZE": "1"}], ids=str)
def test_local_ranks_are_not_guessed_where_there_may_be_several_machines(local):
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host-a"} | local
    with pytest.raises(ArgumentError, match=r"host-a.*how many ranks share a machine.*LOCAL_WORLD_SIZE") as caught:
        detect(environ)
    assert caught.value.given == {"MASTER_ADDR": "host-a"} | local


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "1.0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "a"},
    ],
    ids=str,
)
def test_incomplete_or_no_numbers_is_refused_showing_them(environ):
    with pytest.raises(ArgumentError, match=r"given .*RANK and WORLD_SIZE as integers.*torchrun") as caught:
        detect(environ | {"HOME": "/root"})
    assert caught.value.given == environ  # nothing else of the environment is shown


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_together_are_refused(environ):
    with pytest.raises(ArgumentError, match="0 <= rank < world_size"):
        detect(environ)


def test_more_local_ranks_than_ranks_are_refused():
    with pytest.raises(ArgumentError, match=r"4 ranks on this machine and 2 in all.*unset"):
        detect({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})


def test_address_and_port_are_torchs_own_defaults_on_one_machine():
    found = detect({"RANK": "1", "WORLD_SIZE": "2"})
    assert (found.address, found.port) == ("127.0.0.1", 29500)
    found = detect({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "1234"})
    assert (found.address, found.port) == ("127.0.0.1", 1234)


def test_several_machines_need_an_address():
    environ = {name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}
    with pytest.raises(ArgumentError, match=r"4 ranks, 2 of them on this machine.*the host of rank 0.*MASTER_ADDR"):
        detect(environ)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", ""])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ArgumentError, match="MASTER_PORT"):
        detect(TORCHRUN | {"MASTER_PORT": port})


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "node", "local_rank", "expected"),
    [("0", "0", "0", ranks(0, 5, 0, 2)), ("3", "1", "1", ranks(3, 5, 1, 2)), ("4", "2", "0", ranks(4, 5, 0, 1))],
)
def test_slurm_counts_the_tasks_of_this_node(rank, node, local_rank, expected):
    environ = SLURM | {"SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": local_rank}
    assert from_slurm(environ) == Rendezvous(ranks=expected, launcher="slurm", address="gpu7", port=24711)


def test_slurm_variables_of_the_job_stand_in_for_those_of_the_step():
    environ = {
        "SLURM_PROCID": "2",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "node[08-09,3]",
    }
    assert detect(environ) == Rendezvous(ranks=ranks(2, 4, 0, 2), launcher="slurm", address="node08", port=29500)


def test_slurm_takes_what_the_step_says_before_what_the_job_says():
    job = {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8", "SLURM_JOB_NODELIST": "other"}
    assert detect(SLURM | job) == detect(SLURM)


def test_slurm_tasks_per_node_are_an_upper_limit():
    environ = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "8"}
    assert detect(environ).ranks == ranks(1, 2, 1, 2)


def test_slurm_jobs_and_steps_beside_each_other_have_ports_of_their_own():
    ports = {
        detect(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in range(9990, 10050)
        for step in range(4)
    }
    assert len(ports) == 60 * 4
    assert all(20000 <= port < 30000 for port in ports if port is not None)


def test_one_slurm_task_needs_no_address():
    environ = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    environ |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert detect(environ) == Rendezvous(launcher="slurm")


def test_a_batch_script_without_srun_is_alone_and_hears_so():
    with pytest.warns(UserWarning, match=r"2 tasks, but srun did not start this process"):
        assert detect(SLURM_BATCH) == Rendezvous()
    assert detect(SLURM_BATCH | {"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}) == Rendezvous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "three"}, "SLURM_PROCID and SLURM_STEP_NUM_TASKS as integers"),
        ({"SLURM_STEP_NUM_TASKS": ""}, "SLURM_PROCID and SLURM_STEP_NUM_TASKS as integers"),
        ({"SLURM_STEP_NUM_TASKS": "6"}, "tasks per node that add up"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2"}, r'numbers as in "2\(x3\),1"'),
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, r'numbers as in "2\(x3\),1"'),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID to be one of the nodes"),
        ({"SLURM_NODEID": "-1"}, "SLURM_NODEID to be one of the nodes"),
        ({"SLURM_NODEID": "n1"}, "SLURM_NODEID as an integer"),
        ({"SLURM_LOCALID": "2"}, "0 <= rank < world_size"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID as an integer"),
        ({"SLURM_PROCID": "5"}, "0 <= rank < world_size"),
        ({"SLURM_STEP_NODELIST": "n[01"}, 'names as in "node'),
        ({"SLURM_STEP_NODELIST": ""}, 'names as in "node'),
    ],
    ids=str,
)
def test_broken_slurm_variables_are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        detect(SLURM | change)


def test_slurm_without_a_number_of_tasks_is_refused():
    with pytest.raises(ArgumentError, match="SLURM_PROCID and SLURM_NPROCS as integers"):
        detect({"SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("vm", "vm"),
        ("node[01-03,7]", "node01"),
        ("node[7,01-03],x", "node7"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]n[10-12]-ib", "rack2n10-ib"),
        ("[5-9]", "5"),
        (" host-a.example.org ", "host-a.example.org"),
    ],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    "hosts", ["", ",a", "n[", "n]", "n[]", "n[a-b]", "n[1-]", "n[1,]", "n[[1]]", "a b", "(null) x"]
)
def test_no_list_of_hosts(hosts):
    with pytest.raises(ArgumentError, match="MASTER_ADDR"):
        first_host(hosts)


def test_repeated_numbers():
    assert repeated("4") == [(4, 1)]
    assert repeated("2(x3),1,8(x10)") == [(2, 3), (1, 1), (8, 10)]


# --- MPI -------------------------------------------------------------------------------------------------------------


def test_openmpi_on_several_machines_needs_an_address():
    environ = OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ArgumentError, match=r"4 ranks, 2 of them on this machine.*mpirun -x MASTER_ADDR"):
        detect(environ)
    assert detect(environ | {"MASTER_ADDR": "host-a", "MASTER_PORT": "1234"}).address == "host-a"


def test_mpi_inside_of_a_slurm_job_is_mpi_and_finds_the_first_host():
    environ = SLURM | OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    assert detect(environ).launcher == "openmpi"
    assert detect(environ).address == "gpu7"
    assert detect(SLURM | MPICH).launcher == "pmi"


def test_pmi_variables_of_srun_leave_it_to_slurm():
    assert detect(SLURM | {"PMI_RANK": "3", "PMI_SIZE": "5"}).launcher == "slurm"


def test_pmi_alone_is_taken_for_one_machine():
    assert detect({"PMI_RANK": "1", "PMI_SIZE": "2"}).ranks == ranks(1, 2, 1, 2)


def test_jobs_of_openmpi_5_have_ports_of_their_own():
    ports = {detect(OPENMPI | {"PMIX_NAMESPACE": f"prterun-host-a-{pid}@1"}).port for pid in (1000, 1001, 1002)}
    assert len(ports) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE as integers"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": ""}, "OMPI_COMM_WORLD_LOCAL_RANK and OMPI_COMM_WORLD_LOCAL_SIZE as integers"),
        ({"OMPI_COMM_WORLD_RANK": "2"}, "0 <= rank < world_size"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, "no more ranks on a machine than in all"),
    ],
    ids=str,
)
def test_broken_openmpi_variables_are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        detect(OPENMPI | change)


def test_half_of_the_variables_is_refused():
    for environ in (OPENMPI, MPICH):
        for name in ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"):
            if name in environ:
                with pytest.raises(ArgumentError, match=name):
                    detect({key: value for key, value in environ.items() if key != name})


def test_ranks_left_over_in_a_process_of_mpirun_are_refused():
    with pytest.raises(ArgumentError, match=r"torch's variables and OpenMPI's to agree.*unset RANK"):
        detect(OPENMPI | {"RANK": "0", "WORLD_SIZE": "2"})
    agreed = OPENMPI | detect(OPENMPI).variables()  # as `init` leaves them
    assert detect(agreed).ranks == ranks(1, 2, 1, 2)
    assert detect(OPENMPI | TORCHRUN) == from_torch(TORCHRUN)  # torchrun inside of mpirun
