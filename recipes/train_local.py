"""Train a locally connected network, whose filters differ at every pixel, sharded over pixels and channels.

    python recipes/train_local.py --compare --out runs/local

(8 simulated devices, about a minute on 2 cores, at least 95 % test accuracy on digits.) The filters
are sharded like their pixels: each device stores those of its own pixels, and no gradient of them is summed
over devices if their rows divide evenly. The closing table counts this in the compiled program.

Writes to --out: result.json, metrics.jsonl, curve.png, predictions.png, checkpoints/ and tensorboard/.
"""

from shardtrain import cli  # first, so that Ctrl-C is one line from here on

# isort: split

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from flax import nnx

import shardtrain as st

SUMS = ("all-reduce", "reduce-scatter")
FIRST, WRONG, COLUMNS = 24, 8, 8  # the picture: first images, wrong ones after them, images in a row


@dataclass(frozen=True, kw_only=True)
class Flags(cli.RunFlags):
    """What to train on, and where to write it."""

    mesh: str = "height=2,width=2,channel=2"
    data: str = "digits"
    out: cli.Folder = Path("runs/local")
    steps: int = 400
    optimizer: str = "adamw"
    lr: float = 5e-3
    weight_decay: float = 0.1
    features: tuple[int, ...] = (16, 16)
    """Channels of each locally connected layer."""


def make_task(flags: Flags) -> cli.Task:
    """The network and the data set that --data names."""
    dataset = st.data.load(flags.data)
    train_set, validation = cli.with_validation(flags, dataset.train)
    image = dataset.train.images.shape[1:]

    def make() -> nnx.Module:
        return st.models.LocalNet(dataset.classes, image, features=flags.features, **cli.kinds(flags))

    def report(trainer: st.Trainer, out: Path) -> cli.Report:
        images, labels = next(st.data.eval_batches(dataset.test, flags.batch_size))
        found = trainer.predict(images).argmax(-1)
        draw(images, labels, found, out / "predictions.png")
        return weights(trainer, flags.out / "predictions.png")

    return cli.Task(
        name="LocalNet",
        make=make,
        train=partial(st.data.train_batches, train_set, flags.batch_size, seed=flags.seed),
        test=lambda rows: st.data.eval_batches(dataset.test, flags.batch_size, rows=rows),
        validation=validation,
        report=report,
    )


def weights(trainer: st.Trainer, picture: Path) -> cli.Report:
    """Reports how much of the pixels' weights each device stores, and the bytes of their gradients' sums."""
    local = [x for name, x in trainer.state.params.items() if name.startswith("layers.")]
    whole = sum(x.nbytes for x in local)
    share = sum(x.addressable_shards[0].data.nbytes for x in local)
    # A scalar is a part of the gradient's norm and not of a gradient. Filters whose rows do not divide evenly
    # are gathered; activations are, too, but their shapes end differently.
    ends = tuple(f"{x.shape[-2]},{x.shape[-1]}]" for x in local)
    crossing = sum(
        c.bytes
        for c in st.census.census(trainer.compiled_text(), trainer.mesh)
        if {"height", "width"} & set(c.axes or ())
        and (
            (c.kind in SUMS and not c.shape.endswith("[]"))
            or (c.kind == "all-gather" and c.shape.endswith(ends))
        )
    )
    return cli.Report(
        result={
            "local_weights": {"bytes": whole, "bytes_per_device": share},
            "gradient_bytes_across_pixels": crossing,
        },
        rows={
            "pixels' weights": f"{share / 1024:,.1f} KiB on each device, {whole / 1024:,.1f} KiB in all "
            f"(1/{whole / share:.3g})",
            "their gradients": f"{crossing:,} bytes summed across height and width in a step",
            "predictions": str(picture),
        },
    )


def draw(images: np.ndarray, labels: np.ndarray, found: np.ndarray, path: Path) -> None:
    """Draws the first images with their predictions, and then the wrong predictions of others, in red."""
    wrong = [k for k in range(len(images)) if labels[k] != found[k]]
    shown = [*range(min(FIRST, len(images))), *[k for k in wrong if k >= FIRST][:WRONG]]
    rows = math.ceil(len(shown) / COLUMNS)
    with cli.picture(path, rows, COLUMNS, (COLUMNS, 1.25 * rows + 0.4)) as (figure, axes):
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, k in zip(axes.flat, shown, strict=False):
            axis.imshow(images[k] if images.shape[-1] == 3 else images[k][..., 0], cmap="gray_r")
            right = labels[k] == found[k]
            title = f"{found[k]}" if right else f"{found[k]}, is {labels[k]}"
            axis.set_title(title, fontsize=9, color="black" if right else "tab:red")
        figure.suptitle(f"predictions for test images, {len(wrong)} of {len(images)} wrong", fontsize=10)


def train(flags: Flags) -> None:
    """Trains, evaluates, and writes the run's files."""
    cli.at_least_1("features", *flags.features)
    cli.run(flags, make_task)


if __name__ == "__main__":
    cli.main(train, Flags, __doc__)
