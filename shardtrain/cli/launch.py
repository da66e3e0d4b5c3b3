"""`shardtrain launch`: a command in the processes of a job, here or on a cluster."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from shardtrain.launch.local import run_local


@dataclass(frozen=True)
class Local:
    """Runs a command in real processes on this machine: `shardtrain launch local -n 4 -- python train.py`.

    Each line of output carries the number of its process. When one fails, the others are ended, and its last
    words and exit status are the command's. SIGTERM and Ctrl-C are passed on.

    With --restarts the command starts again when a process fails, and its recipe goes on from its last
    checkpoint. Exit status 75 ("run me again") is not counted, 2 (flags refused) is final.
    """

    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 2
    """How many."""
    devices: int | None = None
    """Simulated CPU devices of each process."""
    restarts: int = 0
    """Attempts after the first one that failed."""
    elastic: bool = False
    """A restart leaves out as many processes as SIGKILL ended just before (lost hardware, out of memory), and
    has back those lost earlier; one less again where the command refuses the number (status 2). For meshes
    with a size of -1."""
    grace: float = 30.0
    """Seconds that processes have to save and end after SIGTERM or Ctrl-C, before SIGKILL."""

    def run(self, command: Sequence[str]) -> None:
        """Runs the command, and ends with its status."""
        sys.exit(
            run_local(
                command,
                self.processes,
                devices=self.devices,
                restarts=self.restarts,
                elastic=self.elastic,
                grace=self.grace,
            )
        )
