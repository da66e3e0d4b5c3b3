"""Train a network cut into pipeline stages, with data, pixels and channels cut inside each stage.

    python recipes/train_pipeline.py --mesh data=2,pipe=4 --schedule zb-h1 --compare --out runs/pipeline

(8 simulated devices, about 3 minutes on 2 cores, at least 96 % test accuracy on digits.) The pipe axis of the
mesh says how many ranks there are, --schedule which of them does what in which order. --schedule none trains
the same model on the same microbatches without a pipeline, by accumulating gradients: the losses are equal.

Writes to --out: result.json, metrics.jsonl, curve.png, timeline.png, checkpoints/ and tensorboard/.
In result.json, `schedule` is the one asked for, and `bubble` its idle share in the classical model: each rank
waits only for what it needs, F = I = W. `runs_as` is the form of it that is run, such as "1f1b split"; its
`ticks`, its idle share by the counted costs of the stages (`lockstep_bubble`) and its `peak_in_flight` (a
number for each stage) are there, too.
"""

from shardtrain import cli  # first, so that Ctrl-C is one line from here on

# isort: split

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flax import nnx

import shardtrain as st
from shardtrain.errors import UserError
from shardtrain.mesh import parse, size

MODELS = ("resnet8", "resnet18", "resnet34", "lenet")


@dataclass(frozen=True, kw_only=True)
class Flags(cli.RunFlags):
    """What to train, in which stages, and where to write it."""

    mesh: str = "data=2,pipe=4"
    data: str = "digits"
    out: cli.Folder = Path("runs/pipeline")
    steps: int = 120
    lr: float = 0.05
    model: str = "resnet18"
    """resnet8, resnet18, resnet34 (all for small images, 16 features at first), lenet."""
    schedule: str = "1f1b"
    """none, gpipe, 1f1b, interleaved, zb-h1, zb-v, or a .csv file of actions."""
    microbatches: int = 8
    """How many microbatches each batch is cut into."""
    stages: str | None = None
    """The layers of each stage, such as 'stem,norm,blocks.0|blocks.1,...'; of equal cost by default."""
    in_flight: int | None = None
    """The most activations (of one microbatch in one stage) that a rank may keep at a time."""
    overlap: bool = False
    """Messages between stages travel while the next tick computes, and are used one tick later."""
    statistics: Literal["microbatch", "batch"] = "microbatch"
    """What updates the running statistics of batch norms: each microbatch, in the order of the schedule's
    forwards, or the whole batch, once."""

    free = frozenset({"schedule", "microbatches", "stages", "in_flight", "overlap"})


def make_task(flags: Flags) -> cli.Task:
    """The network that --model names, on the data that --data names, cut as the flags say."""
    if parse(flags.mesh).get("pipe") == -1 and size(st.make_mesh(flags.mesh), "pipe") == 1:
        raise UserError(
            f"--mesh {flags.mesh} leaves one device to pipe; use for example pipe=2, or more --devices"
        )
    dataset = st.data.load(flags.data)
    train_set, validation = cli.with_validation(flags, dataset.train)
    image = dataset.train.images.shape[1:]

    def make() -> nnx.Module:
        if flags.model == "lenet":
            return st.models.LeNet(dataset.classes, image, **cli.kinds(flags))
        depth = int(flags.model.removeprefix("resnet"))
        return st.models.ResNet(depth, dataset.classes, image[-1], stem="small", width=16, **cli.kinds(flags))

    trainer: dict[str, Any] = {"statistics": flags.statistics}
    if flags.schedule != "none":
        trainer["pipeline"] = st.Pipeline(flags.schedule, flags.stages, flags.in_flight, flags.overlap)
    return cli.Task(
        name=flags.model,
        make=make,
        train=partial(st.data.train_batches, train_set, flags.batch_size, seed=flags.seed),
        test=lambda rows: st.data.eval_batches(dataset.test, flags.batch_size, rows=rows),
        validation=validation,
        trainer=trainer,
        report=report,
    )


def report(trainer: st.Trainer, out: Path) -> cli.Report:
    """Returns figures of the pipeline, and draws its timeline."""
    weights = trainer.parameter_bytes
    if trainer.pipeline is None:
        m = trainer.accumulate
        numbers: dict[str, Any] = {"schedule": "none", "bubble": 0.0, "runs_as": "none", "ticks": 2 * m}
        numbers |= {"lockstep_bubble": 0.0, "peak_in_flight": [1], "parameter_bytes_per_device": weights}
        return cli.Report(numbers)
    pipe = trainer.pipeline
    cli.draw(pipe.schedule, out / "timeline.png", pipe.costs)
    numbers = {
        "schedule": pipe.plan.schedule.name,
        "bubble": float(st.pipeline.classical(pipe.plan.schedule).idle),
        "runs_as": pipe.schedule.name,
        "ticks": len(pipe.ticks.table),
        "lockstep_bubble": float(pipe.ticks.idle),
        "peak_in_flight": list(pipe.ticks.peak_of_stage),
        "parameter_bytes_per_device": weights,
    }
    rows = {
        "runs as": f"{numbers['runs_as']}, {numbers['ticks']} ticks for {trainer.accumulate} microbatches",
        "idle": f"{numbers['schedule']}: {100 * numbers['bubble']:.1f} % in the classical model; "
        f"as it runs: {100 * numbers['lockstep_bubble']:.1f} % in lockstep",
        "in flight, by stage": " ".join(map(str, numbers["peak_in_flight"])),
        "parameters on a device": f"{weights / 1024:,.0f} KiB",
        "timeline": str(out / "timeline.png"),
    }
    return cli.Report(numbers, rows, [pipe.table()])


def train(flags: Flags) -> None:
    """Trains, evaluates, and writes the run's files."""
    cli.one_of("model", flags.model, MODELS, "no such model")
    cli.at_least_1("microbatches", flags.microbatches)
    if flags.accumulate != 1:
        raise UserError(f"--accumulate {flags.accumulate}: here it is --microbatches {flags.accumulate}")
    if flags.microbatches == 1 and flags.schedule != "none":
        raise UserError("--microbatches 1: stages would work one at a time; use for example --microbatches 8")
    sizes = parse(flags.mesh)
    if flags.schedule == "none":
        if flags.stages is not None or flags.in_flight is not None or flags.overlap:
            raise UserError("--schedule none has no stages; leave out --stages, --in-flight and --overlap")
        if sizes.get("replica", 1) != 1:
            raise UserError(
                f"--schedule none has no stages, and the replicas of --mesh {flags.mesh} are for pipelines; "
                f"leave replica out of --mesh, or choose a schedule such as 1f1b"
            )
        sizes.pop("pipe", None)
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "data=1"
        flags = replace(flags, mesh=mesh)
    elif sizes.get("pipe", 1) == 1:
        raise UserError(f"--mesh {flags.mesh} has no pipe axis to cut the layers by; use for example pipe=2")
    elif sizes["pipe"] > 0:
        st.pipeline.make(
            flags.schedule, sizes["pipe"], flags.microbatches
        )  # refused before anything is built
    cli.run(replace(flags, accumulate=flags.microbatches), make_task)


if __name__ == "__main__":
    cli.main(train, Flags, __doc__)
