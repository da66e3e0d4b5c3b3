"""How a mesh's pipeline is to run, as a user asked for it."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from shardtrain.errors import UserError
from shardtrain.mesh import PIPE, size, text
from shardtrain.pipeline.schedules.generate import NAMES, make
from shardtrain.pipeline.schedules.schedule import Schedule, validate
from shardtrain.train.step import Remat


@dataclass(frozen=True)
class Pipeline:
    schedule: str | Path | Schedule | None = None
    stages: str | None = None
    in_flight: int | None = None
    overlap: bool = False


@dataclass(frozen=True)
class PipelinePlan:
    """How a mesh's pipeline is to run; see `Trainer` for the meaning of the fields."""

    schedule: Schedule
    stages: str | None
    in_flight: int | None
    remat: frozenset[int]
    hop: int = 1
    bubble: float = 0.0

    @classmethod
    def of(
        cls,
        mesh: Mesh,
        microbatches: int,
        pipeline: Pipeline,
        remat: Remat,
    ) -> "PipelinePlan | None":
        """The plan that a user asked for; None on a mesh without stages.

        Raises:
            UserError: a schedule that there is not, or of other sizes; a `remat` that stages cannot do;
                anything of stages where there are none.
        """
        schedule, stages, in_flight, overlap = (
            pipeline.schedule,
            pipeline.stages,
            pipeline.in_flight,
            pipeline.overlap,
        )
        ranks = size(mesh, PIPE)
        if ranks == 1:
            asked = {
                "schedule": schedule,
                "stages": stages,
                "in_flight": in_flight,
                "overlap": overlap or None,
                "remat": None if isinstance(remat, str) or callable(remat) else remat,
            }
            for name, value in asked.items():
                if value is not None:
                    raise UserError(
                        f"{name}={value!r} on mesh {text(mesh)}, which has no stages; add pipe=2 or more to "
                        f"the mesh, or leave {name} out"
                    )
            return None
        schedule = "1f1b" if schedule is None else schedule
        if isinstance(schedule, str | Path):
            if microbatches == 1:
                raise UserError(
                    f"mesh {text(mesh)} with accumulate=1: its stages would work one at a time; cut batches "
                    f"into microbatches that follow each other, such as accumulate={4 * ranks}"
                )
            schedule = make(str(schedule), ranks, microbatches)
        if not isinstance(schedule, Schedule):
            raise UserError(
                f"schedule={schedule!r}; name one of {', '.join(NAMES)} or a .csv file, or give a Schedule"
            )
        if not isinstance(stages, str | None):
            raise UserError(f"stages={stages!r}; write a layout such as 'stem,...|head', or None to balance")
        validate(schedule)
        if (schedule.ranks, schedule.microbatches) != (ranks, microbatches):
            raise UserError(
                f"schedule {schedule.name!r} is of {schedule.ranks} ranks and {schedule.microbatches} "
                f"microbatches, the mesh has pipe={ranks} and accumulate is {microbatches}; make them equal"
            )
        again = _computed_again(remat, schedule)
        return cls(schedule, stages, in_flight, again, 2 if overlap else 1)


def _computed_again(remat: Remat, schedule: Schedule) -> frozenset[int]:
    """The stages that keep their inputs alone."""
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
