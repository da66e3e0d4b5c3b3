"""What a user asks of a pipeline, and the plan that is made of it for one mesh."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from shardtrain.errors import UserError
from shardtrain.mesh import PIPE, size, text
from shardtrain.pipeline.schedules.generate import NAMES, make
from shardtrain.pipeline.schedules.schedule import Schedule, validate
from shardtrain.train.step import Remat


@dataclass(frozen=True, repr=False)
class Pipeline:
    """How the stages of a mesh with a `pipe` axis are cut and scheduled.

    The mesh says how many ranks the pipeline has, and `Trainer(accumulate=...)` how many microbatches a batch
    is cut into. What is left to choose is here, and has good defaults.

    Args:
        schedule: which rank does what in which order: one of `shardtrain.pipeline.NAMES` (1f1b by default),
            the path of a `.csv` file of actions, or a `Schedule`. A schedule whose backwards can be split or
            fused runs in the form that is fastest with the costs of the stages at hand.
        stages: the layers of each stage, such as `"stem,...|blocks.2,...|head"`, see
            `shardtrain.pipeline.split`; by default the stages are balanced by their counted costs.
        in_flight: the most activations (of one microbatch in one stage) that a rank may keep at a time. By
            default the schedule may keep as many as it likes.
        overlap: what a stage sends travels while the next tick computes, and is used one tick later. That
            takes more ticks, and pays where sending takes long beside computing.

    Example:
        >>> st.Pipeline(schedule="zb-h1", in_flight=8)
        Pipeline(schedule='zb-h1', in_flight=8)
    """

    schedule: str | Path | Schedule | None = None
    stages: str | None = None
    in_flight: int | None = None
    overlap: bool = False

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        typed = ", ".join(f"{name}={_typed(value)}" for name, value in given if value != defaults[name])
        return f"Pipeline({typed})"


def _typed(value: Any) -> str:
    """Returns a value as a user may have typed it; of a schedule just the name."""
    return f"<schedule {value.name!r}>" if isinstance(value, Schedule) else repr(value)


@dataclass(frozen=True)
class PipelinePlan:
    """How the pipeline of a mesh is to run.

    Attributes:
        schedule: as asked for; `fastest` may split or fuse its backwards.
        stages: the layers of each stage as text, None to balance them.
        in_flight: see `Pipeline`.
        remat: the stages that keep only what the stage before sends.
        latency: the ticks from the action that makes a message to the earliest that uses it on another rank.
        filler: see `TickLoop`.
    """

    schedule: Schedule
    stages: str | None
    in_flight: int | None
    remat: frozenset[int]
    latency: int = 1
    filler: float = 0.0

    @classmethod
    def of(
        cls, mesh: Mesh, microbatches: int, pipeline: Pipeline | None, remat: Remat
    ) -> "PipelinePlan | None":
        """Returns the plan that a user asked for, None on a mesh without stages.

        Args:
            mesh: that the model is trained on.
            microbatches: in a batch.
            pipeline: what the user asks for; None for the defaults.
            remat: see `Trainer`.

        Raises:
            UserError: a schedule that does not exist, or of other sizes; a `remat` that stages cannot do;
                anything asked of stages on a mesh that has none.
        """
        pipeline = pipeline or Pipeline()
        ranks = size(mesh, PIPE)
        if ranks == 1:
            _refuse_without_stages(mesh, pipeline, remat)
            return None
        if not isinstance(pipeline.stages, str | None):
            raise UserError(
                f"pipeline={pipeline}: write the layers of each stage, such as stages='stem,...|head', or "
                f"leave stages out to balance them"
            )
        schedule = _schedule_of(mesh, microbatches, pipeline)
        validate(schedule)
        if (schedule.ranks, schedule.microbatches) != (ranks, microbatches):
            raise UserError(
                f"schedule {schedule.name!r} is of {schedule.ranks} ranks and {schedule.microbatches} "
                f"microbatches, the mesh has pipe={ranks} and accumulate is {microbatches}; make them equal"
            )
        stages = _stages_with_remat(remat, schedule)
        return cls(schedule, pipeline.stages, pipeline.in_flight, stages, 2 if pipeline.overlap else 1)


def _refuse_without_stages(mesh: Mesh, pipeline: Pipeline, remat: Remat) -> None:
    asked = {
        "pipeline": pipeline if pipeline != Pipeline() else None,
        "remat": None if isinstance(remat, str) or callable(remat) else remat,
    }
    for name, value in asked.items():
        if value is not None:
            raise UserError(
                f"{name}={value!r} on mesh {text(mesh)}, which has no stages; add pipe=2 or more to "
                f"the mesh, or leave {name} out"
            )


def _schedule_of(mesh: Mesh, microbatches: int, pipeline: Pipeline) -> Schedule:
    """Returns the schedule that a user named or gave."""
    schedule, ranks = pipeline.schedule, size(mesh, PIPE)
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str | Path | None):
        raise UserError(
            f"pipeline={pipeline}: name one of the schedules {', '.join(NAMES)} or a .csv file, or give a "
            f"Schedule"
        )
    if microbatches == 1:
        raise UserError(
            f"mesh {text(mesh)} with accumulate=1: its stages would work one at a time; cut batches "
            f"into microbatches that follow each other, such as accumulate={4 * ranks}"
        )
    return make("1f1b" if schedule is None else str(schedule), ranks, microbatches)


def _stages_with_remat(remat: Remat, schedule: Schedule) -> frozenset[int]:
    """Returns the stages that keep only what the stage before sends."""
    stages = frozenset(range(schedule.stages))
    if remat is None:
        return frozenset()
    if remat == "nothing":
        return stages
    if isinstance(remat, str) or not isinstance(remat, Collection):
        raise UserError(
            f"remat={remat!r} on a mesh with pipe={schedule.ranks}; stages keep all that the backward pass "
            f"needs (None) or only their inputs ('nothing', or the numbers of such stages, as (0, 1)); a "
            f"model's own remat=True works too"
        )
    if not stages.issuperset(remat):
        raise UserError(
            f"remat={remat!r}: schedule {schedule.name!r} has the stages 0 to {schedule.stages - 1}; name "
            f"some of them, or 'nothing' for all"
        )
    return frozenset(remat)
