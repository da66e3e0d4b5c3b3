"""Looks for what keeps a job from starting, or makes it hang, before the job is submitted."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

from shardtrain.errors import UserError, first_line
from shardtrain.files import expanded
from shardtrain.guard.token import TOKEN, job_token
from shardtrain.launch.cluster import Cluster, whole
from shardtrain.launch.connect import devices_of, nvidia_gpus
from shardtrain.launch.identity import ProcessIdentity, differences, gpu_packages, own_identity
from shardtrain.launch.rendezvous import (
    listen,
    loopback,
    meet,
    naming,
    refuse_elsewhere,
    resolve,
    split_address,
)
from shardtrain.versions import installed

MOST_SKEW_SECONDS = 1.0
"""How far clocks may differ: logs and file times are compared across hosts."""

LEAST_FREE_BYTES = 2**30
"""Space that the disk of --out must have."""

KNOWN_BAD = {
    ("nvidia-nccl", "2.28.9"): (
        "collectives across hosts can hang, 2.30.7 does not",
        "https://github.com/marin-community/marin/issues/7344",
    ),
    ("nvidia-nccl", "2.29.2"): (
        "hangs, mended in 2.29.3",
        "https://github.com/pytorch/pytorch/pull/174338",
    ),
    ("nvidia-nccl", "2.30.7"): (
        "a pipeline hangs, with 2.31.2 it does not",
        "https://github.com/NVIDIA/jaxpp/issues/11",
    ),
}
"""Versions that are known to hang: what happens, and the report that says so."""

GOOD_NCCL = "2.31.2"
"""The oldest version of NCCL without such a report."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was checked.
        good: whether it is in order.
        found: what was found.
        fix: what to do or to type if it is not in order.
        process: number of the process that checked.
    """

    check: str
    good: bool
    found: str
    fix: str = ""
    process: int = 0


def examine(
    out: Path, cluster: Cluster | None = None, coordinator: str | None = None, limit: float = 60.0
) -> list[Finding]:
    """Checks everything that a job needs.

    In a job of several processes each of them checks, and each gets the findings of all.

    Args:
        out: folder that the run is to write to.
        cluster: the place of this process, from `detect`; None for one process alone.
        coordinator: `host:port` of a job that has not started, to be checked from one process alone.
        limit: seconds to wait for the other processes.

    Returns:
        The findings of all processes; only those of this process if the processes do not meet.

    Example:
        >>> [finding.check for finding in examine(Path("runs")) if not finding.good]
        []
    """
    found = [place(cluster), own_name(cluster)]
    if cluster is not None:
        found += [address(cluster.coordinator, cluster), token()]
    elif coordinator is not None:
        found.append(address(coordinator))
    found += [*devices(cluster), *packages(), *folder(out)]
    if cluster is None:
        return found
    rank = cluster.process_id
    try:
        with beacon(out, rank) as name:
            identities = meet(cluster, own_identity() | {"beacon": name}, limit)
            found += together(identities) if rank == 0 else same_folder(out, identities[0]["beacon"])
            mine = [asdict(finding) | {"process": rank} for finding in found]
            identities = meet(cluster, own_identity() | {"findings": mine}, limit)
    except UserError as error:
        problem, _, fix = str(error).partition("; ")
        return [
            replace(finding, process=rank) for finding in [*found, Finding("processes", False, problem, fix)]
        ]
    return [Finding(**finding) for identity in identities for finding in identity["findings"]]


@contextmanager
def beacon(out: Path, rank: int) -> Iterator[str]:
    """Process 0 has a file in `out` while the context lasts, for which the others look.

    Returns:
        The name of the file; empty in the other processes, and if it could not be written.
    """
    if rank:
        yield ""
        return
    file, made, name = out / f".doctor-{os.getpid()}-{time.time_ns()}", [], ""
    try:
        with suppress(OSError):  # the finding "folder" explains it
            made = [folder for folder in (out, *out.parents) if not folder.exists()]
            out.mkdir(parents=True, exist_ok=True)
            file.touch()
            name = file.name
        yield name
    finally:
        with suppress(OSError):  # another process may have written into a folder
            file.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()


def place(cluster: Cluster | None) -> Finding:
    """Checks whether this process knows its place in a job."""
    env = os.environ
    if cluster is not None:
        where = f"process {cluster.process_id} of {cluster.processes}, says {cluster.scheduler}"
        return Finding("job", True, f"{where}; on {socket.gethostname()}")
    tasks = whole(env, "SLURM_NTASKS", 1)
    if "SLURM_JOB_ID" in env and "SLURM_STEP_NODELIST" not in env and tasks > 1:
        return Finding(
            "job",
            False,
            f"one process of a Slurm job of {tasks}",
            "start it with srun: srun shardtrain doctor",
        )
    return Finding("job", True, f"one process alone; on {socket.gethostname()}")


def own_name(cluster: Cluster | None) -> Finding:
    """Checks whether the host's own name resolves to it, which CPU collectives of other hosts need."""
    name = socket.gethostname()
    try:
        where = socket.gethostbyname(name)
    except OSError:
        fix = f"add a line to /etc/hosts: ADDRESS {name}"
        return Finding("host name", False, f"{name} does not resolve", fix)
    if where.startswith("127.") and cluster is not None and (cluster.hosts or 1) > 1:
        fix = f"give {name} its real address in /etc/hosts"
        return Finding("host name", False, f"{name} is {where}, which other hosts cannot reach", fix)
    return Finding("host name", True, f"{name} is {where}")


def address(coordinator: str, cluster: Cluster | None = None) -> Finding:
    """Checks whether the coordinator's name resolves, and whether its port is free."""
    try:
        with naming(cluster):
            host, port = split_address(coordinator)
            where = resolve(host, time.monotonic() + 1)
            several = cluster is None or cluster.apart or (cluster.hosts or 1) > 1
            if where.startswith("127.") and several and (cluster is None or cluster.process_id):
                fix = f"give {host} its real address in /etc/hosts, or name another with --coordinator"
                return Finding("coordinator", False, f"{host} is {where}, this host itself", fix)
            if is_local(where) if cluster is None else cluster.process_id == 0:
                refuse_elsewhere(host, where)
                listen(port, loopback(cluster) if cluster else "").close()
                return Finding("coordinator", True, f"{host} is {where}, this host; port {port} is free")
    except UserError as error:
        problem, _, fix = str(error).partition("; ")
        return Finding("coordinator", False, problem, fix)
    return Finding("coordinator", True, f"{host} is {where}")


def token() -> Finding:
    """Says whether the token of this job is a secret; without one its network must be trusted."""
    try:
        job_token(os.environ)
    except UserError as error:
        problem, _, fix = str(error).partition("; ")
        return Finding("token", False, problem, fix)
    known = f"no secret, set {TOKEN} (see openssl rand -hex 16) if others reach this network"
    return Finding("token", True, "a secret of this job" if os.environ.get(TOKEN) else known)


def is_local(where: str) -> bool:
    """Whether an address is one of this host."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET) as probe:
            probe.bind((where, 0))
    except OSError:
        return False
    return True


def devices(cluster: Cluster | None) -> list[Finding]:
    """Checks which devices jax finds for this process."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a check need not take the memory
    gpus = nvidia_gpus()
    try:
        if cluster is not None and (assigned := devices_of(cluster, os.environ)):
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, assigned)))
        seen = jax.local_devices()
    except (RuntimeError, UserError) as error:
        return [Finding("devices", False, f"none: {first_line(error, 150)}", "see the sentence itself")]
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in seen})
    found = f"{len(seen)} of {', '.join(kinds)}"
    if gpus and seen[0].platform == "cpu":
        forced = os.environ.get("JAX_PLATFORMS")
        fix = f"unset JAX_PLATFORMS={forced}" if forced else "pip install 'shardtrain[cuda13]'"
        return [Finding("devices", False, f"{found}, but the host has {len(gpus)} NVIDIA GPUs", fix)]
    return [Finding("devices", True, found)]


def packages() -> list[Finding]:
    """Checks whether the versions of packages fit together, and whether one of them is known to hang."""
    versions = installed(["jax", "jaxlib", *gpu_packages()])
    found = [Finding("packages", True, ", ".join(f"{name} {version}" for name, version in versions.items()))]
    for name, version in versions.items():
        if name.startswith(("jax-cuda", "jax-rocm")) and version != versions.get("jaxlib"):
            fix = f"pip install '{name}=={versions.get('jaxlib')}'"
            found.append(
                Finding("packages", False, f"{name} {version} beside jaxlib {versions['jaxlib']}", fix)
            )
        if bad := KNOWN_BAD.get((name.rpartition("-")[0], version)):
            fix = f"pip install '{name}>={GOOD_NCCL}' ({bad[1]})"
            found.append(Finding("packages", False, f"{name} {version}: {bad[0]}", fix))
    return found


def folder(out: Path) -> list[Finding]:
    """Checks whether a run can be written to --out, and whether the clock of that disk is this host's."""
    out = expanded(out).absolute()
    try:
        nearest = next(path for path in (out, *out.parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".doctor-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
            skew = os.stat(probe.name).st_mtime - time.time()
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        fix = "name a folder that you may write to with --out"
        return [Finding("folder", False, f"{out} cannot be written ({error.strerror})", fix)]
    space = f"{free / 2**30:.1f} GiB free in {nearest}"
    checks = [
        Finding(
            "folder",
            free >= LEAST_FREE_BYTES,
            space,
            "" if free >= LEAST_FREE_BYTES else "make room, or name another --out",
        )
    ]
    if abs(skew) > MOST_SKEW_SECONDS:
        fix = "let both keep their time by NTP"
        checks.append(Finding("clock", False, f"files of {nearest} are {skew:+.1f} s off this host", fix))
    return checks


def same_folder(out: Path, name: str) -> list[Finding]:
    """Checks whether this process sees the file that process 0 has written into the folder, if it could."""
    if not name:
        return []
    there = False
    with suppress(OSError):  # the finding "folder" explains it
        there = (out / name).exists()
    if there:
        return [Finding("shared folder", True, f"{out} is that of process 0")]
    fix = "name a folder of a file system that all hosts share with --out; checkpoints need it"
    return [Finding("shared folder", False, f"{out} is not the folder that process 0 writes to", fix)]


def together(identities: Sequence[ProcessIdentity]) -> list[Finding]:
    """Compares the processes: their number, versions and clocks."""
    hosts = {identity["host"] for identity in identities}
    found = [Finding("processes", True, f"all {len(identities)} are there, on {len(hosts)} hosts")]
    unequal = list(differences(identities).values())
    found_versions = "; ".join(unequal[:3]) if unequal else "equal in all processes"
    found.append(
        Finding("versions", not unequal, found_versions, "install the same on all hosts" if unequal else "")
    )
    rank = max(range(len(identities)), key=lambda k: abs(identities[k]["skew"]))
    skew, host = identities[rank]["skew"], identities[rank]["host"]
    late = abs(skew) > MOST_SKEW_SECONDS
    note = f"process {rank} ({host}) is {skew:+.1f} s off process 0"
    fix = f"let {host} keep its time by NTP" if late else ""
    return [*found, Finding("clocks", not late, note if late else f"within {MOST_SKEW_SECONDS:g} s", fix)]
