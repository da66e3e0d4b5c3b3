"""Train a convolutional network on images, on any mesh, with the numbers of one device.

The command that `make train` runs (8 simulated devices, under 2 minutes on 2 cores, at least 96 % test
accuracy on digits):

    python recipes/train_cnn.py --mesh data=2,height=2,channel=2 --compare --out runs/digits

Writes to --out: result.json, metrics.jsonl, curve.png, checkpoints/ and tensorboard/.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import shardtrain as st
from shardtrain import cli
from shardtrain.errors import UserError
from shardtrain.train import metrics

MODELS = ("resnet8", "resnet18", "resnet34", "resnet50", "lenet")
OPTIMIZERS = ("sgd", "adam", "adamw", "lamb")


@dataclass(frozen=True)
class Flags:
    """What to train, on what, and where to write it."""

    mesh: str = "data=2,height=2,channel=2"
    """Axes and sizes: data cuts the batch, height and width the pixels, channel the features.
    One size may be -1 and takes the devices that are left."""
    model: str = "resnet8"
    """resnet8 (small images), resnet18, resnet34, resnet50, lenet."""
    data: str = "digits"
    """digits (in scikit-learn), fashion-mnist (Debian's dataset-fashion-mnist), or a folder of idx, .npy or
    .npz files."""
    steps: int = 200
    """Updates in all."""
    batch_size: int = 128
    """Examples for one update, over all devices."""
    seed: int = 0
    """Of initial weights, data order and dropout."""
    optimizer: str = "sgd"
    """sgd (momentum 0.9), adam, adamw, lamb."""
    lr: float = 0.1
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: warm-up over the first tenth of the steps, then down to zero; constant: for runs that a later
    --resume with more --steps is to lengthen."""
    weight_decay: float = 5e-4
    """Decay of kernels, not of biases and norms; decoupled for adamw and lamb, in the gradient for sgd."""
    clip_norm: float | None = None
    """Clip gradients to this global norm."""
    accumulate: int = 1
    """Microbatches for one update."""
    parameters: str = ""
    """Mesh axis to spread parameters and optimizer state over, such as data (ZeRO-3, FSDP)."""
    remat: Literal["none", "contractions", "nothing"] = "none"
    """What the backward pass keeps: everything, only outputs of convolutions and linear maps, or nothing."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute in it; parameters and optimizer stay in float32."""
    x64: bool = False
    """Everything in float64, to compare meshes to the last bit."""
    devices: int | None = None
    """Simulated CPU devices where there is no accelerator; as many as the mesh needs by default."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/cnn")
    """Folder of the run. An earlier run in it is moved aside, never overwritten."""
    resume: bool = False
    """Go on from the checkpoint in --out, on this or another mesh."""
    compare: bool = False
    """At the end, repeat the first 20 steps on one device and show both losses."""


def make_model(flags: Flags, dataset: st.data.Dataset) -> nnx.Module:
    """The network that --model names, for the images of the data set."""
    image = dataset.train.images.shape[1:]

    def make() -> nnx.Module:
        kinds: dict[str, Any] = {
            "param_dtype": jnp.float64 if flags.x64 else jnp.float32,
            "rngs": nnx.Rngs(flags.seed),
        }
        if flags.model == "lenet":
            return st.models.LeNet(dataset.classes, image, **kinds)
        depth = int(flags.model.removeprefix("resnet"))
        stem: Literal["small", "large"] = "small" if min(image[:2]) < 64 else "large"
        return st.models.ResNet(depth, dataset.classes, image[-1], stem=stem, **kinds)

    return nnx.jit(make)()  # compiles all initial values at once


def make_optimizer(flags: Flags) -> optax.GradientTransformation:
    """The optimizer that --optimizer names, with its schedule."""
    warmup = max(1, flags.steps // 10)
    rate: Any = flags.lr
    if flags.schedule == "cosine":
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


def make_trainer(flags: Flags, dataset: st.data.Dataset, mesh: jax.sharding.Mesh) -> st.Trainer:
    """The trainer on `mesh`; everything that flags can get wrong is refused here."""
    return st.Trainer(
        make_model(flags, dataset),
        make_optimizer(flags),
        mesh=mesh,
        parameters=flags.parameters if flags.parameters in mesh.shape else (),
        accumulate=flags.accumulate,
        dtype=None if flags.dtype == "float32" else flags.dtype,
        remat=None if flags.remat == "none" else flags.remat,
        clip_norm=flags.clip_norm,
    )


def check(flags: Flags) -> None:
    """Refuses flags that no data and no mesh could make right."""
    if flags.model not in MODELS:
        raise UserError(f"--model {flags.model}: there is no such model; there are {', '.join(MODELS)}")
    if flags.optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer {flags.optimizer}: there is none; there are {', '.join(OPTIMIZERS)}")
    for name in ("steps", "batch_size", "accumulate"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(flags, name)}: use 1 or more")
    if not 0 < flags.lr < float("inf"):
        raise UserError(f"--lr {flags.lr}: use a positive learning rate")
    if flags.x64 and flags.dtype != "float32":
        raise UserError(f"--x64 computes in float64, --dtype {flags.dtype} does not; give one of them")
    if flags.resume and flags.compare:
        raise UserError("--compare repeats a run from its first step; leave out --resume or --compare")
    if flags.parameters and flags.parameters not in cli.parse(flags.mesh):
        raise UserError(f"--parameters {flags.parameters}: --mesh {flags.mesh} has no such axis")


def batches(flags: Flags, dataset: st.data.Dataset, trainer: st.Trainer) -> Any:
    """The training batches from the trainer's step on."""
    start = int(trainer.state.step)
    rows = trainer.rows(flags.batch_size)
    return st.data.train_batches(dataset.train, flags.batch_size, seed=flags.seed, start=start, rows=rows)


def train(flags: Flags) -> None:
    """Trains, evaluates, and writes the run's files."""
    check(flags)
    cli.start_jax(flags.devices, flags.mesh, x64=flags.x64)
    mesh = st.make_mesh(flags.mesh)
    out = cli.check_out(flags.out, resume=flags.resume)
    dataset = st.data.load(flags.data)
    trainer = make_trainer(flags, dataset, mesh)
    start = trainer.restore(out / "checkpoints") if flags.resume else 0
    if start >= flags.steps:
        raise UserError(
            f"--resume: the run in {out} has {start} steps done; ask for more than --steps {flags.steps}"
        )
    feed = batches(flags, dataset, trainer)
    first = next(feed)
    trainer.compiled_step(trainer.place(*first))  # whatever does not fit is refused before a file is written
    cli.open_run(out, resume=flags.resume)
    if start:
        Console(stderr=True).print(f"resumed at step {start} of {flags.steps}", highlight=False)
    with metrics.Recorder(out, start) as recorder:
        trainer.fit(itertools.chain([first], feed), steps=flags.steps, observers=[recorder])
    saved = trainer.save(out / "checkpoints")
    test = trainer.evaluate(
        st.data.eval_batches(dataset.test, flags.batch_size, rows=trainer.rows(flags.batch_size))
    )
    rows = metrics.read(out / "metrics.jsonl")
    speeds = sorted(row["images_per_second"] for row in rows)
    result = {
        "mesh": dict(mesh.shape),
        "model": flags.model,
        "data": flags.data,
        "steps": flags.steps,
        "losses": [row["loss"] for row in rows],
        "final_loss": rows[-1]["loss"],
        "test_accuracy": test["accuracy"],
        "images_per_second": speeds[len(speeds) // 2],
        "census": st.census.summary(st.census.census(trainer.compiled_text(), mesh)),
        "flags": {name: str(v) if isinstance(v, Path) else v for name, v in vars(flags).items()},
    }
    metrics.write_whole(out / "result.json", json.dumps(result, indent=1) + "\n")
    metrics.plot_curves(rows, out / "curve.png", f"{flags.model} on {flags.data}, mesh {flags.mesh}")
    show(flags, result, saved)
    if flags.compare:
        compare(flags, dataset, result["losses"])


def show(flags: Flags, result: dict[str, Any], saved: Path) -> None:
    """The run in a short table."""
    table = Table(show_header=False, title=f"{flags.model} on {flags.data}, mesh {flags.mesh}")
    table.add_row("test accuracy", f"{100 * result['test_accuracy']:.2f} %")
    table.add_row("last training loss", f"{result['final_loss']:.4f}")
    table.add_row("images/s (median)", f"{result['images_per_second']:,.0f}")
    moved = sum(row["bytes"] for row in result["census"])
    table.add_row("sent by each device", f"{moved / 1024:,.0f} KiB a step")
    folder = flags.out
    table.add_row("checkpoint", str(folder / "checkpoints" / saved.name))
    table.add_row("metrics", f"{folder / 'metrics.jsonl'} (TensorBoard: {folder / 'tensorboard'})")
    table.add_row("plot", str(folder / "curve.png"))
    table.add_row("all numbers", str(folder / "result.json"))
    Console(width=100).print(table)


def compare(flags: Flags, dataset: st.data.Dataset, losses: list[float], steps: int = 20) -> None:
    """Repeats the first steps on one device and shows both losses side by side."""
    one = st.make_mesh("data=1", devices=jax.devices()[:1])
    trainer = make_trainer(flags, dataset, one)
    rows = trainer.fit(batches(flags, dataset, trainer), steps=min(steps, flags.steps))
    table = Table(title=f"the same run on one device, first {len(rows)} steps")
    for column in ("step", flags.mesh, "one device", "relative difference"):
        table.add_column(column, justify="right")
    gaps = [abs(a - row["loss"]) / abs(row["loss"]) for a, row in zip(losses, rows, strict=False)]
    for k in sorted({0, 1, 4, 9, 14, len(rows) - 1} & set(range(len(rows)))):
        table.add_row(str(k + 1), f"{losses[k]:.6f}", f"{rows[k]['loss']:.6f}", f"{gaps[k]:.1e}")
    table.add_section()
    table.add_row("largest", "", "", f"{max(gaps):.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    cli.main(train, Flags, __doc__)
