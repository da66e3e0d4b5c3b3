"""Resumes a run: chooses the checkpoint, and compares the flags with those that it was made with."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import Checkpoints
from shardtrain.errors import UserError
from shardtrain.files import expanded
from shardtrain.launch import job, restarts
from shardtrain.train import Trainer

log = logging.getLogger(__name__)

DEFINING_FLAGS = ("seed", "batch_size", "optimizer", "lr_schedule", "x64")
"""Flags of every recipe that define a run: with another value it is another run."""

CHANGEABLE_FLAGS = (
    "data",
    "lr",
    "weight_decay",
    "clip_norm",
    "accumulate",
    "microbatches",
    "dtype",
    "validate_every",
)
"""Flags that a resumed run may change, but then it differs from a run that was never interrupted."""


def as_json(flags: Any) -> dict[str, Any]:
    """Returns a recipe's flags as they are stored in a manifest and in `result.json`."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in vars(flags).items()}
    return json.loads(json.dumps(values))


def started_again(own: Checkpoints) -> bool:
    """Whether this is a restart by `launch local`, Slurm or a JobSet of a job that has saved a checkpoint.

    Such a job continues from that checkpoint, whatever --resume says. Checkpoints of an earlier job, which
    stay in --out until this job reaches its first step, do not count.
    """

    def is_of_this_job(step: int) -> bool:
        try:
            return own.manifest(step).get("job") == job(os.environ)
        except UserError:  # it is damaged
            return False

    return restarts(os.environ) > 0 and any(is_of_this_job(step) for step in reversed(own.steps()))


def source(resume: str, own: Checkpoints) -> tuple[Checkpoints, int | None] | None:
    """Returns the checkpoints that `--resume` names, and the step if it names one checkpoint.

    Args:
        resume: `"never"`, `"auto"`, or the path of a run's folder, of its `checkpoints` folder, or of one
            checkpoint.
        own: the checkpoints in `--out`, which `"auto"` uses if there are any.

    Returns:
        Checkpoints and step; None for a run that starts from scratch.

    Raises:
        UserError: if there is no checkpoint at the path, or if it is in `--out` itself.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return (own, None) if own.steps() else None
    place, step = expanded(resume).absolute(), None
    if os.path.isdir(place / "checkpoints"):  # also False if the path is longer than paths can be
        place = place / "checkpoints"
    elif place.name.isdecimal():  # the folder of a run may also be a number, which comes first
        place, step = place.parent, int(place.name)
    if os.path.realpath(place) == os.path.realpath(own.folder):
        raise UserError(
            f"--resume {resume} is in --out itself; go on with --resume auto, or name another --out"
        )
    found = Checkpoints(place)
    if not found.steps():
        raise UserError(
            f"--resume {resume}: there is no checkpoint in {place}; name a run's folder, its checkpoints/ "
            f"or one of the folders in it"
        )
    return found, step


def compare(flags: Any, common: type, manifest: Mapping[str, Any], where: Path) -> None:
    """Compares the flags with those of the run to be resumed.

    Flags that define a run must be equal. Other flags that affect the numbers are named in a warning.

    Args:
        flags: flags of a recipe. Those that only this recipe has define a run, unless they are in its `free`.
        common: the class of the flags that every recipe has.
        manifest: manifest of the checkpoint.
        where: folder of the checkpoint.

    Raises:
        UserError: if a flag that defines the run differs, such as seed, batch size or model; names the flags.
    """
    here, there = as_json(flags), manifest.get("flags")
    if not isinstance(there, dict):
        log.warning("the checkpoint in %s was not made by a recipe: its flags are not compared", where)
        return
    shared = {field.name for field in dataclasses.fields(common)}
    of_recipe = [name for name in here if name not in shared and name not in flags.free]
    differ = {name for name in here if name in there and here[name] != there[name]}
    if wrong := [name for name in (*DEFINING_FLAGS, *of_recipe) if name in differ]:
        raise UserError(
            f"--resume: the run in {where} was made with {_as_flags(there, wrong)}, not "
            f"{_as_flags(here, wrong)}; give the flags that it was made with, or --resume never"
        )
    if "microbatches" in differ:  # in the pipeline's recipe it also sets accumulate
        differ -= {"accumulate"}
    changed = [name for name in CHANGEABLE_FLAGS if name in differ]
    if "steps" in differ and here.get("lr_schedule") == "cosine":
        changed.append("steps")  # the length of the cosine
    if changed:
        log.warning(
            "RESUMED WITH OTHER FLAGS: %s, where the run in %s had %s; it goes on, but not as if it had "
            "never stopped",
            _as_flags(here, changed),
            where,
            _as_flags(there, changed),
        )


def take_up(
    trainer: Trainer, checkpoints: Checkpoints, step: int | None, flags: Any, *, goes_on: bool
) -> int:
    """Restores a run.

    Args:
        trainer: a trainer for the same run.
        checkpoints, step: the result of `source`.
        flags: flags of a recipe.
        goes_on: whether the run stays in its folder. It may then have done all its steps, and is only
            evaluated.

    Returns:
        The number of the batch to continue with.

    Raises:
        UserError: if no checkpoint is undamaged, if the run has done more steps than the flags ask for, or if
            it stopped within a batch of `--batch-size`.
    """
    done = trainer.restore(checkpoints, step)
    if done > flags.steps or (done == flags.steps and not goes_on):
        raise UserError(
            f"--resume: the run in {checkpoints.folder} has {done} steps done; ask for more than "
            f"--steps {flags.steps}"
        )
    batch, rest = divmod(trainer.examples, flags.batch_size)
    if rest:
        raise UserError(
            f"--resume: the run in {checkpoints.folder} stands at example {trainer.examples}, which is "
            f"within a batch of --batch-size {flags.batch_size}; resume with the one that it was made with"
        )
    return batch


def _as_flags(values: Mapping[str, Any], names: list[str]) -> str:
    """Returns values as they are given on the command line."""

    def one(name: str) -> str:
        value, flag = values[name], f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            return flag if value else f"--no-{name.replace('_', '-')}"
        return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"

    return ", ".join(map(one, names))
