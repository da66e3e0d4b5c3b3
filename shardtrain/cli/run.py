"""The run of a recipe: from its flags to the files in its folder and the tables in the terminal."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Column, Table

from shardtrain import data
from shardtrain.checkpoint import Checkpoints
from shardtrain.cli import guards, resume
from shardtrain.cli.flags import Flags, RunFlags, check, one_of
from shardtrain.cli.start import (
    check_out,
    lock_folder,
    open_run,
    refuse_no_devices,
    refuse_other_folders,
    start_jax,
)
from shardtrain.errors import UserError
from shardtrain.experiments import Experiment, Report, Result, Task
from shardtrain.experiments.curves import plot_curves
from shardtrain.files import expanded
from shardtrain.guard import Guard
from shardtrain.guard.processes import meet
from shardtrain.launch import Limits, connect, job, restarts
from shardtrain.mesh import make_mesh
from shardtrain.train import Trainer
from shardtrain.train.callbacks import BestCheckpoint, JsonLines, TensorBoard
from shardtrain.train.callbacks.files import read_rows, write_whole, writing
from shardtrain.versions import revision

LESS_IS_BETTER = ("loss", "perplexity", "calibration_error", "mean_squared_error", "mean_absolute_error")
"""Metrics by which the best checkpoint is the one with the lowest value."""

Validation = Callable[[range], Iterable[tuple[Any, Any]]] | None


def kinds(flags: RunFlags) -> dict[str, Any]:
    """The arguments that every model takes: `param_dtype` and `rngs`."""
    return {"param_dtype": jnp.float64 if flags.x64 else jnp.float32, "rngs": nnx.Rngs(flags.seed)}


def with_validation(flags: RunFlags, arrays: data.Arrays) -> tuple[data.Arrays, Validation]:
    """The images to train on, and the batches to validate with where --validate-every asks for them."""
    if flags.validate_every is None:
        return arrays, None
    train, held_out = data.hold_out(arrays, seed=flags.seed)
    return train, lambda rows: data.eval_batches(held_out, flags.batch_size, rows=rows)


def run(flags: Flags, make_task: Callable[[Flags], Task]) -> None:
    """Trains, evaluates, and writes the run's files; `make_task` is called when jax is set up.

    Raises:
        UserError: whatever flags, data and mesh can get wrong, before a file is written; a bad step, a disk
            that is full.

    Example:
        >>> def train(flags: Flags) -> None:
        ...     cli.run(flags, make_task)
    """
    check(flags)
    cluster = connect(flags.coordinator, flags.processes, flags.process_id, Limits(start=flags.start_limit))
    start_jax(flags.devices, flags.mesh, x64=flags.x64, processes=cluster.processes if cluster else 1)
    with ExitStack() as folder, guards.guard(flags, expanded(flags.out).absolute()) as guard:
        guarded(flags, make_task, guard, folder)


def guarded(flags: Flags, make_task: Callable[[Flags], Task], guard: Guard, folder: ExitStack) -> None:
    """The run itself: what goes wrong in one process ends all. `folder` is closed when the run is over."""
    refuse_no_devices()
    mesh, out = make_mesh(flags.mesh), check_out(flags.out)
    refuse_other_folders(out, flags.start_limit)
    first_process = jax.process_index() == 0  # it alone prints and writes; all write checkpoints
    own = own_checkpoints(flags, out)
    source = resume_from(flags, own)
    task = make_task(flags)
    if flags.validate_every is not None and task.validation is None:
        raise UserError("--validate-every: this recipe has no validation examples; leave it out")
    experiment = Experiment(task, flags, mesh)
    goes_on = source is not None and source[0] is own
    if source is not None:
        experiment.start = resume.take_up(experiment.trainer, *source, flags, goes_on=goes_on)
    if task.objective is None:
        refuse_best(flags, experiment)
    experiment.prepare()
    refuse_best(flags, experiment)  # what an objective measures is known now
    meet("all have looked at the folder", guards.patience(flags))
    if first_process:
        with writing(out):
            folder.enter_context(lock_folder(out, flags.start_limit if restarts(os.environ) else 0.0))
            open_run(out, resume=goes_on)
    meet("the folder is open", guards.patience(flags))
    done = int(experiment.trainer.state.step)
    if source is not None and first_process:
        Console(stderr=True).print(f"resumed at step {done} of {flags.steps}", highlight=False)
    files = [JsonLines(out / "metrics.jsonl"), TensorBoard(out / "tensorboard")] if first_process else []
    validated = flags.validate_every is not None and flags.best.startswith("validation_")
    best = [BestCheckpoint()] if validated else []
    with own:
        result = experiment.run(callbacks=[*best, *files], checkpoints=own, guard=guard, progress=True)
    # The other processes help to compute, and their files go.
    with writing(out), tempfile.TemporaryDirectory() as aside:
        report = task.report(result.trainer, out if first_process else Path(aside))
        if first_process:
            conclude(flags, task, experiment.score, result, own, report)
    meet("the first process is done", guards.patience(flags))


def own_checkpoints(flags: RunFlags, out: Path) -> Checkpoints:
    """The checkpoints that a run writes to its folder."""
    said = {"flags": resume.as_json(flags), "git": revision(), "job": job(os.environ)}
    return Checkpoints(
        out / "checkpoints",
        every=flags.checkpoint_every,
        keep=flags.keep,
        best=flags.best or None,
        mode="min" if flags.best.removeprefix("validation_") in LESS_IS_BETTER else "max",
        manifest=said,
    )


def resume_from(flags: RunFlags, own: Checkpoints) -> tuple[Checkpoints, int | None] | None:
    """The checkpoint that a run is taken up from, which must be of the same run; None for a new run."""
    source = (own, None) if resume.started_again(own) else resume.source(flags.resume, own)
    if source is not None:
        checkpoints, step = source
        known = checkpoints.newest()[1] if step is None else checkpoints.manifest(step)
        resume.compare(flags, RunFlags, known, checkpoints.folder)
    return source


def refuse_best(flags: RunFlags, experiment: Experiment) -> None:
    """Refuses to look for the best checkpoint by a metric that the run does not measure.

    Raises:
        UserError: names the metrics that there are.
    """
    measured = ["loss", *experiment.trainer.measured]
    validated = [f"validation_{name}" for name in measured] if flags.validate_every else []
    if flags.best:
        one_of("best", flags.best, [*measured, *validated], "no such metric")


def conclude(
    flags: RunFlags, task: Task, score: str, run: Result, checkpoints: Checkpoints, report: Report
) -> None:
    """Writes the files of a run that has ended, and prints its tables."""
    out, best = checkpoints.folder.parent, checkpoints.best()
    rows = read_rows(out / "metrics.jsonl")
    if not rows:
        raise UserError(
            f"{out / 'metrics.jsonl'} is not there any more, so there is nothing to tell of the run, which "
            f"has all its steps; ask for more --steps, or name another --out"
        )
    speed = f"{task.unit}_per_second"
    speeds = sorted(row[speed] for row in rows)
    result = {
        "mesh": dict(run.trainer.mesh.shape),
        "processes": jax.process_count(),
        "model": task.name,
        "data": flags.data,
        "steps": flags.steps,
        "losses": [row["loss"] for row in rows],
        "final_loss": rows[-1]["loss"],
        f"test_{score}": run.test[score],
        speed: speeds[len(speeds) // 2],
        "census": run.census,
        **({} if best is None else {"best_checkpoint": best}),
        **report.result,
        "flags": resume.as_json(flags),
    }
    title = f"{task.name} on {flags.data}, mesh {flags.mesh}"
    write_whole(out / "result.json", json.dumps(result, indent=1) + "\n")
    plot_curves(rows, out / "curve.png", title, metrics=[score])
    console = Console(width=100, markup=False)  # folders may have brackets in their names
    console.print(closing_table(flags, task, score, title, result, report, guards.summary(rows, out)))
    for table in report.tables:
        console.print(table)
    if flags.compare:
        console.print(comparison(flags, task, result["losses"]))


def make_trainer(flags: RunFlags, task: Task, mesh: Mesh) -> Trainer:
    """The trainer of a run on another mesh than that of the flags."""
    return Experiment(task, flags, mesh).trainer


def closing_table(
    flags: RunFlags,
    task: Task,
    score: str,
    title: str,
    result: Mapping[str, Any],
    report: Report,
    summary: Mapping[str, str],
) -> Table:
    """The run in a short table."""
    table = Table("", Column(overflow="fold"), show_header=False, title=title)  # a path is shown whole
    table.add_row(f"test {score}", shown(score, result[f"test_{score}"]))
    table.add_row("last training loss", f"{result['final_loss']:.4f}")
    speed = result[f"{task.unit}_per_second"]
    table.add_row(f"{task.unit}/s (median)", f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}")
    moved = sum(row["bytes"] for row in result["census"])
    table.add_row("sent by each device", f"{moved / 1024:,.0f} KiB a step")
    for name, value in {**summary, **report.rows}.items():
        table.add_row(name, value)
    folder = flags.out
    table.add_row("checkpoint", str(folder / "checkpoints" / str(flags.steps)))
    if "best_checkpoint" in result:
        table.add_row(f"best by {flags.best}", str(folder / "checkpoints" / str(result["best_checkpoint"])))
    table.add_row("metrics", f"{folder / 'metrics.jsonl'} (TensorBoard: {folder / 'tensorboard'})")
    table.add_row("plot", str(folder / "curve.png"))
    table.add_row("all numbers", str(folder / "result.json"))
    return table


def shown(name: str, value: Any) -> str:
    """A metric for people: fractions of which more is better in per cent."""
    fraction = isinstance(value, float) and 0 <= value <= 1 and name not in LESS_IS_BETTER
    return f"{100 * value:.2f} %" if fraction else f"{value:.4f}" if isinstance(value, float) else str(value)


def comparison(flags: RunFlags, task: Task, losses: Sequence[float], steps: int = 20) -> Table:
    """Repeats the first steps on one device: both losses side by side."""
    one = make_mesh("data=1", devices=jax.local_devices()[:1])
    trainer = make_trainer(flags, task, one)
    feed = task.train(start=0, rows=trainer.rows(flags.batch_size))
    rows = trainer.fit(feed, steps=min(steps, flags.steps))
    table = Table(title=f"the same run on one device, first {len(rows)} steps")
    for column in ("step", flags.mesh, "one device", "relative difference"):
        table.add_column(column, justify="right")
    gaps = [abs(a - row["loss"]) / abs(row["loss"]) for a, row in zip(losses, rows, strict=False)]
    for k in sorted({0, 1, 4, 9, 14, len(rows) - 1} & set(range(len(rows)))):
        table.add_row(str(k + 1), f"{losses[k]:.6f}", f"{rows[k]['loss']:.6f}", f"{gaps[k]:.1e}")
    table.add_section()
    table.add_row("largest", "", "", f"{max(gaps):.1e}")
    return table
