"""Runs the processes of a job on this machine, ends them together, and starts them again.

One attempt runs the command in every process. The attempt has failed as soon as one process has failed: the
launcher then ends the others and shows the last lines of the process that failed first. With restarts, one
attempt follows another until one succeeds.
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
from shardtrain.guard import protocol
from shardtrain.guard.token import TOKEN
from shardtrain.launch import cluster
from shardtrain.launch.cluster import (
    COORDINATOR,
    JAX_BIND_ADDRESS,
    JAX_COORDINATOR,
    JOB,
    LOCAL,
    PORTS,
    PROCESS_ID,
    PROCESSES,
    RESTARTS,
)
from shardtrain.launch.command import refuse_no_command

SIMULTANEOUS_SECONDS = 0.5
"""How long the launcher waits after the first failure, to see other processes that fail because of it."""

TERMINATION_SECONDS = 5.0
"""How long the others have to end after SIGTERM when one has failed. Without it they cannot even save."""

LAST_LINES = 30
"""How many of the last lines of a failed process are shown."""

SHORT_ATTEMPT_SECONDS = 60.0
"""An attempt that was told to stop after less than this is followed by a pause before the next one."""

FIRST_PAUSE_SECONDS = 1.0
"""The first such pause. Each pause is twice as long as the one before."""

LONGEST_PAUSE_SECONDS = 60.0
"""The limit of the pauses."""

WRITE_LOCK = threading.Lock()
"""Several threads write lines; one that holds this lock writes its line in one piece."""


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended.

    Attributes:
        rank: the number of the process.
        status: its exit status, or minus the signal that killed it.
        time: when it ended, by the monotonic clock.
    """

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
        status: exit status of the process that failed first, or 128 + the signal that killed it; 0 if none
            failed.
        lost: number of processes that SIGKILL ended and that the launcher did not kill itself.
        training_began: whether a process had begun to train.
    """

    status: int
    lost: int = 0
    training_began: bool = False


@dataclass
class StderrTail:
    """The last lines that a process wrote on stderr, and whether any line said that training begins."""

    lines: deque[bytes] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    training_began: bool = False

    def add(self, line: bytes) -> None:
        """Takes one more line."""
        self.lines.append(line)
        self.training_began = self.training_began or protocol.says_that_training_begins(
            line.decode(errors="replace")
        )

    def blamed_rank(self) -> int | None:
        """Returns the process whose failure this one gives as the reason why it exits, if it gives one."""
        ranks = [protocol.blamed_rank(line.decode(errors="replace")) for line in reversed(self.lines)]
        return next((rank for rank in ranks if rank is not None), None)


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

    SIGTERM and Ctrl-C are passed on to the processes; the second of them kills the processes.

    Args:
        command: program and arguments, the same for all processes; `connect` in the program finds its place
            in the job by itself.
        processes: number of processes.
        devices: number of simulated CPU devices of each process.
        restarts: number of attempts after the first. An attempt that follows an exit status of `REQUEUE` (75)
            is not counted.
        elastic: whether a restart leaves out as many processes as SIGKILL ended in the attempt before.
        grace: seconds that processes have to save and end after SIGTERM or Ctrl-C, before SIGKILL.

    Returns:
        The exit status: 0, or that of the process that failed first in the last attempt.

    Raises:
        UserError: if there is no command, if the program does not exist, or if a number is out of range.

    Example:
        >>> import sys
        >>> run_local([sys.executable, "-c", "print('hello')"], processes=2)
        0
    """
    refuse_no_command(command)
    if processes < 1 or restarts < 0 or (devices is not None and devices < 1):
        raise UserError("launch local: use --processes and --devices above 0, and --restarts from 0")
    if not 0 < grace < float("inf"):
        raise UserError(f"launch local: --grace {grace:g}: use seconds above 0 that have an end, such as 30")
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]} cannot be started: there is no such program")
    attempts, policy = Attempts(command, devices, grace), RestartPolicy(processes, restarts, elastic)
    with forward_signals(attempts):
        while True:
            start = time.monotonic()
            outcome = attempts.run(policy.size, policy.number)
            if restarts and outcome.status == REQUEUE:
                attempts.pause(policy.pause_after(time.monotonic() - start))
            if outcome.status == 0 or attempts.stopped or not policy.restart_after(outcome):
                return outcome.status


@contextmanager
def forward_signals(attempts: "Attempts") -> Iterator[None]:
    """Passes SIGTERM and Ctrl-C on to the processes while the context lasts."""
    before = {number: signal.signal(number, attempts.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RestartPolicy:
    """Decides after each attempt whether another one follows, when, and with how many processes.

    Args:
        processes: number of processes of the first attempt.
        restarts: number of attempts after the first.
        elastic: whether an attempt leaves out the processes that were lost in the one before.

    Attributes:
        size: number of processes of the next attempt.
        number: number of the next attempt, from 0.
    """

    def __init__(self, processes: int, restarts: int, elastic: bool) -> None:
        self.processes, self.restarts, self.elastic = processes, restarts, elastic
        self.size, self.number = processes, 0
        self._left = restarts
        self._pause = 0.0

    def pause_after(self, seconds: float) -> float:
        """Returns how long to wait after an attempt of so many seconds that was told to stop."""
        if seconds >= SHORT_ATTEMPT_SECONDS:
            self._pause = 0.0
            return 0.0
        self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        short = f"less than {SHORT_ATTEMPT_SECONDS:g} s"
        report(f"told to stop after {short}; the next start is in {self._pause:g} s")
        return self._pause

    def restart_after(self, outcome: Outcome) -> bool:
        """Whether another attempt follows; `size` and `number` are those of that attempt then."""
        if not self.restarts or not self._choose_size(outcome):
            return False
        self.number += 1
        missing = self.processes - self.size
        fewer = f", {missing} fewer than at first" if missing else ""
        left = f"{self._left} of {self.restarts} restarts are left"
        report(f"restart {self.number}: {self.size} processes{fewer}; {left}")
        return True

    def _choose_size(self, outcome: Outcome) -> bool:
        if outcome.status == UserError.status:
            # Flags that are refused stay refused. With fewer processes than asked for it may be their number.
            if outcome.training_began or self.size in (1, self.processes):
                return False
            report(f"{self.size} processes were refused")
            self.size -= 1
        elif outcome.status == REQUEUE:
            self.size = self.processes
        elif not self._left:
            report(f"no restart is left of {self.restarts}")
            return False
        else:
            self._left -= 1
            self.size = max(1, self.processes - outcome.lost) if self.elastic else self.processes
        return True


class Attempts:
    """The attempts of one command, one after the other.

    Args:
        command: program and arguments.
        devices: number of simulated CPU devices of each process.
        grace: seconds between a signal that is passed on and SIGKILL.

    Attributes:
        stopped: the signal that the launcher received last, 0 for none.
    """

    def __init__(self, command: Sequence[str], devices: int | None, grace: float) -> None:
        self.command = list(command)
        self.devices = devices
        self.grace = grace
        self.job = cluster.job(os.environ) or secrets.token_hex(8)  # a requeued batch job stays one job
        self.earlier_restarts = cluster.whole(os.environ, RESTARTS)
        self.stopped = 0
        self.deadline = float("inf")
        self.processes: list[subprocess.Popen[bytes]] = []

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: passes the first one on, and kills all processes at the second."""
        again, self.stopped = self.stopped, number
        self.signal(signal.SIGKILL if again else number)
        self.deadline = time.monotonic() + self.grace

    def signal(self, number: int) -> None:
        """Sends a signal to the processes that still run; SIGKILL also to the children of ended ones."""
        for process in self.processes:
            if process.returncode is None or number == signal.SIGKILL:
                try:
                    if number == signal.SIGKILL:
                        os.killpg(process.pid, number)
                    else:
                        process.send_signal(number)
                except ProcessLookupError:
                    continue

    def pause(self, seconds: float) -> None:
        """Waits for some seconds, or until the launcher receives a signal."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stopped:
            time.sleep(0.1)

    def run(self, size: int, number: int) -> Outcome:
        """Runs one attempt from start to end.

        Args:
            size: number of processes.
            number: number of the attempt, from 0.
        """
        if self.stopped:
            return Outcome(128 + self.stopped)
        ends: queue.Queue[ProcessEnd] = queue.Queue()
        tails = [StderrTail() for _ in range(size)]
        self.processes, self.deadline = [], float("inf")
        threads = []
        try:
            for rank, env in enumerate(self.environments(size, number)):
                process = self.start(env)
                self.processes.append(process)
                prefix = f"[{rank:>{len(str(size - 1))}}] ".encode()
                threads += start_readers(process, rank, prefix, tails[rank], ends)
            unforced, forced = self.wait(ends, size)
        finally:
            self.signal(signal.SIGKILL)
            for thread in threads:
                thread.join(2)
        return self.judge(unforced, forced, tails)

    def start(self, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts one process, in a process group of its own: Ctrl-C reaches it through the launcher only."""
        # If the launcher itself is killed, nobody but the kernel can end the processes that it has started.
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

    def environments(self, size: int, number: int) -> Iterator[dict[str, str]]:
        """Yields the environment of each process of an attempt."""
        coordinator, token = f"127.0.0.1:{free_port()}", secrets.token_hex(16)
        for rank in range(size):
            env = os.environ | {
                COORDINATOR: coordinator,
                PROCESSES: str(size),
                PROCESS_ID: str(rank),
                LOCAL: "1",
                TOKEN: token,
                JOB: self.job,
                RESTARTS: str(self.earlier_restarts + number),
                "PYTHONUNBUFFERED": "1",
            }
            for name in (JAX_COORDINATOR, JAX_BIND_ADDRESS):  # of another job, and would take precedence
                env.pop(name, None)
            if self.devices is not None:
                env["JAX_NUM_CPU_DEVICES"] = str(self.devices)
            yield env

    def wait(self, ends: "queue.Queue[ProcessEnd]", size: int) -> tuple[list[ProcessEnd], list[ProcessEnd]]:
        """Waits for all processes, and ends the others once one has failed.

        Returns:
            The ends of processes before the launcher intervened, and those after.
        """
        unforced: list[ProcessEnd] = []
        forced: list[ProcessEnd] = []
        intervened = False
        while len(unforced) + len(forced) < size:
            with suppress(queue.Empty):
                end = ends.get(timeout=0.1)
                (forced if intervened else unforced).append(end)
            failed = [end for end in unforced if end.status]
            if failed and not intervened and time.monotonic() > failed[0].time + SIMULTANEOUS_SECONDS:
                intervened = True
                # Processes that save and leave with REQUEUE do so together, and need as long as saving takes.
                limit = self.grace if failed[0].status == REQUEUE else TERMINATION_SECONDS
                self.deadline = min(self.deadline, time.monotonic() + limit)
                if failed[0].status != REQUEUE:
                    self.signal(signal.SIGTERM)
            if time.monotonic() > self.deadline:
                intervened = True
                self.signal(signal.SIGKILL)
                self.deadline = float("inf")
        return unforced, forced

    def judge(self, unforced: list[ProcessEnd], forced: list[ProcessEnd], tails: list[StderrTail]) -> Outcome:
        """Finds the process that failed first, and shows its last lines."""
        # jax aborts processes whose coordinator has died: SIGABRT is a consequence if there is another cause.
        failed = sorted(
            (end for end in unforced if end.status), key=lambda end: (end.status == -signal.SIGABRT, end.time)
        )
        if not failed:
            status = 128 + self.stopped if self.stopped and forced else 0
            return Outcome(status)
        status = failed[0].status
        if not self.stopped and status != REQUEUE:
            # Rank 0 stays until the others have heard from it why it fails, so they end before it does.
            blamed = tails[failed[0].rank].blamed_rank()
            first = next((end for end in [*failed, *forced] if end.rank == blamed), failed[0])
            report_failure(first, [*failed, *forced], tails[first.rank].lines)
        lost = sum(end.status == -signal.SIGKILL for end in unforced)
        training_began = any(tail.training_began for tail in tails)
        return Outcome(status if status > 0 else 128 - status, lost, training_began)


def report_failure(first: ProcessEnd, ends: Sequence[ProcessEnd], lines: Sequence[bytes]) -> None:
    """Shows the last lines of the process that failed first, and when each of the others ended."""
    report(f"process {first.rank} failed first: it {first}" + (", its last words:" if lines else ""))
    for line in lines:
        write_line(sys.stderr, b"    " + line)
    for end in ends:
        if end is not first:
            order = "later" if end.time >= first.time else "before it, which had told the others"
            report(f"process {end.rank} {end} {abs(end.time - first.time):.1f} s {order}")


def report(text: str) -> None:
    """Writes a line of the launcher itself on stderr."""
    write_line(sys.stderr, f"launch: {text}\n".encode())


def write_line(target: IO[str], line: bytes) -> None:
    """Writes a line at once. The job goes on where it cannot be written (a closed pipe, a full disk)."""
    with WRITE_LOCK, suppress(OSError):
        while line:
            line = line[os.write(target.fileno(), line) :]


def start_readers(
    process: subprocess.Popen[bytes],
    rank: int,
    prefix: bytes,
    tail: StderrTail,
    ends: "queue.Queue[ProcessEnd]",
) -> list[threading.Thread]:
    """Starts the threads that copy the output of a process and report its end."""
    assert process.stdout is not None
    assert process.stderr is not None
    threads = [
        threading.Thread(target=copy_lines, args=(process.stdout, sys.stdout, prefix, None), daemon=True),
        threading.Thread(target=copy_lines, args=(process.stderr, sys.stderr, prefix, tail), daemon=True),
        threading.Thread(target=report_end, args=(process, rank, ends), daemon=True),
    ]
    for thread in threads:
        thread.start()
    return threads


def copy_lines(source: IO[bytes], target: IO[str], prefix: bytes, tail: StderrTail | None) -> None:
    """Copies lines as they come, each with the number of its process in front."""
    with source:
        for line in source:
            whole = line if line.endswith(b"\n") else line + b"\n"
            if tail is not None:
                tail.add(whole)
            write_line(target, prefix + whole)


def report_end(process: subprocess.Popen[bytes], rank: int, ends: "queue.Queue[ProcessEnd]") -> None:
    """Waits for a process and puts its end into a queue."""
    ends.put(ProcessEnd(rank, process.wait(), time.monotonic()))


def free_port() -> int:
    """Returns a port that is free on this machine.

    Raises:
        UserError: if none of `PORTS` is free.

    Example:
        >>> free_port() in PORTS
        True
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise UserError(f"no port from {PORTS[0]} to {PORTS[-1]} is free on this machine")
