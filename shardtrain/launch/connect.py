"""The start of `jax.distributed`, after a check in plain Python that all processes are there."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from shardtrain.errors import UserError
from shardtrain.launch.cluster import Cluster, detect
from shardtrain.launch.identity import own_identity, refuse_unequal
from shardtrain.launch.rendezvous import meet, refuse_endless

log = logging.getLogger(__name__)

JOIN = 60
"""Seconds for jax to connect processes that have just met."""


@dataclass(frozen=True)
class Limits:
    """How long a process waits for the others, in seconds.

    Attributes:
        start: for all to be there, from the start of this one.
        heartbeat: without a sign of life of a process, until jax aborts the others; longer than a `Guard`
            waits, which says who it is.
        shutdown: at the end of the program, for the others to end too.

    Raises:
        UserError: a start that has no end.
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
    """Joins this process with the others of its job; nothing happens in a job of one process.

    All processes first meet in plain Python, because `jax.distributed` aborts without an exception where a
    coordinator is missing. To be called before jax's first use.

    Args:
        coordinator, processes, process_id: in place of what the environment says, see `detect`.
        limits: of waiting.

    Returns:
        The place of this process, None in a job of one.

    Raises:
        UserError: an incomplete or wrong description of the job, a coordinator whose name does not resolve,
            or versions that differ between the processes.
        StartError: a coordinator that does not answer within the limit, processes that are missing (by
            number), or a port that is taken: a new start may succeed.

    Example:
        >>> cluster = connect()
        >>> mesh = make_mesh("data=-1")
    """
    cluster = detect(os.environ, coordinator, processes, process_id)
    if cluster is None or jax.distributed.is_initialized():
        return cluster
    refuse_nameless(cluster)
    others = refuse_unequal(meet(cluster, own_identity(), limits.start))
    for difference in others if cluster.process_id == 0 else ():
        log.warning("%s; install the same on all hosts if this job hangs or fails", difference)
    # It would take SIGTERM for itself, which a `Guard` answers, and which before that is to end a process.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process_id,
        local_device_ids=devices_of(cluster, os.environ),
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN,
        heartbeat_timeout_seconds=limits.heartbeat,
        shutdown_timeout_seconds=limits.shutdown,
    )
    return cluster


def devices_of(cluster: Cluster, env: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this process sees are its own; None for all.

    Where a host has several processes that all see its GPUs, each takes an equal share in order.

    Raises:
        UserError: GPUs that the processes of the host cannot share evenly.
    """
    if env.get("JAX_LOCAL_DEVICE_IDS") or cluster.local is None:
        return None
    number, processes = cluster.local
    named = env.get("CUDA_VISIBLE_DEVICES")
    visible = len(list(filter(None, named.split(",")))) if named is not None else len(nvidia_gpus())
    if visible < 2 or processes == 1:  # a scheduler that has dealt them out already
        return None
    if visible % processes:
        raise UserError(
            f"{visible} GPUs cannot be shared evenly by the {processes} processes of this host; start one "
            f"process for each GPU or one for all"
        )
    share = visible // processes
    return list(range(number * share, (number + 1) * share))


def nvidia_gpus() -> list[Path]:
    """The NVIDIA cards of this host, as the driver lists them."""
    folder = Path("/proc/driver/nvidia/gpus")
    return sorted(folder.iterdir()) if folder.is_dir() else []


def refuse_nameless(cluster: Cluster) -> None:
    """Refuses a host that does not know its own name: jax's CPU collectives listen at its address."""
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
