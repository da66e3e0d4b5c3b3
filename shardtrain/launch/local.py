"""Real processes on this machine: started together, ended together, and started again.

One attempt runs the command in every process. It has failed when a process has: the others are ended, and
what the first one said is shown. With restarts, attempts follow each other until one succeeds.
"""

import os
import queue
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from shardtrain.errors import REQUEUE, UserError
from shardtrain.guard.watch import BEGUN, FOLLOWS
from shardtrain.launch import cluster
from shardtrain.launch.cluster import (
    COORDINATOR,
    JAX_COORDINATOR,
    JOB,
    LOCAL,
    PORTS,
    PROCESS_ID,
    PROCESSES,
    RESTARTS,
)
from shardtrain.launch.command import refuse_no_command

SETTLE = 0.5
"""Seconds in which deaths are seen together: of a process, and of others because of it."""

AFTERMATH = 5.0
"""Seconds that the others have to end when one has failed: without it they cannot even save."""

WORDS = 30
"""Last lines of a process that has failed."""

SHORT = 60.0
"""Seconds that an attempt must have lasted before it was told to stop, for the next one to follow at once."""

PAUSE = 1.0
"""Seconds before the next one otherwise; each time twice as long, up to `SHORT`."""

WRITING = threading.Lock()
"""Held while a line is written: one of several threads would be cut by others."""


@dataclass(frozen=True)
class End:
    """How a process ended: `status` is its exit status, or minus the signal that killed it."""

    rank: int
    status: int
    time: float

    def __str__(self) -> str:
        if self.status >= 0:
            return f"ended with status {self.status}"
        return f"was killed by {signal.Signals(-self.status).name}"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        status: of the first process that failed, 128 + its signal if one killed it; 0 if none did.
        lost: processes that SIGKILL ended, which was not ours.
        begun: its training had begun.
    """

    status: int
    lost: int = 0
    begun: bool = False


@dataclass
class Said:
    """What a process has said on stderr: its last lines, and whether one was that training begins."""

    last: deque[bytes] = field(default_factory=lambda: deque(maxlen=WORDS))
    begun: bool = False

    def hear(self, line: bytes) -> None:
        """Takes one more line."""
        self.last.append(line)
        self.begun = self.begun or BEGUN.search(line.decode(errors="replace")) is not None

    def follows(self) -> int | None:
        """The process because of whose failure this one says that it leaves."""
        found = [match for line in self.last if (match := FOLLOWS.search(line.decode(errors="replace")))]
        return int(found[-1][1]) if found else None


@contextmanager
def forwarded(attempts: "Attempts") -> Iterator[None]:
    """While it lasts, SIGTERM and Ctrl-C go to the processes and not to this one."""
    before = {number: signal.signal(number, attempts.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_local(
    command: Sequence[str],
    processes: int,
    *,
    devices: int | None = None,
    restarts: int = 0,
    elastic: bool = False,
    grace: float = 30.0,
) -> int:
    """Runs a command in several processes of one job on this machine.

    Args:
        command: program and arguments, the same for all; `connect` in it finds its place by itself.
        processes: how many.
        devices: simulated CPU devices of each.
        restarts: attempts after the first, not counting those after one that ended with `REQUEUE`.
        elastic: an attempt that follows the loss of processes (to SIGKILL) is without as many.
        grace: seconds that processes have to save and end after SIGTERM or Ctrl-C.

    Returns:
        The exit status: 0, or that of the process that failed first in the last attempt.

    Raises:
        UserError: no command, one that cannot be started, or numbers that make no sense.

    Example:
        >>> run_local(["python", "recipes/train_cnn.py", "--mesh", "data=2"], 2)  # doctest: +SKIP
        0
    """
    refuse_no_command(command)
    if processes < 1 or restarts < 0 or (devices is not None and devices < 1):
        raise UserError("launch local: use --processes and --devices above 0, and --restarts from 0")
    if not 0 < grace < float("inf"):
        raise UserError(f"launch local: --grace {grace:g}: use seconds above 0 that have an end, such as 30")
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]} cannot be started: there is no such program")
    attempts = Attempts(command, devices, grace)
    now, left, number, pause = processes, restarts, 0, 0.0
    with forwarded(attempts):
        while True:
            start = time.monotonic()
            outcome = attempts.run(now, number)
            if outcome.status == REQUEUE and restarts:
                short = time.monotonic() - start < SHORT
                pause = min(2 * pause or PAUSE, SHORT) if short else 0.0
                if short:
                    say(f"told to stop after less than {SHORT:g} s; the next start is in {pause:g} s")
                attempts.rest(pause)
            if not outcome.status or not restarts or attempts.stopped:
                return outcome.status
            if outcome.status == UserError.status:
                if outcome.begun or now == processes or now == 1:
                    return outcome.status
                say(f"{now} processes were refused")
                now -= 1
            elif outcome.status == REQUEUE:
                now = processes
            elif not left:
                say(f"no restart is left of {restarts}")
                return outcome.status
            else:
                left -= 1
                now = max(1, processes - outcome.lost) if elastic else processes
            number += 1
            fewer = f", {processes - now} fewer than at first" if now < processes else ""
            say(f"restart {number}: {now} processes{fewer}; {left} of {restarts} restarts are left")


class Attempts:
    """Attempts of one command, and what is to happen to them from outside."""

    def __init__(self, command: Sequence[str], devices: int | None, grace: float) -> None:
        self.command = list(command)
        self.devices = devices
        self.grace = grace
        self.job = cluster.job(os.environ) or secrets.token_hex(8)  # a requeued batch job stays one job
        self.before = cluster.whole(os.environ, RESTARTS)
        self.stopped = 0
        self.deadline = float("inf")
        self.jobs: list[subprocess.Popen[bytes]] = []

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on; the second one ends everything at once."""
        again, self.stopped = self.stopped, number
        self.signal(signal.SIGKILL if again else number)
        self.deadline = time.monotonic() + self.grace

    def signal(self, number: int) -> None:
        """Sends a signal to the processes that still run, and at the end to what they have left behind."""
        for job in self.jobs:
            if job.returncode is None or number == signal.SIGKILL:
                try:
                    os.killpg(job.pid, number) if number == signal.SIGKILL else job.send_signal(number)
                except ProcessLookupError:
                    continue

    def rest(self, seconds: float) -> None:
        """Waits, but no longer when it is told to stop."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stopped:
            time.sleep(0.1)

    def run(self, processes: int, number: int) -> Outcome:
        """One attempt, from start to end."""
        if self.stopped:
            return Outcome(128 + self.stopped)
        ends: queue.Queue[End] = queue.Queue()
        said = [Said() for _ in range(processes)]
        self.jobs, self.deadline = [], float("inf")
        threads = []
        try:
            for rank, env in enumerate(self.environments(processes, number)):
                job = self.start(env)
                self.jobs.append(job)
                prefix = f"[{rank:>{len(str(processes - 1))}}] ".encode()
                assert job.stdout is not None
                assert job.stderr is not None
                tasks = [
                    threading.Thread(target=pump, args=(job.stdout, sys.stdout, prefix, None), daemon=True),
                    threading.Thread(
                        target=pump, args=(job.stderr, sys.stderr, prefix, said[rank]), daemon=True
                    ),
                    threading.Thread(target=watch, args=(job, rank, ends), daemon=True),
                ]
                threads += tasks
                for task in tasks:
                    task.start()
            own, forced = self.wait(ends, processes)
        finally:
            self.signal(signal.SIGKILL)
            for thread in threads:
                thread.join(2)
        return self.judge(own, forced, said)

    def start(self, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts one process, in a group of its own: Ctrl-C reaches it through us only."""
        # Where this launcher is killed itself, nobody but the kernel could end what it has started.
        tied = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        try:
            return subprocess.Popen(
                [*tied, *self.command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{self.command[0]} cannot be started ({error.strerror})") from error

    def environments(self, processes: int, number: int) -> Iterator[dict[str, str]]:
        """The environment of each process."""
        coordinator = f"127.0.0.1:{free_port()}"
        for rank in range(processes):
            env = os.environ | {
                COORDINATOR: coordinator,
                PROCESSES: str(processes),
                PROCESS_ID: str(rank),
                LOCAL: "1",
                JOB: self.job,
                RESTARTS: str(self.before + number),
                "PYTHONUNBUFFERED": "1",
            }
            env.pop(JAX_COORDINATOR, None)  # of another job; it would win over ours
            if self.devices is not None:
                env["JAX_NUM_CPU_DEVICES"] = str(self.devices)
            yield env

    def wait(self, ends: "queue.Queue[End]", processes: int) -> tuple[list[End], list[End]]:
        """Waits for all to end, and sees to it once one has failed.

        Returns:
            How processes ended by themselves, and how others did after they were told to.
        """
        own: list[End] = []
        forced: list[End] = []
        told = False
        while len(own) + len(forced) < processes:
            try:
                end = ends.get(timeout=0.1)
                (forced if told else own).append(end)
            except queue.Empty:
                pass
            failed = [end for end in own if end.status]
            if failed and not told and time.monotonic() > failed[0].time + SETTLE:
                told = True
                # Processes that save and leave with REQUEUE do so together, and need as long as saving takes.
                limit = self.grace if failed[0].status == REQUEUE else AFTERMATH
                self.deadline = min(self.deadline, time.monotonic() + limit)
                if failed[0].status != REQUEUE:
                    self.signal(signal.SIGTERM)
            if time.monotonic() > self.deadline:
                told = True
                self.signal(signal.SIGKILL)
                self.deadline = float("inf")
        return own, forced

    def judge(self, own: list[End], forced: list[End], said: list[Said]) -> Outcome:
        """Finds who failed first, and shows what it said."""
        # jax aborts processes whose coordinator has died: SIGABRT is a consequence where there is a cause.
        failed = sorted(
            (end for end in own if end.status), key=lambda end: (end.status == -signal.SIGABRT, end.time)
        )
        if not failed:
            status = 128 + self.stopped if self.stopped and forced else 0
            return Outcome(status)
        # Rank 0 stays until the others have heard from it why it fails, so they end before it does.
        status = failed[0].status
        cause = said[failed[0].rank].follows()
        first = next((end for end in [*failed, *forced] if end.rank == cause), failed[0])
        if not self.stopped and status != REQUEUE:
            words = said[first.rank].last
            say(f"process {first.rank} failed first: it {first}" + (", its last words:" if words else ""))
            for line in words:
                put(sys.stderr, b"    " + line)
            for end in [*failed, *forced]:
                if end is not first:
                    order = "later" if end.time >= first.time else "before it, which had told the others"
                    say(f"process {end.rank} {end} {abs(end.time - first.time):.1f} s {order}")
        lost = sum(end.status == -signal.SIGKILL for end in own)
        begun = any(one.begun for one in said)
        return Outcome(status if status > 0 else 128 - status, lost, begun)


def say(text: str) -> None:
    """A line of the launcher's own, on stderr."""
    put(sys.stderr, f"launch: {text}\n".encode())


def put(target: IO[str], line: bytes) -> None:
    """Writes a line at once. What nobody takes (a closed pipe, a full disk) is left out: the job goes on."""
    with WRITING, suppress(OSError):
        while line:
            line = line[os.write(target.fileno(), line) :]


def pump(source: IO[bytes], target: IO[str], prefix: bytes, said: Said | None) -> None:
    """Copies lines as they come, each with the number of its process."""
    with source:
        for line in source:
            whole = line if line.endswith(b"\n") else line + b"\n"
            if said is not None:
                said.hear(whole)
            put(target, prefix + whole)


def watch(job: subprocess.Popen[bytes], rank: int, ends: "queue.Queue[End]") -> None:
    """Reports the end of a process."""
    ends.put(End(rank, job.wait(), time.monotonic()))


def free_port() -> int:
    """A port of this machine that nobody uses."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise UserError(f"no port from {PORTS[0]} to {PORTS[-1]} is free on this machine")
