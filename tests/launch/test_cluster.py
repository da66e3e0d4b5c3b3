"""The place of a process, found in environments as real schedulers set them."""

import importlib

import jax
import pytest

from shardtrain import UserError, compat
from shardtrain.launch import Cluster, Limits, connect, detect, restarts
from shardtrain.launch.connect import devices_of

# srun -N3 --ntasks-per-node=2 of Slurm 22.05, task 3
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "sth[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# mpirun -n 2 of Open MPI 4.1.4, rank 1 on the launcher's host and on another
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
POD = {
    "JOB_COMPLETION_INDEX": "2",
    "SHARDTRAIN_PROCESSES": "4",
    "SHARDTRAIN_COORDINATOR": "a-train-0-0.a:61440",
}
LOCAL = {
    "SHARDTRAIN_LOCAL": "1",
    "SHARDTRAIN_PROCESSES": "2",
    "SHARDTRAIN_PROCESS_ID": "1",
    "SHARDTRAIN_COORDINATOR": "127.0.0.1:61999",
}


def test_nothing_means_one_process():
    assert detect({}) is None
    assert detect({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None  # a batch script
    assert detect(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert detect({}, "node1:5", 1, 0) is None


def test_slurm():
    found = detect(SLURM)
    assert found == Cluster("Slurm", "sth1:61447", 6, 3, (1, 2), 3, True)
    assert detect(SLURM | {"SLURM_NODEID": "0"}).apart is False
    assert detect(SLURM | {"JAX_COORDINATOR_PORT": "5000"}).coordinator == "sth1:5000"
    one_node = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}
    assert detect(one_node).coordinator == "127.0.0.1:61447"
    assert detect(one_node).is_local
    ports = {
        detect(SLURM | more).coordinator
        for more in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "2"})
    }
    assert len(ports) == 3  # a second step, or a restart, does not meet the first


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("gpu[3-4]-ib", "gpu3-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert detect(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61447"


def test_uneven_tasks():
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2(x2)", "SLURM_NODEID": "2"}
    assert detect(env).local == (1, 2)
    assert detect(env | {"SLURM_NODEID": "0"}).local == (1, 3)


def test_open_mpi():
    assert detect(OPEN_MPI_4) == Cluster("Open MPI", "127.0.0.1:62624", 2, 1, (1, 2), 1, False)
    far = OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert detect(far).coordinator == "10.96.0.1:62624"
    five = {k: v for k, v in far.items() if "orte" not in k} | {"PMIX_NAMESPACE": "prterun-login-1-4242@1"}
    assert detect(five).coordinator == "login-1:61586"
    # Open MPI's daemons on other nodes are steps of Slurm themselves.
    assert detect(SLURM | OPEN_MPI_4).scheduler == "Open MPI"


def test_kubernetes(monkeypatch):
    assert detect(POD) == Cluster("Kubernetes", "a-train-0-0.a:61440", 4, 2, None, 4, True)
    monkeypatch.setattr("socket.getfqdn", lambda: "cnn-2.pods.default.svc.cluster.local")
    bare = {"JOB_COMPLETION_INDEX": "2", "SHARDTRAIN_PROCESSES": "4"}
    assert detect(bare).coordinator == "cnn-0.pods.default.svc.cluster.local:61440"
    assert detect(bare | {"SHARDTRAIN_PROCESSES": "1"}) is None
    with pytest.raises(UserError, match="set SHARDTRAIN_PROCESSES in its manifest"):
        detect({"JOB_COMPLETION_INDEX": "2"})


def test_launch_local_wins_over_an_allocation():
    assert detect(SLURM | LOCAL) == Cluster("launch local", "127.0.0.1:61999", 2, 1, (1, 2), 1)


def test_flags_win():
    assert detect({}, "node1:5", 2, 1) == Cluster("flags", "node1:5", 2, 1, source="--coordinator")
    assert detect(LOCAL, coordinator="node1:5").coordinator == "node1:5"
    assert detect({"JAX_COORDINATOR_ADDRESS": "node9:7"}, None, 2, 1).coordinator == "node9:7"


def test_who_named_the_coordinator():
    theirs = {"JAX_COORDINATOR_ADDRESS": "node9:7"}
    assert detect(SLURM).given == ""
    assert detect(SLURM | theirs).given == "JAX_COORDINATOR_ADDRESS=node9:7"
    assert detect(SLURM | theirs, "node1:5").given == "--coordinator node1:5"
    ours = {name: value for name, value in LOCAL.items() if name != "SHARDTRAIN_LOCAL"}
    assert detect(ours).given == "SHARDTRAIN_COORDINATOR=127.0.0.1:61999"
    for port in ("0", "-1", "70000"):
        with pytest.raises(UserError, match=f"^JAX_COORDINATOR_PORT={port}: set this variable to a port"):
            detect(SLURM | {"JAX_COORDINATOR_PORT": port})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("node1:5", None, None), "--processes ?, --process-id ?"),
        ((None, 2, 0), "--coordinator ?"),
        (("node1:5", 2, None), "--process-id ?"),
        (("node1:5", 2, 2), "number the processes from 0 to 1"),
        (("node1:5", -3, 0), "--processes ?"),
    ],
)
def test_half_a_job_is_refused(given, message):
    with pytest.raises(UserError) as error:
        detect({}, *given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "env",
    [
        {"SHARDTRAIN_PROCESSES": "abc"},
        {"SHARDTRAIN_PROCESS_ID": "x", "SHARDTRAIN_PROCESSES": "2"},
        {"SLURM_PROCID": "x", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_a_variable_that_is_no_number_is_named(env):
    name, value = next(iter(env.items()))
    with pytest.raises(UserError, match=f"^{name}={value}: set this variable to a whole number"):
        detect(env)
    with pytest.raises(UserError, match=r"^SHARDTRAIN_RESTARTS=often:"):
        restarts({"SHARDTRAIN_RESTARTS": "often"})


def test_restarts_are_counted_by_whoever_restarts():
    assert restarts({}) == 0
    assert restarts({"SLURM_RESTART_COUNT": "2"}) == 2
    assert restarts({"SHARDTRAIN_RESTARTS": "3"}) == 3
    # `launch local` in a batch job that was requeued twice: its own first attempt, and a second one
    assert restarts({"SHARDTRAIN_RESTARTS": "0", "SLURM_RESTART_COUNT": "2"}) == 2
    assert restarts({"SHARDTRAIN_RESTARTS": "1", "SLURM_RESTART_COUNT": "2"}) == 3


def test_processes_of_a_host_share_its_gpus():
    here = Cluster("Slurm", "a:1", 8, 5, (1, 4), 2)
    assert devices_of(here, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}) == [2, 3]
    assert devices_of(here, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == [1]
    assert devices_of(here, {"CUDA_VISIBLE_DEVICES": "6"}) is None  # the scheduler has dealt them out
    assert devices_of(here, {"CUDA_VISIBLE_DEVICES": ""}) is None
    assert devices_of(here, {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}) is None
    with pytest.raises(UserError, match="6 GPUs cannot be shared evenly by the 4 processes"):
        devices_of(here, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"})
    alone = Cluster("Slurm", "a:1", 2, 1, (0, 1), 2)
    assert devices_of(alone, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_start_says_what_differs_and_goes_on(monkeypatch, rank):
    """One warning for all processes."""
    module, warnings = importlib.import_module("shardtrain.launch.connect"), []
    identities = [
        {"host": host, "versions": {"grain": version}} for host, version in (("a", "1"), ("b", "2"))
    ]
    monkeypatch.setattr(module, "meet", lambda *_: identities)
    monkeypatch.setattr(module.log, "warning", lambda text, *words: warnings.append(text % words))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(compat, "collectives_at", lambda address: None)  # devices are in use here
    more = {"SHARDTRAIN_PROCESS_ID": str(rank), "SHARDTRAIN_TOKEN": 32 * "a", "NCCL_SOCKET_IFNAME": "lo"}
    for name, value in (LOCAL | more).items():
        monkeypatch.setenv(name, value)
    assert connect().process_id == rank
    assert [line.split(";")[0] for line in warnings] == [
        "grain is 2 in process 1 (b) and 1 in process 0 (a)" for _ in range(1 - rank)
    ]


def test_a_start_that_has_no_end():
    with pytest.raises(UserError, match=r"^start 1e\+09: use seconds above 0, and 86400 \(a day\) at most"):
        Limits(start=1e9)
