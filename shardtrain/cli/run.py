"""What all recipes have in common: the optimizer, and the way from the first step to the files."""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Column, Table

from shardtrain import compat
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
from shardtrain.guard import Guard
from shardtrain.guard.processes import meet
from shardtrain.launch import Limits, connect, job, restarts
from shardtrain.mesh import make_mesh, size
from shardtrain.nn import LayoutTable
from shardtrain.plan import census
from shardtrain.train import Trainer, losses
from shardtrain.train.report import Recorder, plot_curves, read_rows, write_whole, writing
from shardtrain.train.step import PerExample
from shardtrain.versions import revision

OF_STAGES = ("schedule", "stages", "in_flight", "overlap")
"""Arguments of `Trainer` that the same run on one device does without."""


@runtime_checkable  # a recipe may be imported where types are checked at run time
class Batches(Protocol):
    """The training batches from step `start` on: those `rows` of each that this process holds."""

    def __call__(self, *, start: int, rows: range) -> Iterator[tuple[Any, Any]]: ...


@dataclass(frozen=True)
class Report:
    """What a recipe has to say of its run besides what every run says.

    Attributes:
        result: more entries of `result.json`.
        rows: more rows of the closing table, name and value.
        tables: more tables to print.
    """

    result: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Task:
    """What a recipe trains, and on what.

    Attributes:
        name: of the model, `"resnet8"`.
        make: makes the network.
        train: the training batches.
        test: the test batches, those rows of each that this process holds.
        loss, metrics: as `Trainer` takes them.
        score: the metric that the run is judged by.
        layout: what is cut otherwise than by default, as `Trainer` takes it.
        trainer: more arguments of `Trainer`.
        report: called after the evaluation with the trainer and the run's folder, for pictures and numbers
            of the recipe's own.
    """

    name: str
    make: Callable[[], nnx.Module]
    train: Batches
    test: Callable[[range], Iterable[tuple[Any, Any]]]
    loss: PerExample = losses.cross_entropy
    metrics: Mapping[str, PerExample] | None = None
    score: str = "accuracy"
    layout: LayoutTable | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[Trainer, Path], Report] = lambda trainer, out: Report()

    @cached_property
    def model(self) -> nnx.Module:
        """The network, its initial values made by one program, which is compiled in haste as it runs once."""
        kept = []

        def values() -> nnx.State:
            graph, state = nnx.split(self.make())
            kept.append(graph)
            return state

        state = jax.jit(values, compiler_options=compat.in_haste())()
        return nnx.merge(kept[0], state)


def kinds(flags: RunFlags) -> dict[str, Any]:
    """The arguments that every model takes: `param_dtype` and `rngs`."""
    return {"param_dtype": jnp.float64 if flags.x64 else jnp.float32, "rngs": nnx.Rngs(flags.seed)}


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
    with ExitStack() as folder, guards.guard(flags, flags.out.expanduser().absolute()) as guard:
        guarded(flags, make_task, guard, folder)


def guarded(flags: Flags, make_task: Callable[[Flags], Task], guard: Guard, folder: ExitStack) -> None:
    """The run itself: what goes wrong in one process ends all. `folder` is closed when the run is over."""
    refuse_no_devices()
    mesh, out = make_mesh(flags.mesh), check_out(flags.out)
    refuse_other_folders(out, flags.start_limit)
    first_process = jax.process_index() == 0  # it alone prints and writes; of checkpoints each its shards
    said = {"flags": resume.as_json(flags), "git": revision(), "job": job(os.environ)}
    own = Checkpoints(
        out / "checkpoints",
        every=flags.checkpoint_every,
        keep=flags.keep,
        best=flags.best or None,
        mode="min" if flags.best == "loss" else "max",
        manifest=said,
    )
    source = (own, None) if resume.started_again(own) else resume.source(flags.resume, own)
    if source is not None:
        checkpoints, step = source
        known = checkpoints.newest()[1] if step is None else checkpoints.manifest(step)
        resume.compare(flags, RunFlags, known, checkpoints.folder)
    task = make_task(flags)
    if flags.best:
        one_of("best", flags.best, ["loss", *measured(task)], "no such metric")
    trainer = make_trainer(flags, task, mesh)
    goes_on = source is not None and source[0] is own
    start = resume.take_up(trainer, *source, flags, goes_on=goes_on) if source is not None else 0
    rows_here = trainer.rows(flags.batch_size)
    feed = task.train(start=start, rows=rows_here)
    first = next(feed)
    trainer.compiled_step(trainer.place(*first))  # whatever does not fit is refused before a file is written
    meet("all have looked at the folder", guards.patience(flags))
    if first_process:
        with writing(out):
            folder.enter_context(lock_folder(out, flags.start_limit if restarts(os.environ) else 0.0))
            open_run(out, resume=goes_on)
    meet("the folder is open", guards.patience(flags))
    done = int(trainer.state.step)
    if source is not None and first_process:
        Console(stderr=True).print(f"resumed at step {done} of {flags.steps}", highlight=False)
    with Recorder(out, done if goes_on else 0) if first_process else nullcontext() as recorder, own:
        trainer.fit(
            itertools.chain([first], feed),
            steps=flags.steps,
            observers=[recorder] if recorder else [],
            checkpoints=own,
            guard=guard,
        )
    test = trainer.evaluate(task.test(rows_here))
    # The other processes help to compute, and their files go.
    with writing(out), tempfile.TemporaryDirectory() as aside:
        report = task.report(trainer, out if first_process else Path(aside))
        if first_process:
            conclude(flags, task, trainer, own, test, report)
    meet("the first process is done", guards.patience(flags))


def conclude(
    flags: RunFlags,
    task: Task,
    trainer: Trainer,
    checkpoints: Checkpoints,
    test: Mapping[str, float],
    report: Report,
) -> None:
    """Writes the files of a run that has ended, and prints its tables."""
    out, best = checkpoints.folder.parent, checkpoints.best()
    rows = read_rows(out / "metrics.jsonl")
    if not rows:
        raise UserError(
            f"{out / 'metrics.jsonl'} is not there any more, so there is nothing to tell of the run, which "
            f"has all its steps; ask for more --steps, or name another --out"
        )
    speeds = sorted(row["images_per_second"] for row in rows)
    result = {
        "mesh": dict(trainer.mesh.shape),
        "processes": jax.process_count(),
        "model": task.name,
        "data": flags.data,
        "steps": flags.steps,
        "losses": [row["loss"] for row in rows],
        "final_loss": rows[-1]["loss"],
        f"test_{task.score}": test[task.score],
        "images_per_second": speeds[len(speeds) // 2],
        "census": census.summary(census.census(trainer.compiled_text(), trainer.mesh)),
        **({} if best is None else {"best_checkpoint": best}),
        **report.result,
        "flags": resume.as_json(flags),
    }
    title = f"{task.name} on {flags.data}, mesh {flags.mesh}"
    write_whole(out / "result.json", json.dumps(result, indent=1) + "\n")
    plot_curves(rows, out / "curve.png", title)
    console = Console(width=100, markup=False)  # folders may have brackets in their names
    console.print(closing_table(flags, task, title, result, report, guards.summary(rows, out)))
    for table in report.tables:
        console.print(table)
    if flags.compare:
        console.print(comparison(flags, task, result["losses"]))


def measured(task: Task) -> list[str]:
    """Names of the metrics that the rows of a task have."""
    if task.metrics is None:
        return ["accuracy"] if task.loss is losses.cross_entropy else []
    return list(task.metrics)


def make_optimizer(flags: RunFlags) -> optax.GradientTransformation:
    """The optimizer that --optimizer names, with its schedule."""
    warmup = max(1, flags.steps // 10)
    rate: Any = flags.lr
    if flags.lr_schedule == "cosine":
        steps = max(flags.steps, warmup + 1)
        rate = optax.warmup_cosine_decay_schedule(flags.lr / 10, flags.lr, warmup, steps)

    def kernels(params: dict[str, jax.Array]) -> dict[str, bool]:
        return {name: name.endswith("kernel") for name in params}

    if flags.optimizer == "sgd":
        return optax.chain(
            optax.add_decayed_weights(flags.weight_decay, mask=kernels), optax.sgd(rate, momentum=0.9)
        )
    if flags.optimizer == "adam":
        return optax.adam(rate)
    make = {"adamw": optax.adamw, "lamb": optax.lamb}[flags.optimizer]
    return make(rate, weight_decay=flags.weight_decay, mask=kernels)


def make_trainer(flags: RunFlags, task: Task, mesh: Mesh) -> Trainer:
    """The trainer on `mesh`; everything that flags can get wrong is refused here."""
    staged = size(mesh, "pipe") > 1
    more = {name: value for name, value in task.trainer.items() if staged or name not in OF_STAGES}
    return Trainer(
        task.model,
        make_optimizer(flags),
        mesh=mesh,
        loss=task.loss,
        metrics=task.metrics,
        layout=task.layout,
        parameters=flags.parameters if flags.parameters in mesh.shape else (),
        accumulate=flags.accumulate,
        dtype=None if flags.dtype == "float32" else flags.dtype,
        remat=None if flags.remat == "none" else flags.remat,
        clip_norm=flags.clip_norm,
        skip_bad=flags.on_nan == "skip",
        **more,
    )


def closing_table(
    flags: RunFlags,
    task: Task,
    title: str,
    result: Mapping[str, Any],
    report: Report,
    summary: Mapping[str, str],
) -> Table:
    """The run in a short table."""
    table = Table("", Column(overflow="fold"), show_header=False, title=title)  # a path is shown whole
    table.add_row(f"test {task.score}", f"{100 * result[f'test_{task.score}']:.2f} %")
    table.add_row("last training loss", f"{result['final_loss']:.4f}")
    speed = result["images_per_second"]
    table.add_row("images/s (median)", f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}")
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
