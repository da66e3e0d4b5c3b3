"""The description that a process gives of itself when the processes of a job meet."""

import os
import platform
import socket
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from shardtrain.errors import UserError
from shardtrain.versions import installed

ProcessIdentity = dict[str, Any]
"""Host, process id, clock and package versions of a process, and what a caller adds to them; sent as JSON."""

REQUIRED_EQUAL = ("shardtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
"""Packages whose versions must be equal: all processes compile one program and read one checkpoint."""

ALSO_COMPARED = ("grain", "numpy")
"""Packages whose versions should be equal, like those for GPUs: a difference is only worth a warning."""

GPU_PACKAGE_PREFIXES = ("jax-cuda", "jax-rocm", "nvidia-nccl")
"""Beginnings of the names of the packages that GPUs need: jax's plugins, and NCCL."""


def own_identity() -> ProcessIdentity:
    """Returns host, process id, clock (seconds since 1970) and package versions of this process.

    Example:
        >>> sorted(own_identity())
        ['host', 'pid', 'time', 'versions']
    """
    packages = [*REQUIRED_EQUAL, *ALSO_COMPARED, *gpu_packages()]
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "versions": {"python": ".".join(platform.python_version_tuple()[:2]), **installed(packages)},
    }


def gpu_packages() -> list[str]:
    """Returns the names of the packages for GPUs that are installed here."""
    names = {str(d.metadata["Name"]).lower().replace("_", "-") for d in metadata.distributions()}
    return sorted(name for name in names if name.startswith(GPU_PACKAGE_PREFIXES))


def differences(identities: Sequence[ProcessIdentity]) -> dict[str, str]:
    """Returns the packages whose version differs from that of process 0.

    Args:
        identities: of all processes, in their order.

    Returns:
        For each such package a clause that names the first process with another version.
    """
    first = identities[0]["versions"]
    found: dict[str, str] = {}
    for rank, identity in enumerate(identities):
        for name in sorted({*first, *identity["versions"]}):
            if name not in found and (version := identity["versions"].get(name)) != first.get(name):
                found[name] = (
                    f"{name} is {version or 'missing'} in process {rank} ({identity['host']}) and "
                    f"{first.get(name) or 'missing'} in process 0 ({identities[0]['host']})"
                )
    return found


def refuse_unequal(identities: Sequence[ProcessIdentity]) -> list[str]:
    """Refuses a job whose processes have different versions of Python or of one of `REQUIRED_EQUAL`.

    Args:
        identities: of all processes, in their order.

    Returns:
        A clause for each of the other packages whose versions differ.

    Raises:
        UserError: if a version differs that must be equal.
    """
    found = differences(identities)
    if wrong := [text for name, text in found.items() if name in ("python", *REQUIRED_EQUAL)]:
        raise UserError(f"{wrong[0]}; install the same versions on all hosts")
    return list(found.values())
