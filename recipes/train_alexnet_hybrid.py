"""Train AlexNet data parallel in its convolutions and model parallel in its linear layers, in one program.

    python recipes/train_alexnet_hybrid.py --scheme spread --compare --out runs/hybrid

(8 simulated devices, about a minute on 2 cores, at least 98 % test accuracy on digits, enlarged to 64x64.)
The convolutions do most of the work and have few weights, the linear layers have most of the weights: each
device has its own examples in the convolutions, and its own features in the linear layers, where all devices
need all examples. --scheme chooses how these are sent: all at once (gather), those of one device after the
other (turns), or a part of each device's in each of as many rounds (spread). The numbers are the same.

With --bytes the run also compiles the step for every scheme, for pure data parallelism and for pure model
parallelism, and reports the bytes that each device sends, stores and needs: for this network, and for the
AlexNet of 61 million parameters on 1024 images of 224x224 (a minute on 2 cores).

Writes to --out: result.json, metrics.jsonl, curve.png, checkpoints/ and tensorboard/.
"""

from shardtrain import cli  # first, so that Ctrl-C is one line from here on

# isort: split

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.table import Table

import shardtrain as st
from shardtrain.errors import UserError
from shardtrain.mesh import parse, size
from shardtrain.nn.rounds import Scheme

LEAST = 63  # pixels that AlexNet needs in height and width
EXAMPLES = {"batch": ("data", "channel"), "channels": ()}
HYBRID = dict.fromkeys(("", "convs.*", "pools.*", "shrink", "flatten", "rounds"), EXAMPLES)
"""Before the linear layers every device has its own examples; after them the default shards the features."""


@dataclass(frozen=True, kw_only=True)
class Flags(cli.RunFlags):
    """What to train on, how examples travel, and where to write it."""

    mesh: str = "channel=8"
    """Axes and sizes: channel cuts the linear layers, data and channel together the batch of the others.
    One size may be -1 and takes the devices that are left."""
    data: str = "digits"
    out: cli.Folder = Path("runs/hybrid")
    steps: int = 300
    optimizer: str = "adam"
    lr: float = 2e-3
    scheme: Scheme = "gather"
    """How the examples get to the linear layers: all at once, device after device, or spread over rounds."""
    recompute: bool = False
    """Hold the linear layers' activations of one round only, and compute and send them twice."""
    width: int = 16
    """Features of the first convolution; 64 in the paper's network."""
    hidden: int = 256
    """Features of the linear layers; 4096 in the paper's network."""
    bytes: bool = False
    """Compile all schemes and show what each sends, holds and needs."""

    free = frozenset({"scheme", "recompute", "bytes"})


@dataclass(frozen=True)
class Variant:
    """One way to partition the network.

    Attributes:
        name: name of the row in the table.
        data: number of devices on the data axis.
        channel: number of devices on the channel axis.
        scheme, recompute: as the flags, for hybrids; None if all layers are partitioned the same way.
    """

    name: str
    data: int
    channel: int
    scheme: Scheme | None = None
    recompute: bool = False

    @property
    def layout(self) -> dict[str, Any]:
        """The layers that are partitioned differently from the default."""
        return HYBRID if self.scheme else {}

    def mesh(self) -> Mesh:
        """The mesh, over the first devices."""
        return st.make_mesh(data=self.data, channel=self.channel)


@dataclass(frozen=True)
class Network:
    """The sizes that determine the bytes.

    Attributes:
        image, classes, width, hidden: sizes of the network.
        batch, microbatches: examples of a step, and the number of parts that they are divided into.
        dtype: dtype of the parameters.
        sent_as: dtype in which arrays are sent.
    """

    image: tuple[int, int, int]
    classes: int
    batch: int
    width: int = 64
    hidden: int = 4096
    microbatches: int = 1
    dtype: Any = jnp.float32
    sent_as: Any = jnp.float32

    def make(self, rngs: nnx.Rngs, rounds: Callable[[], st.nn.Rounds]) -> st.models.AlexNet:
        """The network."""
        return st.models.AlexNet(
            self.classes,
            self.image[-1],
            width=self.width,
            hidden=self.hidden,
            rounds=rounds,
            param_dtype=self.dtype,
            rngs=rngs,
        )

    def features(self) -> list[int]:
        """Features of the input and of every convolution."""
        return [self.image[-1], *(self.width * n for n in (1, 3, 6, 4, 4))]

    def pixels(self) -> list[int]:
        """Pixels of the output of every convolution."""
        first = [(n + 4 - 11) // 4 + 1 for n in self.image[:2]]
        second = [(n - 3) // 2 + 1 for n in first]
        others = [(n - 3) // 2 + 1 for n in second]
        return [math.prod(first), math.prod(second), *[math.prod(others)] * 3]

    def linear(self) -> list[int]:
        """Features of the input and every linear layer."""
        return [36 * self.features()[-1], self.hidden, self.hidden, self.classes]


def closed_form(net: Network, plan: Variant) -> dict[str, int]:
    """Returns the bytes that each device sends in a step, by purpose, without labels and a few scalars.

    With D devices on data, K on channel, P = D*K: weights that n devices share send 2(n-1)/n of their bytes
    in every microbatch, and an exchange among K devices (K-1)/K of what all of them end up with, in each
    pass. All features divide by K, classes may not.
    """
    item = jnp.dtype(net.sent_as).itemsize
    data, channel = plan.data, plan.channel
    devices, rows = data * channel, net.batch // data
    hybrid = plan.scheme is not None
    rounds = channel if plan.scheme in ("turns", "spread") else 1
    passes = 3 if plan.recompute and rounds > 1 else 2
    features, linear = net.features(), net.linear()

    def shared(numbers: int, n: int, times: int = 1) -> int:
        return st.census.ring("all-reduce", n, numbers * item * times * net.microbatches)

    def exchanged(numbers: int) -> int:
        return numbers * item * (channel - 1) // channel

    own = 1 if hybrid else channel
    windows = 121, 25, 9, 9, 9
    sent = dict.fromkeys(("weights of convolutions", "their channels", "examples", "linear layers"), 0)
    sent["weights of linear layers"] = 0
    for window, (a, b) in zip(windows, pairwise(features), strict=True):
        cut = own if b % own == 0 else 1
        sent["weights of convolutions"] += sum(shared(n // cut, devices // own) for n in (window * a * b, b))
    if not hybrid:
        inner = zip(pairwise(features[1:]), net.pixels()[1:], strict=True)
        sent["their channels"] = sum(2 * exchanged(rows * min(pair) * pixels) for pair, pixels in inner)
    # From pixels to features: a device's block where these are cut anew, otherwise all of them.
    block = rows * linear[0]
    turned = hybrid or 36 % channel == 0
    turns = channel if plan.scheme == "turns" else 0
    sent["examples"] = passes * (1 + turns) * exchanged(block // channel if turned else block)
    *hidden, last = pairwise(linear)
    sent["linear layers"] = passes * sum(exchanged(rows * min(pair)) for pair in hidden)
    if last[1] % channel:
        sent["linear layers"] += 2 * exchanged(rows * last[1])  # all have all classes: summed, once
    else:
        gathered = last[0] <= last[1]
        sent["linear layers"] += (passes if gathered else 2) * exchanged(rows * min(last))
    for a, b in (*hidden, last):
        biases = b // channel if b % channel == 0 else b
        sent["weights of linear layers"] += sum(shared(n, data, rounds) for n in (a * b // channel, biases))
    return sent


def measured(net: Network, plan: Variant) -> dict[str, Any]:
    """Returns the bytes that the compiled step sends, stores and needs on each device, without running it."""
    rounds = partial(st.nn.Rounds, plan.scheme or "gather", remat=plan.recompute)
    model = nnx.eval_shape(lambda: net.make(nnx.Rngs(0), rounds))
    mesh = plan.mesh()
    batch = jax.ShapeDtypeStruct((net.batch, *net.image), net.dtype)
    program = st.plan.compiled_step(model, mesh, batch, layout=plan.layout)
    memory: Any = program.memory_analysis()
    sent = st.census.census(program, mesh)
    lines = st.plan.lines(model, mesh, layout=plan.layout)
    formula = closed_form(net, plan)
    return {
        "plan": plan.name,
        "mesh": {name: n for name, n in mesh.shape.items() if n > 1},
        "bytes": sum(row.bytes for row in sent),
        "closed_form": sum(formula.values()),
        "by_purpose": formula,
        "by_kind": {
            kind: n for kind in st.census.KINDS if (n := sum(r.bytes for r in sent if r.kind == kind))
        },
        "parameters": sum(line.parameters for line in lines),
        "temporaries": memory.temp_size_in_bytes,
    }


def plans(data: int, channel: int) -> list[Variant]:
    """Returns the hybrids on a mesh, and the other ways on as many devices that they are compared with."""
    hybrids = [Variant(f"hybrid {s}", data, channel, s) for s in ("gather", "turns", "spread")]
    again = [Variant(f"{s}, recompute", data, channel, s, recompute=True) for s in ("turns", "spread")]
    devices = data * channel
    return [*hybrids, *again, Variant("pure data", devices, 1), Variant("pure model", 1, devices)]


def comparison(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Returns the plans as a table for the terminal."""
    table = Table(title=f"{title}: MiB on each device, and sent by it in a step")
    kinds = [kind for kind in st.census.KINDS if any(kind in row["by_kind"] for row in rows)]
    for column in ("plan", "sent", "formula", *(k.replace("-", "-\n") for k in kinds), "weights", "temp."):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for row in rows:
        numbers = [row["bytes"], row["closed_form"], *(row["by_kind"].get(kind, 0) for kind in kinds)]
        numbers += [row["parameters"], row["temporaries"]]
        table.add_row(row["plan"], *(mib(n) if n else "" for n in numbers))
    return table


def mib(amount: int) -> str:
    """Returns bytes as MiB with about three digits."""
    return f"{amount / 2**20:,.{0 if amount >= 100 * 2**20 else 2}f}"


def sent_as(flags: Flags) -> Any:
    """Returns the dtype that arrays are sent in: the compute dtype, but float32 for bfloat16 on CPUs."""
    if flags.x64:
        return jnp.float64
    return jnp.float32 if flags.dtype == "bfloat16" and jax.default_backend() == "cpu" else flags.dtype


def make_task(flags: Flags) -> cli.Task:
    """The network, and the data set that --data names, enlarged until the network can take it."""
    dataset = st.data.load(flags.data)
    times = -(-LEAST // min(dataset.train.images.shape[1:3]))
    height, width, channels = dataset.train.images.shape[1:]
    net = Network(
        (height * times, width * times, channels),
        dataset.classes,
        flags.batch_size,
        flags.width,
        flags.hidden,
        flags.accumulate,
        cli.kinds(flags)["param_dtype"],
        sent_as(flags),
    )
    rounds = partial(st.nn.Rounds, flags.scheme, remat=flags.recompute)
    if flags.hidden % (channel := size(st.make_mesh(flags.mesh), "channel")) or net.linear()[0] % channel:
        raise UserError(
            f"--mesh {flags.mesh}: {net.linear()[0]} and {flags.hidden} features do not divide by "
            f"channel={channel}; use another size, or another --width and --hidden"
        )

    def enlarged(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        for images, labels in batches:
            yield np.repeat(np.repeat(images, times, axis=1), times, axis=2), labels

    def train(*, start: int, rows: range) -> Iterator[tuple[Any, Any]]:
        feed = st.data.train_batches(dataset.train, flags.batch_size, seed=flags.seed, start=start, rows=rows)
        return enlarged(feed)

    def report(trainer: st.Trainer, out: Path) -> cli.Report:
        data, channel = (size(trainer.mesh, axis) for axis in ("data", "channel"))
        mine = Variant(f"hybrid {flags.scheme}", data, channel, flags.scheme, flags.recompute)
        sent = sum(closed_form(net, mine).values())
        pure = sum(closed_form(net, Variant("pure data", data * channel, 1)).values())
        share = sent / pure if pure else 1.0  # one device sends nothing
        says = f"sends {100 * share:.0f} % of pure data parallel: {mib(sent)} of {mib(pure)} MiB a step"
        result: dict[str, Any] = {"closed_form": closed_form(net, mine), "share_of_pure_data": share}
        tables = []
        if flags.bytes:
            full = Network((224, 224, 3), 1000, 1024 // 8 * data * channel)
            for key, one in {"this_network": net, "full_size": full}.items():
                result[key] = [measured(one, plan) for plan in plans(data, channel)]
                tables.append(comparison(result[key], key.replace("_", " ")))
        return cli.Report({"hybrid": result}, {"hybrid": says}, tables)

    return cli.Task(
        name="AlexNet",
        make=lambda: net.make(cli.kinds(flags)["rngs"], rounds),
        train=train,
        test=lambda rows: enlarged(st.data.eval_batches(dataset.test, flags.batch_size, rows=rows)),
        layout=HYBRID,
        report=report,
    )


def train(flags: Flags) -> None:
    """Trains, evaluates, and writes the run's files."""
    cli.at_least_1("width", flags.width)
    cli.at_least_1("hidden", flags.hidden)
    if others := [axis for axis in parse(flags.mesh) if axis not in ("data", "channel")]:
        raise UserError(f"--mesh {flags.mesh}: {others[0]} is not for this recipe; use data and channel")
    if flags.parameters:
        raise UserError(
            f"--parameters {flags.parameters} would send more than the closed form of this recipe says; "
            f"leave it out, the channel axis cuts the large weights anyway"
        )
    if flags.remat == "nothing":
        raise UserError(
            "--remat nothing would send more than the closed form of this recipe says; use --remat "
            "contractions, or --recompute with --scheme turns or spread"
        )
    if flags.bytes and (flags.accumulate > 1 or flags.dtype != "float32"):
        raise UserError(
            "--bytes compiles steps of whole batches in float32; leave out --accumulate and --dtype, or "
            "leave out --bytes"
        )
    cli.run(flags, make_task)


if __name__ == "__main__":
    cli.main(train, Flags, __doc__)
