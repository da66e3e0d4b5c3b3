"""Starts `jax.distributed`, after a check in plain Python that all processes of the job have started."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.guard.token import TOKEN
from shardtrain.launch.cluster import Cluster, detect
from shardtrain.launch.identity import own_identity, refuse_unequal
from shardtrain.launch.rendezvous import loopback, meet, refuse_endless, split_address

log = logging.getLogger(__name__)

JAX_CONNECT_SECONDS = 60
"""How long jax may take to connect processes that have just met."""


@dataclass(frozen=True)
class Limits:
    """How long a process waits for the other processes of its job, in seconds.

    Attributes:
        start: how long `connect` waits for all processes to start.
        heartbeat: how long jax waits for a process that does not answer before it aborts the others. It
            should be longer than a `Guard` waits, because the guard names the process.
        shutdown: how long a process that has ended waits for the others to end.

    Raises:
        UserError: if `start` is not above 0 and at most a day.

    Example:
        >>> Limits(start=60.0)
        Limits(start=60.0, heartbeat=100, shutdown=300)
    """

    start: float = 300.0
    heartbeat: int = 100
    shutdown: int = 300

    def __post_init__(self) -> None:
        refuse_endless("start", self.start)


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    limits: Limits = Limits(),
) -> Cluster | None:
    """Connects this process with the other processes of its job, by `jax.distributed`.

    Call it before the first use of jax. The place of the process comes from the environment that
    `shardtrain launch local`, Slurm, Open MPI or Kubernetes provides, or from the arguments. In a job of one
    process nothing happens, so one program serves both cases.

    `jax.distributed` aborts a process without an exception if the coordinator or a peer is missing. Therefore
    all processes first meet in plain Python, where this becomes an exception that names what is missing. They
    also compare the versions of their packages.

    Args:
        coordinator: `host:port` of process 0; by default what the environment says.
        processes: number of processes in the job; by default what the environment says.
        process_id: number of this process, from 0; by default what the environment says.
        limits: how long to wait for the other processes.

    Returns:
        The place of this process in its job, or None in a job of one process.

    Raises:
        UserError: if the description of the job is incomplete or wrong, if the coordinator's name does not
            resolve, or if package versions differ between the processes.
        StartError: if the coordinator does not answer, if processes are missing after `limits.start` seconds,
            or if the port is in use. The same command may succeed when it is started again.

    Example:
        >>> cluster = st.launch.connect()
        >>> cluster is None  # a job of one process
        True
        >>> mesh = st.make_mesh("data=-1")  # all devices of all processes
    """
    cluster = detect(os.environ, coordinator, processes, process_id)
    if cluster is None or jax.distributed.is_initialized():
        return cluster
    refuse_nameless(cluster)
    differences = refuse_unequal(meet(cluster, own_identity(), limits.start))
    for difference in differences if cluster.process_id == 0 else ():
        log.warning("%s; install the same on all hosts if this job hangs or fails", difference)
    _warn_of_known_token(cluster)
    # The service would handle SIGTERM, which is a `Guard`'s task, and which ends a process that has no guard.
    jax.config.update("jax_enable_preemption_service", False)
    address, port = loopback(cluster), split_address(cluster.coordinator)[1]
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process_id,
        local_device_ids=devices_of(cluster, os.environ),
        cluster_detection_method="deactivate",
        initialization_timeout=JAX_CONNECT_SECONDS,
        heartbeat_timeout_seconds=limits.heartbeat,
        shutdown_timeout_seconds=limits.shutdown,
        coordinator_bind_address=(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
        if address
        else None,
    )
    if address:
        compat.collectives_at(address)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return cluster


def _warn_of_known_token(cluster: Cluster) -> None:
    """Says in process 0 that others may know the token of this job, where nobody gave it a secret one."""
    if cluster.process_id == 0 and not os.environ.get(TOKEN):
        log.warning(
            "this job has no secret token, so whoever reaches %s may send it messages; give all of its "
            "processes one %s, such as that of openssl rand -hex 16",
            cluster.coordinator,
            TOKEN,
        )


def devices_of(cluster: Cluster, env: Mapping[str, str]) -> list[int] | None:
    """Returns which of the visible GPUs this process uses, or None for all.

    If a host has several processes that all see its GPUs, each process takes an equal share, in order.

    Args:
        cluster: the place of this process.
        env: the environment variables.

    Raises:
        UserError: if the processes of the host cannot share its GPUs evenly.

    Example:
        >>> second_of_two = Cluster("launch local", "127.0.0.1:62000", 2, 1, local=(1, 2))
        >>> devices_of(second_of_two, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
        [2, 3]
    """
    if env.get("JAX_LOCAL_DEVICE_IDS") or cluster.local is None:
        return None
    number, processes = cluster.local
    named = env.get("CUDA_VISIBLE_DEVICES")
    visible = len(list(filter(None, named.split(",")))) if named is not None else len(nvidia_gpus())
    if visible < 2 or processes == 1:  # with one GPU each, a scheduler has assigned them already
        return None
    if visible % processes:
        raise UserError(
            f"{visible} GPUs cannot be shared evenly by the {processes} processes of this host; start one "
            f"process for each GPU or one for all"
        )
    share = visible // processes
    return list(range(number * share, (number + 1) * share))


def nvidia_gpus() -> list[Path]:
    """Returns the NVIDIA GPUs of this host, as the driver lists them."""
    folder = Path("/proc/driver/nvidia/gpus")
    return sorted(folder.iterdir()) if folder.is_dir() else []


def refuse_nameless(cluster: Cluster) -> None:
    """Refuses a host whose own name does not resolve, because jax's CPU collectives listen at that address.

    Raises:
        UserError: if the name does not resolve.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise UserError(
            f"this host does not know the address of its own name {name!r}; add a line with its address and "
            f"this name to /etc/hosts"
        ) from error
    if address.startswith("127.") and (cluster.hosts or 1) > 1:
        log.warning("%s is %s here, where CPU collectives of other hosts cannot reach it", name, address)
