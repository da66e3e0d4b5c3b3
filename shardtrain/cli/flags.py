"""The flags that all recipes have, and checks of them that need neither data nor devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

import tyro

from shardtrain.errors import UserError
from shardtrain.experiments import OPTIMIZERS, Config
from shardtrain.launch.rendezvous import refuse_endless
from shardtrain.mesh import parse

LARGEST_COUNT = 2**31 - 1
"""The largest number of steps of a run, and of examples of a batch."""

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class RunFlags(Config):
    """The flags of every recipe. A recipe gives defaults for mesh, data and out, and may add flags.

    What an experiment computes is in `Config`; the flags here say what is around it.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Flags(cli.RunFlags):
        ...     mesh: str = "data=2,height=2"
        ...     data: str = "digits"
        ...     out: cli.Folder = Path("runs/mine")
    """

    mesh: str
    data: str
    """digits (in scikit-learn), fashion-mnist (Debian's dataset-fashion-mnist), or a folder of idx, .npy or
    .npz files."""
    out: Folder
    """Folder of the run. An earlier run in it is moved aside, never overwritten."""
    x64: bool = False
    """Everything in float64, to compare meshes to the last bit."""
    devices: int | None = None
    """Simulated CPU devices of each process where there is no accelerator; what the mesh needs by default."""
    checkpoint_every: int | None = None
    """Steps from one checkpoint to the next, written while steps go on; there is one at the end anyway."""
    keep: int = 3
    """Last checkpoints that are kept."""
    best: str = ""
    """Keep the best checkpoint, too: by loss (the lowest) or by another metric (the highest), such as
    accuracy, of the training rows in the step that was saved; or, with --validate-every, by validation_loss,
    validation_accuracy and so on, saved whenever an evaluation is the best so far."""
    resume: str = "never"
    """never; auto: go on from the newest whole checkpoint in --out, if there is one, on this or another mesh;
    or a PATH: go on in --out from a checkpoint elsewhere, PATH being a run's folder or one checkpoint's."""
    watchdog: float = 600.0
    """Seconds without a step, after which the run shows where it hangs and ends with status 76, to be run
    again; five times as many for the start, compilations and the evaluation; 0 for no limit."""
    spike: float | None = None
    """A loss above this many times the median of the last 32 steps counts as not finite."""
    profile: str = ""
    """Steps to trace with jax's profiler, such as 10:20; SIGUSR1 traces the next 5 of a run at any time."""
    compare: bool = False
    """At the end, repeat the first 20 steps on one device and show both losses."""
    coordinator: str | None = None
    """In a job of several processes, HOST:PORT of process 0. This and the next two are known by themselves
    under Slurm, Open MPI, Kubernetes (Indexed Job, JobSet) and `shardtrain launch`."""
    processes: int | None = None
    """Processes of the job."""
    process_id: int | None = None
    """Number of this process, from 0."""
    start_limit: float = 300.0
    """Seconds to wait for all processes to be there."""

    free: ClassVar[frozenset[str]] = frozenset()
    """Flags of a recipe's own that a resumed run may change, because they say how to compute and not what."""


Flags = TypeVar("Flags", bound=RunFlags)


def one_of(flag: str, value: str, possible: Sequence[str], what: str) -> None:
    """Refuses a value of a flag that is not one of the possible ones.

    Raises:
        UserError: if it is not.

    Example:
        >>> one_of("model", "resnet19", ["resnet8", "resnet18"], "no such model")
        Traceback (most recent call last):
        shardtrain.errors.UserError: --model resnet19: there is no such model; there are resnet8, resnet18
    """
    if value not in possible:
        raise UserError(f"--{flag} {value}: there is {what}; there are {', '.join(possible)}")


def at_least_1(flag: str, *values: int) -> None:
    """Refuses values of a flag below 1.

    Raises:
        UserError: if there is one.

    Example:
        >>> at_least_1("features", 8, 0)
        Traceback (most recent call last):
        shardtrain.errors.UserError: --features 8 0: use 1 or more
    """
    if any(value < 1 for value in values):
        raise UserError(f"--{flag} {' '.join(map(str, values))}: use 1 or more")


def check(flags: RunFlags) -> None:
    """Refuses flags that are wrong whatever the data and the devices.

    Raises:
        UserError: if a flag is out of range, or if two flags contradict each other.
    """
    one_of("optimizer", flags.optimizer, OPTIMIZERS, "none")
    check_counts(flags)
    if not 0 <= flags.seed < 2**63:
        raise UserError(f"--seed {flags.seed}: use a number from 0 to {2**63 - 1}")
    if not 0 < flags.lr < float("inf"):
        raise UserError(f"--lr {flags.lr}: use a positive learning rate")
    if not 0 <= flags.weight_decay < float("inf"):
        raise UserError(f"--weight-decay {flags.weight_decay}: use 0 for none, or a positive number")
    refuse_endless("--start-limit", flags.start_limit)
    if flags.x64 and flags.dtype != "float32":
        raise UserError(f"--x64 computes in float64, --dtype {flags.dtype} does not; give one of them")
    if flags.resume != "never" and flags.compare:
        raise UserError("--compare repeats a run from its first step; leave out --resume or --compare")
    if flags.parameters and flags.parameters not in parse(flags.mesh):
        raise UserError(f"--parameters {flags.parameters}: --mesh {flags.mesh} has no such axis")


def check_counts(flags: RunFlags) -> None:
    """Refuses numbers of steps, examples and checkpoints below 1, or larger than a run can count."""
    for name in ("steps", "batch_size", "accumulate", "keep"):
        at_least_1(name.replace("_", "-"), value := getattr(flags, name))
        if value > LARGEST_COUNT:
            raise UserError(f"--{name.replace('_', '-')} {value}: use {LARGEST_COUNT} or less")
    for name in ("checkpoint_every", "validate_every"):
        if (value := getattr(flags, name)) is not None:
            at_least_1(name.replace("_", "-"), value)
