"""Finds the place of this process in its job from environment variables."""

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardtrain.errors import UserError

COORDINATOR, PROCESSES, PROCESS_ID = "SHARDTRAIN_COORDINATOR", "SHARDTRAIN_PROCESSES", "SHARDTRAIN_PROCESS_ID"
LOCAL, JOB, RESTARTS = "SHARDTRAIN_LOCAL", "SHARDTRAIN_JOB", "SHARDTRAIN_RESTARTS"
"""The variables that `shardtrain launch` sets in its processes. Launchers of your own can set them, too."""

JAX_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
"""jax's own variable, which takes precedence over the scheduler's."""

JAX_BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
"""jax's variable for the address at which process 0 listens, if that is not the one that others are told."""

PORTS = range(61440, 65536)
"""Ports above the range from which Linux assigns ports by itself, so that none is in use by chance."""


@dataclass(frozen=True)
class Cluster:
    """The place of this process in a job of several.

    Attributes:
        scheduler: where the description comes from: `"launch local"`, `"Slurm"`, `"Open MPI"`,
            `"Kubernetes"`, `"environment"` (the variables of `shardtrain launch`), or `"flags"`.
        coordinator: `host:port` of process 0.
        processes: number of processes in the job.
        process_id: number of this process, from 0.
        local: number of this process among the processes on its host, and how many there are; None if
            unknown.
        hosts: number of hosts of the job; None if unknown.
        apart: whether this process is known to run on another host than process 0.
        source: the flag or variable in which a user gave the coordinator; empty if a scheduler gave it.
    """

    scheduler: str
    coordinator: str
    processes: int
    process_id: int
    local: tuple[int, int] | None = None
    hosts: int | None = None
    apart: bool = False
    source: str = ""

    @property
    def given(self) -> str:
        """What a user wrote to name the coordinator, such as `"--coordinator node1:5"`; empty if none did.

        Example:
            >>> Cluster("Slurm", "node1:5", 2, 0, source="JAX_COORDINATOR_ADDRESS").given
            'JAX_COORDINATOR_ADDRESS=node1:5'
        """
        separator = " " if self.source.startswith("--") else "="
        return f"{self.source}{separator}{self.coordinator}" if self.source else ""

    @property
    def is_local(self) -> bool:
        """Whether the coordinator is written as a loopback address, so that all processes are on this host.

        A host's own name may be a loopback address on this host, and another one for other hosts.

        Example:
            >>> Cluster("flags", "127.0.0.1:5", 2, 0).is_local, Cluster("flags", "node1:5", 2, 0).is_local
            (True, False)
        """
        host = self.coordinator.rpartition(":")[0].strip("[]")
        try:
            numbers = str(socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)[0][4][0])
        except OSError:
            return host == "localhost"
        address = ipaddress.ip_address(numbers.partition("%")[0])
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def detect(
    env: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """Returns the place of this process in its job.

    It is read from the variables of `shardtrain launch`, Open MPI, Slurm or Kubernetes. The arguments take
    precedence over them, and so does `JAX_COORDINATOR_ADDRESS` for the coordinator.

    Args:
        env: the environment variables.
        coordinator: `host:port` of process 0.
        processes: number of processes in the job.
        process_id: number of this process, from 0.

    Returns:
        The place of this process, or None in a job of one process.

    Raises:
        UserError: if part of the description is missing, or if the numbers contradict each other.

    Example:
        >>> detect({"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}) is None
        True
    """
    found = surrounding(env)
    if found is None and coordinator is None and processes is None and process_id is None:
        return None
    cluster = found or Cluster("flags", "", 0, -1)
    if coordinator:
        cluster = replace(cluster, source="--coordinator")
    elif coordinator := env.get(JAX_COORDINATOR):
        cluster = replace(cluster, source=JAX_COORDINATOR)
    cluster = replace(
        cluster,
        coordinator=coordinator or cluster.coordinator,
        processes=cluster.processes if processes is None else processes,
        process_id=cluster.process_id if process_id is None else process_id,
    )
    if cluster.processes == 1:
        return None
    if not cluster.coordinator or cluster.processes < 1 or cluster.process_id < 0:
        raise UserError(
            "a job of several processes needs three things on each, and not all are known: "
            f"--coordinator {cluster.coordinator or '?'} (HOST:PORT of process 0), "
            f"--processes {cluster.processes if cluster.processes > 0 else '?'}, "
            f"--process-id {cluster.process_id if cluster.process_id >= 0 else '?'} (from 0)"
        )
    if cluster.process_id >= cluster.processes:
        raise UserError(
            f"--process-id {cluster.process_id} of --processes {cluster.processes}: number the processes "
            f"from 0 to {cluster.processes - 1}"
        )
    return cluster


def surrounding(env: Mapping[str, str]) -> Cluster | None:
    """Returns what the environment says of the job, which may be incomplete; None if it says nothing.

    Example:
        >>> surrounding({"SHARDTRAIN_PROCESSES": "2", "SHARDTRAIN_PROCESS_ID": "1"}).coordinator
        ''
    """
    return next((c for find in (_shardtrain, _open_mpi, _slurm, _kubernetes) if (c := find(env))), None)


def restarts(env: Mapping[str, str]) -> int:
    """Returns how often this job was restarted by `launch local`, Slurm or a JobSet, in sum if they are
    nested.

    Example:
        >>> restarts({"SLURM_RESTART_COUNT": "2", "SHARDTRAIN_RESTARTS": "0"})
        2
    """
    return whole(env, RESTARTS) + whole(env, "SLURM_RESTART_COUNT")


def job(env: Mapping[str, str]) -> str:
    """Returns an identifier that is the same in all restarts of this job; empty if nothing restarts it.

    Example:
        >>> job({"SLURM_JOB_ID": "4711"})
        '4711'
    """
    return env.get(JOB) or env.get("SLURM_JOB_ID") or ""


def whole(env: Mapping[str, str], name: str, default: int = 0) -> int:
    """Returns the integer in an environment variable, or the default if it is unset or empty.

    Raises:
        UserError: if the variable is not an integer.

    Example:
        >>> whole({"SLURM_PROCID": "3"}, "SLURM_PROCID")
        3
    """
    text = env.get(name) or str(default)
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text}: set this variable to a whole number, or unset it") from error


def _shardtrain(env: Mapping[str, str]) -> Cluster | None:
    if PROCESSES not in env:
        return None
    processes = whole(env, PROCESSES)
    process_id = whole(env, PROCESS_ID if env.get(PROCESS_ID) else "JOB_COMPLETION_INDEX", -1)
    if LOCAL in env:
        coordinator, local = env.get(COORDINATOR, ""), (process_id, processes)
        return Cluster("launch local", coordinator, processes, process_id, local, hosts=1)
    if "JOB_COMPLETION_INDEX" in env:
        coordinator = env.get(COORDINATOR) or _first_pod(socket.getfqdn(), process_id)
        return Cluster("Kubernetes", coordinator, processes, process_id, None, processes, process_id > 0)
    return Cluster("environment", env.get(COORDINATOR, ""), processes, process_id, source=COORDINATOR)


def _first_pod(name: str, index: int) -> str:
    """Returns the address of pod 0 from the name of another: `train-0...` for `train-3.pods.default.svc`."""
    host, dot, domain = name.partition(".")
    stem = host.removesuffix(f"-{index}")
    return f"{stem}-0.{domain}:{PORTS[0]}" if dot and stem != host else ""


def _kubernetes(env: Mapping[str, str]) -> Cluster | None:
    if "JOB_COMPLETION_INDEX" not in env:
        return None
    raise UserError(
        f"this is a pod of an Indexed Job, of which the number of pods is not known; set {PROCESSES} in its "
        f"manifest (1 for pods that each train alone), or write one with `shardtrain launch k8s`"
    )


def _open_mpi(env: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        return None
    size, rank = whole(env, "OMPI_COMM_WORLD_SIZE"), whole(env, "OMPI_COMM_WORLD_RANK")
    local = whole(env, "OMPI_COMM_WORLD_LOCAL_RANK"), whole(env, "OMPI_COMM_WORLD_LOCAL_SIZE", size)
    # Process 0 runs on the host of mpirun. Open MPI 4 gives its address in a variable, 5 in the job's name.
    host, job = "", 0
    if uri := re.match(r"(\d+)\.\d+;tcp6?://\[?([^,:\]]+)", env.get("OMPI_MCA_orte_hnp_uri", "")):
        host, job = uri[2], int(uri[1]) // 2**12
    elif space := re.match(r"prterun-(.+)-(\d+)@\d+", env.get("PMIX_NAMESPACE", "")):
        host, job = space[1], int(space[2])
    hosts = None
    if local[1] == size:
        host, hosts = "127.0.0.1", 1
    coordinator = f"{host}:{_port(env, job)}" if host else ""
    return Cluster("Open MPI", coordinator, size, rank, local, hosts)


def _slurm(env: Mapping[str, str]) -> Cluster | None:
    # Only srun sets the variables of a step. A batch script or a shell in an allocation is a job of one
    # process.
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    size = whole(env, "SLURM_STEP_NUM_TASKS") or whole(env, "SLURM_NTASKS")
    node = whole(env, "SLURM_NODEID")
    tasks = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local = (whole(env, "SLURM_LOCALID"), tasks[node]) if node < len(tasks) else None
    hosts = whole(env, "SLURM_STEP_NUM_NODES", 1)
    # Two steps of one job, and its restarts, use different ports.
    job = sum(whole(env, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    alone = env.get("SLURM_STEP_NUM_NODES") == "1"
    coordinator = f"{'127.0.0.1' if alone else _first_node(env['SLURM_STEP_NODELIST'])}:{_port(env, job)}"
    return Cluster("Slurm", coordinator, size, whole(env, "SLURM_PROCID"), local, hosts, node > 0)


def _first_node(nodes: str) -> str:
    """Returns the first node of a Slurm node list: `node001` of `node[001-003,7],other`."""
    parts = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,\[]*))?", nodes)
    return "".join(filter(None, parts.groups())) if parts else nodes


def _tasks_per_node(text: str) -> list[int]:
    """Returns the tasks of each node from Slurm's short form: `[2, 2, 2, 1]` for `2(x3),1`."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]


def _port(env: Mapping[str, str], job: int) -> int:
    port = whole(env, "JAX_COORDINATOR_PORT", PORTS[job % len(PORTS)])
    if not 0 < port < 65536:
        raise UserError(f"JAX_COORDINATOR_PORT={port}: set this variable to a port below 65536, or unset it")
    return port
