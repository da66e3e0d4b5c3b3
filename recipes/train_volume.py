"""Train a 3-D U-Net to label every voxel of a brain, sharded over depth and height.

    pip install 'shardtrain[volumes]'
    python recipes/train_volume.py --out runs/volume

(8 simulated devices, about 2 minutes on 2 cores, a Dice coefficient of about 0.83.) Input is the T1 image of
the MNI152 template, 3 mm a voxel; the labels are other, grey matter and white matter. Each example is a box
cut out at a random place, and each device holds its block of the box and the halo that a convolution needs.
With --memory the run also reports the memory that the compiler reserves on each of 1, 2, 4, ... devices for a
step on the same box at 1 mm.

There is one brain, the mean of 152, and its left half is the mirror image of the right one: a test on the
other half would be a test on the training data. Therefore the network is trained on the back 60 % and
tested on the front 40 %, other voxels of the same brain. The Dice coefficient says how well it finds tissue
that it has not seen, and not how well it would do on the scan of another person.

Writes to --out: result.json, metrics.jsonl, curve.png, predictions.png, checkpoints/, tensorboard/, and with
--memory memory.png.
"""

from shardtrain import cli  # first, so that Ctrl-C is one line from here on

# isort: split

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from rich.table import Table

import shardtrain as st
from shardtrain.mesh import parse

MEMORY_MESHES = ("data=1", "depth=2", "depth=2,height=2", "depth=4,height=2")
COLORS = ("black", "tab:orange", "white")


@dataclass(frozen=True, kw_only=True)
class Flags(cli.RunFlags):
    """The network, the boxes to train on, and where to write the run."""

    mesh: str = "depth=4,height=2"
    """Axes and sizes: data cuts the batch, depth, height and width the voxels, channel the features.
    One size may be -1 and takes the devices that are left."""
    data: str = "mni152"
    """mni152 (in nilearn)."""
    out: cli.Folder = Path("runs/volume")
    steps: int = 100
    batch_size: int = 1
    optimizer: str = "adam"
    lr: float = 0.03
    voxel: int = 3
    """Edge of a voxel in mm."""
    size: tuple[int, int, int] | None = None
    """Depth, height and width of an example in voxels, on any mesh; by default those of the test part."""
    features: tuple[int, ...] = (8, 16)
    """Channels of each level, from the full volume down."""
    memory: bool = False
    """Compile the step for 1, 2, 4, ... devices and show what each device needs (a minute on 2 cores)."""

    free = frozenset({"memory"})


def make_task(flags: Flags) -> cli.Task:
    """The network, and the volumes that --data names."""
    volumes = st.volumes.load(flags.data, voxel=flags.voxel)
    size = flags.size or volumes.test.labels.shape[1:]
    train = partial(st.volumes.train_batches, volumes.train, flags.batch_size, size=size, seed=flags.seed)
    train()  # a size that does not fit is refused before the network is made

    def make() -> nnx.Module:
        channels = volumes.train.images.shape[-1]
        return st.models.UNet(
            len(volumes.classes), channels, rank=3, features=flags.features, **cli.kinds(flags)
        )

    def report(trainer: st.Trainer, out: Path) -> cli.Report:
        images, labels = next(st.volumes.eval_batches(volumes.test, 1))
        found = trainer.predict(images).argmax(-1)
        draw(images[0, ..., 0], labels[0], found[0], volumes.classes, out / "predictions.png")
        rows = {"predictions": str(flags.out / "predictions.png")}
        if not flags.memory:
            return cli.Report(rows=rows)
        extents = [n * flags.voxel for n in size]
        needs = memory(flags, task, [flags.batch_size, *extents, images.shape[-1]])
        plot_memory(needs, out / "memory.png")
        rows["memory"] = str(flags.out / "memory.png")
        return cli.Report({"memory": needs}, rows, [memory_table(needs, extents)])

    task = cli.Task(
        name="UNet",
        make=make,
        train=train,
        test=lambda rows: st.volumes.eval_batches(volumes.test, flags.batch_size, rows=rows),
        loss=st.losses.pixel_cross_entropy,
        metrics={"dice": st.losses.dice},
        score="dice",
        report=report,
    )
    return task


def memory(flags: Flags, task: cli.Task, shape: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the bytes that each device needs for a training step, from the compiler, without running it.

    Args:
        flags, task: flags and task of the run.
        shape: shape of the images of a batch; at least one example must fit into the memory of the host.

    Returns:
        For each of `MEMORY_MESHES` that there are devices for: `mesh`, `devices`, and the bytes of one
        device: `arguments` (state and batch), `temporaries`, `outputs` (those that do not reuse the memory of
        arguments), and `bytes`, the three together.
    """
    batch = np.zeros(shape, np.float32), np.zeros(shape[:-1], np.int32)
    needs = []
    for name in MEMORY_MESHES:
        devices = math.prod(parse(name).values())
        if devices > jax.device_count():
            break
        trainer = cli.make_trainer(flags, task, st.make_mesh(name, devices=jax.devices()[:devices]))
        found = trainer.prepare(*batch).memory_analysis()
        parts = {
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        }
        needs.append({"mesh": name, "devices": devices, **parts, "bytes": sum(parts.values())})
    return needs


def memory_table(needs: Sequence[Mapping[str, Any]], extents: Sequence[int]) -> Table:
    """Returns the memory as a table for the terminal."""
    by = "x".join(map(str, extents))
    table = Table(title=f"MiB on each device for a training step on {by} voxels, from the compiler")
    for column in ("mesh", "devices", "arguments", "temporaries", "together", "of one device's"):
        table.add_column(column, justify="left" if column == "mesh" else "right")
    for row in needs:
        sizes = [f"{row[key] / 2**20:,.1f}" for key in ("arguments", "temporaries", "bytes")]
        part = f"{100 * row['bytes'] / needs[0]['bytes']:.0f} %"
        table.add_row(row["mesh"], str(row["devices"]), *sizes, part)
    return table


def plot_memory(needs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws memory over devices, and the line that it would follow without halos and replicated arrays."""
    devices, sizes = ([row[key] for row in needs] for key in ("devices", "bytes"))
    with cli.picture(path, 1, 1, (5, 3.6)) as (figure, axes):
        axis = axes[0, 0]
        mib = np.array(sizes) / 2**20
        axis.loglog(devices, mib, "o-", color="tab:blue", label="compiled step")
        axis.loglog(devices, mib[0] / np.array(devices), "--", color="gray", label="one device's, divided")
        for n, size, row in zip(devices, mib, needs, strict=True):
            axis.annotate(row["mesh"], (n, size), (6, 6), textcoords="offset points", fontsize=8)
        axis.set_xticks(devices, map(str, devices))
        axis.set_yticks(mib, [f"{size:,.0f}" for size in mib])
        axis.minorticks_off()
        axis.set(xlabel="devices", ylabel="MiB on each device", xlim=(0.9, 24), ylim=(None, 1.4 * mib[0]))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        figure.suptitle("memory of a training step", fontsize=10)


def draw(
    image: np.ndarray, labels: np.ndarray, found: np.ndarray, classes: Sequence[str], path: Path
) -> None:
    """Draws three slices from the front, head up: the input, truth, prediction, and where these differ."""
    slices = [k * labels.shape[1] // 4 for k in (1, 2, 3)]
    palette = {"cmap": ListedColormap(COLORS), "vmin": -0.5, "vmax": len(COLORS) - 0.5}
    depth, _, width = labels.shape
    with cli.picture(path, len(slices), 4, (9, 0.7 + 6.8 * depth / width)) as (figure, axes):
        for line, k in zip(axes, slices, strict=True):
            line[0].imshow(image[::-1, k], cmap="gray", vmin=0, vmax=1)
            line[1].imshow(labels[::-1, k], interpolation="none", **palette)
            line[2].imshow(found[::-1, k], interpolation="none", **palette)
            line[3].imshow((labels != found)[::-1, k], cmap="Reds", vmin=0, vmax=1.3)
            line[0].set_ylabel(f"row {k} of {labels.shape[1]}")
            for axis in line:
                axis.set(xticks=[], yticks=[])
        for axis, title in zip(axes[0], ("input", "truth", "prediction", "where they differ"), strict=True):
            axis.set_title(title, fontsize=10)
        pairs = zip(COLORS, classes, strict=True)
        keys = [Patch(facecolor=color, edgecolor="gray", label=label) for color, label in pairs]
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)


def train(flags: Flags) -> None:
    """Trains, evaluates, and writes the run's files."""
    cli.at_least_1("features", *flags.features)
    cli.run(flags, make_task)


if __name__ == "__main__":
    cli.main(train, Flags, __doc__)
