"""Train a convolutional network on images, on any mesh, with the numbers of one device.

The command that `make train` runs (8 simulated devices, under 2 minutes on 2 cores, at least 96 % test
accuracy on digits):

    python recipes/train_cnn.py --mesh data=2,height=2,channel=2 --compare --out runs/digits

Writes to --out: result.json, metrics.jsonl, curve.png, checkpoints/ and tensorboard/.
"""

from shardtrain import cli  # first, so that Ctrl-C is one line from here on

# isort: split

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from flax import nnx

import shardtrain as st

MODELS = ("resnet8", "resnet18", "resnet34", "resnet50", "lenet")


@dataclass(frozen=True, kw_only=True)
class Flags(cli.RunFlags):
    """What to train, on what, and where to write it."""

    mesh: str = "data=2,height=2,channel=2"
    data: str = "digits"
    out: cli.Folder = Path("runs/cnn")
    model: str = "resnet8"
    """resnet8 (small images), resnet18, resnet34, resnet50, lenet."""


def make_task(flags: Flags) -> cli.Task:
    """The network that --model names, and the data set that --data names."""
    dataset = st.data.load(flags.data)
    train_set, validation = cli.with_validation(flags, dataset.train)
    image = dataset.train.images.shape[1:]

    def make() -> nnx.Module:
        if flags.model == "lenet":
            return st.models.LeNet(dataset.classes, image, **cli.kinds(flags))
        depth = int(flags.model.removeprefix("resnet"))
        stem: Literal["small", "large"] = "small" if min(image[:2]) < 64 else "large"
        return st.models.ResNet(depth, dataset.classes, image[-1], stem=stem, **cli.kinds(flags))

    return cli.Task(
        name=flags.model,
        make=make,
        train=partial(st.data.train_batches, train_set, flags.batch_size, seed=flags.seed),
        test=lambda rows: st.data.eval_batches(dataset.test, flags.batch_size, rows=rows),
        validation=validation,
    )


def train(flags: Flags) -> None:
    """Trains, evaluates, and writes the run's files."""
    cli.one_of("model", flags.model, MODELS, "no such model")
    cli.run(flags, make_task)


if __name__ == "__main__":
    cli.main(train, Flags, __doc__)
