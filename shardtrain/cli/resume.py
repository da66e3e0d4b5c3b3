"""Taking up a run: from which checkpoint, and whether the flags are those of the same run."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import Checkpoints
from shardtrain.errors import UserError
from shardtrain.launch import job, restarts
from shardtrain.train import Trainer

log = logging.getLogger(__name__)

DECIDE = ("seed", "batch_size", "optimizer", "x64")
"""Flags of every recipe with another value of which a run is another run."""

BEND = (
    "data",
    "lr",
    "lr_schedule",
    "weight_decay",
    "clip_norm",
    "accumulate",
    "microbatches",
    "dtype",
    "validate_every",
)
"""Flags with another value of which a run goes on, but not as if it had never stopped."""


def as_json(flags: Any) -> dict[str, Any]:
    """A recipe's flags as a manifest and `result.json` have them."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in vars(flags).items()}
    return json.loads(json.dumps(values))


def started_again(own: Checkpoints) -> bool:
    """Whether `launch local`, Slurm or a JobSet has started this job again after it had saved.

    It goes on from there then, whatever --resume said of its first start. The checkpoints of an earlier job,
    which lie in --out until this one gets to its first step, are another thing.
    """

    def is_ours(step: int) -> bool:
        try:
            return own.manifest(step).get("job") == job(os.environ)
        except UserError:  # a damaged one, of whatever job
            return False

    return restarts(os.environ) > 0 and any(is_ours(step) for step in reversed(own.steps()))


def source(resume: str, own: Checkpoints) -> tuple[Checkpoints, int | None] | None:
    """The checkpoints that `--resume` names, and the one of them where it names one.

    Args:
        resume: "never", "auto", a run's folder, its checkpoints' folder, or the folder of one checkpoint.
        own: those of `--out`, which "auto" takes if there are any.

    Returns:
        None for a run that starts anew.

    Raises:
        UserError: a path where there is none, or that of `--out` itself.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return (own, None) if own.steps() else None
    place, step = Path(resume).expanduser().absolute(), None
    if os.path.isdir(place / "checkpoints"):  # False, too, where the path is longer than paths can be
        place = place / "checkpoints"
    elif place.name.isdecimal():  # a run's folder may have a number for its name, too
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
    """Refuses to take up another run than the flags ask for, and says what bends this one.

    Args:
        flags: of a recipe; those of its own decide what a run is, unless they are in its `free`.
        common: the class of the flags that every recipe has.
        manifest: of the checkpoint.
        where: it is.

    Raises:
        UserError: flags that say another seed, batch size or model; names them.
    """
    here, there = as_json(flags), manifest.get("flags")
    if there is None:
        log.warning("the checkpoint in %s was not made by a recipe: its flags are not compared", where)
        return
    shared = {field.name for field in dataclasses.fields(common)}
    own = [name for name in here if name not in shared and name not in flags.free]
    differ = {name for name in here if name in there and here[name] != there[name]}
    if wrong := [name for name in (*DECIDE, *own) if name in differ]:
        raise UserError(
            f"--resume: the run in {where} was made with {_said(there, wrong)}, not {_said(here, wrong)}; "
            f"give the flags that it was made with, or --resume never"
        )
    if "microbatches" in differ:  # by which the pipeline's recipe says how often it accumulates
        differ -= {"accumulate"}
    bent = [name for name in BEND if name in differ]
    if "steps" in differ and here.get("lr_schedule") == "cosine":
        bent.append("steps")  # the cosine's length
    if bent:
        log.warning(
            "RESUMED WITH OTHER FLAGS: %s, where the run in %s had %s; it goes on, but not as if it had "
            "never stopped",
            _said(here, bent),
            where,
            _said(there, bent),
        )


def take_up(
    trainer: Trainer, checkpoints: Checkpoints, step: int | None, flags: Any, *, goes_on: bool
) -> int:
    """Restores a run.

    Args:
        trainer: of the same run.
        checkpoints, step: what `source` returned.
        flags: of a recipe.
        goes_on: the run stays in its folder, and may have all its steps done: it is evaluated then.

    Returns:
        The batch that it goes on with.

    Raises:
        UserError: no whole checkpoint, one of more steps than are asked for, or one that stands between two
            batches of `--batch-size`.
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


def _said(values: Mapping[str, Any], names: list[str]) -> str:
    def one(name: str) -> str:
        value, flag = values[name], f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            return flag if value else f"--no-{name.replace('_', '-')}"
        return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"

    return ", ".join(map(one, names))
