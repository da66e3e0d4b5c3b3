"""Exchanges texts between the processes of a job, and lets them wait for each other, outside of steps."""

import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

from shardtrain import compat
from shardtrain.guard.peers import Peers

MEETING_SECONDS = 900.0
"""How long processes wait for each other outside of steps."""

_meetings = itertools.count()


def everyone(text: str) -> list[str]:
    """Returns the texts of all processes, in the order of the processes.

    All processes must call it at the same point of the program.

    Example:
        >>> everyone("ready")
        ['ready']
    """
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(mine))))
    widest = 1 << max(
        6, int(sizes.max() - 1).bit_length()
    )  # rounded up, since each size is a program to compile
    texts = np.asarray(multihost_utils.process_allgather(np.pad(mine, (0, widest - len(mine)))))
    return [row[:size].tobytes().decode() for row, size in zip(texts, sizes, strict=True)]


def meet(where: str, limit: float = MEETING_SECONDS) -> None:
    """Waits until all processes have called this.

    Args:
        where: names the place in the program in the message of an error.
        limit: seconds to wait.

    Raises:
        MissingError: if some processes do not come within `limit` seconds; names them.

    Example:
        >>> meet("the folder is open")
    """
    if jax.process_count() > 1:
        client, rank, count = compat.coordination_client(), jax.process_index(), jax.process_count()
        Peers(client, rank, count, f"shardtrain/meeting/{next(_meetings)}").meet(where, "", limit)
