"""What a process says of itself when the processes of a job meet."""

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

PACKAGES = ("shardtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
"""Whose versions must be equal for all processes to compile one program and read one checkpoint."""

BESIDE = ("grain", "numpy")
"""Whose versions had better be equal, as those of what GPUs need: a job starts all the same, and says so."""

OF_GPUS = ("jax-cuda", "jax-rocm", "nvidia-nccl")
"""What the names of packages begin with that GPUs need: jax's plugins, and NCCL."""


def own_identity() -> ProcessIdentity:
    """Host, process, clock (seconds since 1970) and versions of this process, as JSON can hold them."""
    packages = [*PACKAGES, *BESIDE, *of_gpus()]
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "versions": {"python": ".".join(platform.python_version_tuple()[:2]), **installed(packages)},
    }


def of_gpus() -> list[str]:
    """The packages for GPUs that are installed here."""
    names = {str(d.metadata["Name"]).lower().replace("_", "-") for d in metadata.distributions()}
    return sorted(name for name in names if name.startswith(OF_GPUS))


def differences(cards: Sequence[ProcessIdentity]) -> dict[str, str]:
    """Packages in which processes differ from process 0, and a sentence part about the first that does."""
    first = cards[0]["versions"]
    found: dict[str, str] = {}
    for rank, card in enumerate(cards):
        for name in sorted({*first, *card["versions"]}):
            if name not in found and (version := card["versions"].get(name)) != first.get(name):
                found[name] = (
                    f"{name} is {version or 'missing'} in process {rank} ({card['host']}) and "
                    f"{first.get(name) or 'missing'} in process 0 ({cards[0]['host']})"
                )
    return found


def refuse_unequal(cards: Sequence[ProcessIdentity]) -> list[str]:
    """Refuses a job whose processes cannot work together.

    Returns:
        What else differs, a sentence part for each package.

    Raises:
        UserError: other versions of Python or of one of `PACKAGES`.
    """
    found = differences(cards)
    if wrong := [text for name, text in found.items() if name in ("python", *PACKAGES)]:
        raise UserError(f"{wrong[0]}; install the same versions on all hosts")
    return list(found.values())
