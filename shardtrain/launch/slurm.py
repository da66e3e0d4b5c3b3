"""Writes a batch script for Slurm. The same job gives the same text every time."""

import math
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from shardtrain.errors import FAULT, REQUEUE, UserError
from shardtrain.guard.token import TOKEN
from shardtrain.launch.command import refuse_no_command, refuse_unprintable

SAVE_SECONDS = 120
"""How long before the time limit the processes are told to save."""

SECRET = r"od -An -N16 -tx1 /dev/urandom | tr -d ' \n'"
"""Prints 32 random hexadecimal digits."""

SWAP = f"status == {REQUEUE} ? 1 : status == 1 ? {REQUEUE} : status"
"""Swaps the statuses `REQUEUE` and 1 in the shell's arithmetic; done twice it changes nothing."""

WRAP = f'trap : INT TERM USR1; "$@"; status=$?; exit $(({SWAP}))'
"""Runs one process and swaps its status. Slurm sends signals to this shell, too, and they must not end it."""


@dataclass(frozen=True)
class SlurmJob:
    """What a job asks of Slurm.

    Attributes:
        name: name of the job.
        nodes: `"2"`, or `"2-4"` for as many as are free; a mesh with a size of -1 adapts to their number.
        gpus_per_node: number of GPUs of each node, 0 for none.
        tasks_per_node: number of processes on each node: one for each GPU, or one.
        cpus_per_task: number of processors of each process; None for the cluster's default.
        time: time limit, as Slurm writes it.
        partition: Slurm's partition; None for the cluster's default.
        restarts: how often the script starts the job again after a failure. An exit status of `REQUEUE` is
            not a failure.
        output: file of the log.
    """

    name: str
    nodes: str = "1"
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    time: str = "24:00:00"
    partition: str | None = None
    restarts: int = 3
    output: str = "slurm-%j.out"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9][0-9]{0,8}(-[1-9][0-9]{0,8})?", self.nodes):
            raise UserError(f"--nodes {self.nodes}: write a number such as 2, or a range such as 2-4")
        least, _, most = self.nodes.partition("-")
        if most and int(most) < int(least):
            raise UserError(f"--nodes {self.nodes}: write the smaller number first, {most}-{least}")
        if min(self.tasks_per_node, 1 if self.cpus_per_task is None else self.cpus_per_task) < 1:
            raise UserError("launch slurm: use --tasks-per-node and --cpus-per-task above 0")
        if self.gpus_per_node < 0 or self.restarts < 0:
            raise UserError("launch slurm: use --gpus-per-node and --restarts from 0")
        for flag, value in (
            ("name", self.name),
            ("time", self.time),
            ("partition", self.partition),
            ("log", self.output),
        ):
            if value is not None and not re.fullmatch(r"[^\s'\"\\#]+", value):  # sbatch has quotes of its own
                raise UserError(
                    f"--{flag} {value!r}: write it without blanks, quotes, \\ and #, and not empty"
                )
        if (seconds := time_limit(self.time)) <= SAVE_SECONDS:
            raise UserError(
                f"--time {self.time} is {seconds:g} s, and processes are told to save {SAVE_SECONDS} s "
                f"before its end; give more, such as 00:10:00"
            )


def time_limit(text: str) -> float:
    """Returns the seconds of a time limit as Slurm writes it; infinity for none.

    Raises:
        UserError: if Slurm would not take it.

    Example:
        >>> time_limit("90"), time_limit("1-2:03:04"), time_limit("unlimited")
        (5400.0, 93784.0, inf)
    """
    if text.lower() in ("unlimited", "infinite", "0"):
        return math.inf
    days, dash, clock = text.rpartition("-")
    # Without days one number is minutes and two are minutes and seconds; with days they begin with hours.
    units = (3600, 60, 1) if dash or clock.count(":") == 2 else (60, 1)
    numbers = clock.split(":")
    if (
        (dash and not re.fullmatch("[0-9]{1,6}", days))
        or len(numbers) > len(units)
        or not all(re.fullmatch("[0-9]{1,6}", number) for number in numbers)
        or any(int(number) > 59 for number in numbers[1:])
    ):
        raise UserError(
            f"--time {text}: write a time such as 90 (minutes), 12:00:00, 2-12 (days and hours), or unlimited"
        )
    seconds = sum(unit * int(number) for unit, number in zip(units, numbers, strict=False))
    return float(seconds + 86400 * int(days or 0))


def script(job: SlurmJob, command: list[str]) -> str:
    """Returns the batch script that runs a command in every process of a job.

    Args:
        job: what the job asks of Slurm.
        command: program and arguments.

    Raises:
        UserError: if there is no command, or if it cannot be written into a script.

    Example:
        >>> text = script(SlurmJob("cnn", nodes="2"), ["python", "recipes/train_cnn.py"])
        >>> text.splitlines()[2]
        '#SBATCH --job-name=cnn'
    """
    refuse_no_command(command)
    refuse_unprintable(command)
    # Slurm takes no more nodes of a range than there are tasks, so the tasks of a range are srun's alone.
    ranged = "-" in job.nodes
    cpus = job.cpus_per_task
    per_node = (cpus or 1) * job.tasks_per_node if ranged else cpus
    asked: list[tuple[str, object, str]] = [
        ("job-name", job.name, ""),
        ("partition", job.partition, ""),
        ("nodes", job.nodes, "as many as are free" if ranged else ""),
        ("ntasks-per-node", None if ranged else job.tasks_per_node, "processes; each finds its own place"),
        ("gpus-per-node", job.gpus_per_node or None, ""),
        ("cpus-per-task", per_node, "of a node" if ranged else ""),
        ("time", job.time, ""),
        ("requeue", True, "start again when a node fails"),
        (
            "signal",
            f"TERM@{SAVE_SECONDS}",
            f"tell the processes to save {SAVE_SECONDS} s before the time is over",
        ),
        ("open-mode", "append", "one log for all starts"),
        ("output", job.output, ""),
    ]
    tasks = f" --ntasks=$((SLURM_NNODES * {job.tasks_per_node}))" if ranged else ""
    if ranged or cpus:
        tasks += f" --cpus-per-task={cpus or 1}"
    lines = [
        f"#SBATCH --{flag}" + ("" if value is True else f"={value}")
        for flag, value, _ in asked
        if value is not None
    ]
    notes = [note for _, value, note in asked if value is not None]
    width = max(map(len, lines)) + 2
    header = "\n".join(
        f"{line:<{width}}# {note}" if note else line for line, note in zip(lines, notes, strict=True)
    )
    return f"""#!/bin/bash
# Written by `shardtrain launch slurm`. Submit it with `sbatch`.
{header}

# A secret of this start, by which its processes know each other's messages.
export {TOKEN}=$({SECRET})

# When one process fails, all are ended: the others would wait for it for ever. They may then end with
# {REQUEUE}, "I was told to stop, run me again", and srun takes the largest status of all. So that it is that
# of the failure, {REQUEUE} passes through srun as 1, and 1 as {REQUEUE}.
srun --kill-on-bad-exit=1{tasks} \\
    bash -c '{WRAP}' \\
    bash {shlex.join(command)}
status=$?
status=$(({SWAP}))

# {REQUEUE} is a stop in order (preempted, out of time). 2 is flags that are refused.
# Others are failures ({FAULT}: a hang, a lost process): the job starts again from its last checkpoint,
# {job.restarts} times at most. Slurm keeps the count as the job's comment.
failures=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%k | sed -n 's/^failures: //p')
echo "srun ended with status $status; restarts: ${{SLURM_RESTART_COUNT:-0}}, for failures: ${{failures:=0}}"
case $status in
    0 | 2) exit $status ;;
    {REQUEUE}) ;;
    *) [ "$failures" -lt {job.restarts} ] || exit $status
       scontrol update job="$SLURM_JOB_ID" comment="failures: $(( failures + 1 ))" || exit $status ;;
esac
scontrol requeue "$SLURM_JOB_ID" && sleep 600  # until Slurm ends this script
exit $status
"""


def submit(path: Path) -> str:
    """Submits a script to Slurm.

    Returns:
        Slurm's answer, which has the number of the job.

    Raises:
        UserError: if there is no Slurm on this machine, or if it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no sbatch on this machine; copy {path} to the cluster and type sbatch {path.name}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "sbatch did not answer within 60 s; see whether slurmctld runs: scontrol ping"
        ) from error
    if done.returncode:
        raise UserError(f"Slurm refuses {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
