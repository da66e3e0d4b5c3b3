"""`shardtrain launch`: runs a command in the processes of a job, here or on a cluster."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shardtrain.cli.outputs import write_new
from shardtrain.errors import UserError
from shardtrain.files import expanded
from shardtrain.launch import kubernetes, slurm
from shardtrain.launch.local import run_local

MARK = "# Written by `shardtrain launch "
"""Near the beginning of each job file; another file is not replaced."""


@dataclass(frozen=True)
class Local:
    """Runs a command in real processes on this machine: `shardtrain launch local -n 4 -- python train.py`.

    Each line of output begins with the number of its process. When one fails, the others are ended, its last
    lines are shown, and its exit status is that of the command. SIGTERM and Ctrl-C are passed on.

    With --restarts the command starts again when a process fails (76: a hang, a lost process), and its recipe
    goes on from its last checkpoint. Exit status 75 ("I was told to stop") is not counted, 2 (flags refused)
    is final.
    """

    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 2
    """Number of processes."""
    devices: int | None = None
    """Number of simulated CPU devices of each process."""
    restarts: int = 0
    """How often the command is started again after a failure."""
    elastic: bool = False
    """A restart leaves out as many processes as SIGKILL ended in the attempt before (lost hardware, out of
    memory); those lost earlier take part again. If the command refuses the number (status 2 before training
    begins), it is reduced by one. For meshes with a size of -1."""
    grace: float = 30.0
    """Seconds that processes have to save and end after SIGTERM (to end after Ctrl-C), before SIGKILL."""

    def run(self, command: Sequence[str]) -> None:
        """Runs the command, and exits with its status."""
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


@dataclass(frozen=True)
class Slurm:
    """Writes a short batch script for Slurm: `shardtrain launch slurm --nodes 2 -- python train.py`.

    The script starts one process for each GPU (one for each node without), and the job again from its last
    checkpoint when a node or a process fails, or it was told to stop (status 75), which is not counted.
    """

    name: str = "shardtrain"
    """Of the job."""
    nodes: str = "1"
    """A number, or a range such as 2-4: as many as are free, for meshes with a size of -1."""
    gpus_per_node: int = 0
    """GPUs."""
    tasks_per_node: int | None = None
    """Processes; one for each GPU by default."""
    cpus_per_task: int | None = None
    """Processors of each process."""
    time: str = "24:00:00"
    """Time limit, such as 90 (minutes), 12:00:00 or 2-12; 120 s before, processes are told to save."""
    partition: str | None = None
    """The cluster's default without."""
    restarts: int = 3
    """After failures of the program."""
    log: str = "slurm-%j.out"
    """File of the output."""
    out: Path = Path("job.sbatch")
    """File of the script, new or one of these; - prints it."""
    submit: bool = False
    """Hand it to Slurm at once."""

    def run(self, command: Sequence[str]) -> None:
        """Writes the script, and submits it if asked to."""
        if self.submit and str(self.out) == "-":
            raise UserError("--submit hands a file to Slurm, --out - makes none; leave out one of them")
        tasks = max(1, self.gpus_per_node) if self.tasks_per_node is None else self.tasks_per_node
        job = slurm.SlurmJob(
            name=self.name,
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            tasks_per_node=tasks,
            cpus_per_task=self.cpus_per_task,
            time=self.time,
            partition=self.partition,
            restarts=self.restarts,
            output=self.log,
        )
        write_or_print(self.out, slurm.script(job, list(command)))
        if self.submit:
            print(slurm.submit(expanded(self.out)))


@dataclass(frozen=True)
class Kubernetes:
    """Writes a JobSet manifest: `shardtrain launch k8s --image me/cnn:1 --pods 2 -- python train.py`.

    Each pod is one process. All start again from the last checkpoint when one fails, or is evicted or told to
    stop (status 75), which is not counted.
    """

    image: str
    """Container image that has shardtrain and the recipe in it."""
    name: str = "shardtrain"
    """Of the JobSet."""
    pods: int = 1
    """Processes."""
    gpus: int = 0
    """NVIDIA GPUs of each pod."""
    cpu: str = "4"
    """Processors of each pod."""
    memory: str = "16Gi"
    """Of each pod."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) for checkpoints, mounted at /runs."""
    restarts: int = 3
    """After failures of the program."""
    grace: int = 120
    """Seconds that pods have to save when they are to end."""
    out: Path = Path("jobset.yaml")
    """File of the manifest, new or one of these; - prints it."""

    def run(self, command: Sequence[str]) -> None:
        """Writes the manifest."""
        job = kubernetes.KubernetesJob(
            name=self.name,
            image=self.image,
            pods=self.pods,
            gpus=self.gpus,
            cpu=self.cpu,
            memory=self.memory,
            claim=self.claim,
            restarts=self.restarts,
            grace=self.grace,
        )
        write_or_print(self.out, kubernetes.manifest(job, list(command)))


def write_or_print(path: Path, text: str) -> None:
    """Writes a job file, or prints it if the path is `-`.

    Raises:
        UserError: if the path cannot be written, or if there is a file that is no such job file.
    """
    if str(path) == "-":
        print(text, end="")
        return
    path = expanded(path)
    replaced = write_new("--out", path, text, MARK)
    print(f"wrote {path}{' in place of another job' if replaced else ''}", file=sys.stderr)
