"""What a process says of itself when the processes of a job meet."""

import os
import platform
import socket
import time
from collections.abc import Sequence
from typing import Any

from shardtrain.errors import UserError
from shardtrain.train.manifest import installed

Card = dict[str, Any]

PACKAGES = ("shardtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
"""Whose versions must be equal for all processes to compile one program and read one checkpoint."""


def own_card() -> Card:
    """Host, process, clock (seconds since 1970) and versions of this process, as JSON can hold them."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "versions": {"python": ".".join(platform.python_version_tuple()[:2]), **installed(PACKAGES)},
    }


def differences(cards: Sequence[Card]) -> list[str]:
    """Versions in which processes differ from process 0, a sentence part for each."""
    first = cards[0]["versions"]
    return [
        f"{name} is {version or 'missing'} in process {rank} ({card['host']}) and "
        f"{first.get(name) or 'missing'} in process 0 ({cards[0]['host']})"
        for rank, card in enumerate(cards)
        for name in sorted({*first, *card["versions"]})
        if (version := card["versions"].get(name)) != first.get(name)
    ]


def refuse_unequal(cards: Sequence[Card]) -> None:
    """Refuses a job whose processes have different versions."""
    if found := differences(cards):
        raise UserError(f"{found[0]}; install the same versions on all hosts")
