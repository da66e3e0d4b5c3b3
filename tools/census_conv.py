"""Counts the bytes of partitioned convolutions, forward and backward: our operator and XLA's partitioner.

    python tools/census_conv.py --markdown

Both sides start and end with the same arrays in the same places: x, kernel and the output's cotangent in;
output and both gradients out. Dimensions that do not divide are padded to whole blocks at rest. Bytes are
those of `shardtrain.census` for float32, what one device sends. Whether a result is right is measured by
running the same cut with fewer channels in float64 on 8 simulated devices, against one device.
"""

import argparse
import collections
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

import shardtrain as st
from shardtrain.layout import Layout
from shardtrain.mesh import SPATIAL, size
from shardtrain.ops.channels import channel_plan
from shardtrain.plan.census import KINDS, Collective

DOCUMENT = Path(__file__).parents[1] / "docs" / "measurements.md"
MARKER = "census_conv"

CUTS = (
    "data=8",
    "height=8",
    "height=4,width=2",
    "data=2,height=4",
    "channel=8",
    "data=4,channel=2",
    "height=4,channel=2",
    "data=2,height=2,channel=2",
)

SHORT = dict(zip(KINDS, ("ar", "ag", "rs", "cp", "aa"), strict=True))

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution of the table, on square images."""

    name: str
    extent: int
    channels: tuple[int, int]
    window: int
    stride: int = 1
    padding: str = "SAME"

    def small(self) -> "Conv":
        """The same windows with fewer channels, quick to run in float64; 8 still divides them."""
        low = min(self.channels[0], 8)
        return dataclasses.replace(self, channels=(low, 8 if self.channels[1] <= self.channels[0] else 16))


CONVS = (
    Conv("3x3", 32, (64, 64), 3),
    Conv("3x3 s2", 32, (64, 128), 3, 2),
    Conv("7x7 s2", 64, (3, 64), 7, 2),
    Conv("11x11 s4 VALID", 67, (3, 96), 11, 4, "VALID"),
    Conv("5x5", 32, (64, 64), 5),
    Conv("1x1 s2", 32, (64, 128), 1, 2),
    Conv("3x3, 30 rows", 30, (64, 64), 3),
    Conv("3x3 VALID, 62 out", 64, (64, 64), 3, 1, "VALID"),
)


@dataclasses.dataclass(frozen=True)
class ConvRow:
    """One convolution on one mesh, both sides.

    Attributes:
        cut, conv: what was measured.
        kernel: which of the kernel's channels are cut, "out" or "in"; "" for none.
        ours, xla: bytes that one device sends, by kind of collective.
        xla_scatters: XLA's bytes if it sent the sums that it cuts at once as reduce-scatters.
        ours_result, xla_result: "right", or "WRONG" and the arrays that are.
        gathers: XLA gathers an image along a spatial axis.
        work: flops of a device in XLA's program over those in ours.
        same_kinds: the program whose result was checked moves by the same kinds of collective.
    """

    cut: str
    conv: str
    kernel: str
    ours: Mapping[str, int]
    xla: Mapping[str, int]
    xla_scatters: int
    ours_result: str
    xla_result: str
    gathers: bool
    work: float
    same_kinds: bool

    @property
    def totals(self) -> tuple[int, int]:
        return sum(self.ours.values()), sum(self.xla.values())

    @property
    def right(self) -> bool:
        return self.xla_result == "right"

    @property
    def title(self) -> str:
        return f"{self.conv} on {self.cut}" + (f", kernel cut {self.kernel}" if self.kernel else "")


Side = Callable[[Array, Array], Array]


def plain(conv: Conv) -> Side:
    """The convolution as jax has it."""
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (conv.stride, conv.stride)
    return lambda x, k: lax.conv_general_dilated(x, k, strides, conv.padding, dimension_numbers=numbers)


def ours(conv: Conv, kernel: str) -> Side:
    """The convolution as shardtrain has it, for a kernel that is cut on its output or input channels."""
    mode: Any = {"out": "gather", "in": "scatter", "": None}[kernel]
    return lambda x, k: st.ops.conv(x, k, strides=conv.stride, padding=conv.padding, channel_mode=mode)


def arrays(conv: Conv) -> list[tuple[int, ...]]:
    """Shapes of x, kernel and output."""
    x = (BATCH, conv.extent, conv.extent, conv.channels[0])
    kernel = (conv.window, conv.window, *conv.channels)
    return [
        x,
        kernel,
        jax.eval_shape(plain(conv), *(jax.ShapeDtypeStruct(s, "f4") for s in (x, kernel))).shape,
    ]


def layouts(conv: Conv, kernel: str, mesh: Mesh) -> list[P]:
    """How x, kernel and output lie on the mesh."""
    x, k, y = arrays(conv)
    layout = Layout()
    where = layout.parameter(k, {"out": -1, "in": -2, "": None}[kernel], mesh)
    return [layout.activation(x, mesh), where, layout.activation(y, mesh)]


def blocks(shape: Sequence[int], spec: P, mesh: Mesh) -> tuple[int, ...]:
    """The shape in whole blocks: jax takes no uneven arrays from outside a jit."""
    cuts = [size(mesh, axes or ()) for axes in (*spec, *[None] * (len(shape) - len(spec)))]
    return tuple(-(-n // shards) * shards for n, shards in zip(shape, cuts, strict=True))


def program(side: Side, conv: Conv, specs: Sequence[P], mesh: Mesh, dtype: str) -> jax.stages.Compiled:
    """Forward and backward pass of one side, compiled: (x, kernel, dy) to (y, dx, dkernel)."""
    shapes = arrays(conv)
    where = [NamedSharding(mesh, spec) for spec in specs]
    full = [blocks(shape, spec, mesh) for shape, spec in zip(shapes, specs, strict=True)]

    def step(x: Array, kernel: Array, dy: Array) -> tuple[Array, ...]:
        inputs = [
            lax.with_sharding_constraint(lax.slice(a, [0] * a.ndim, shape), s)
            for a, shape, s in zip((x, kernel, dy), shapes, where, strict=True)
        ]
        y, backward = jax.vjp(side, *inputs[:2])
        y = lax.with_sharding_constraint(y, where[2])
        results = [y, *backward(inputs[2])]
        order = [2, 0, 1]
        results = [lax.with_sharding_constraint(r, where[i]) for r, i in zip(results, order, strict=True)]
        return tuple(
            jnp.pad(r, [(0, whole - have) for whole, have in zip(full[i], r.shape, strict=True)])
            for r, i in zip(results, order, strict=True)
        )

    structs = [jax.ShapeDtypeStruct(s, dtype, sharding=w) for s, w in zip(full, where, strict=True)]
    with jax.set_mesh(mesh):
        return jax.jit(step, out_shardings=(where[2], where[0], where[1])).lower(*structs).compile()


def kinds(collectives: Sequence[Collective]) -> dict[str, int]:
    """Bytes by kind of collective."""
    total: collections.Counter[str] = collections.Counter()
    for c in collectives:
        total[c.kind] += c.bytes
    return dict(total)


def image(c: Collective, conv: Conv) -> bool:
    """Whether what moves is an image and not a kernel."""
    extents = [int(n) for n in re.findall(r"\d+", c.shape.partition("[")[2])]
    return len(extents) == 4 and tuple(extents[:2]) != (conv.window, conv.window)


def gathers_image(collectives: Sequence[Collective], conv: Conv) -> bool:
    """Whether a device is sent all of an image along a cut dimension."""
    return any(
        c.kind in ("all-gather", "all-to-all") and image(c, conv) and set(c.axes or ()) & set(SPATIAL)
        for c in collectives
    )


def as_scatters(collectives: Sequence[Collective], conv: Conv, mesh: Mesh) -> int:
    """All bytes, with sums of images of cut channels counted as reduce-scatters.

    XLA on CPUs leaves an all-reduce whose result is cut at once as it is; on GPUs and TPUs it makes a
    reduce-scatter of it.
    """
    total = 0
    for c in collectives:
        channels = int(re.findall(r"\d+", c.shape.partition("[")[2])[-1])
        cut = c.axes == ("channel",) and channels % size(mesh, "channel") == 0
        total += c.bytes // 2 if c.kind == "all-reduce" and cut and image(c, conv) else c.bytes
    return total


def result(compiled: jax.stages.Compiled, conv: Conv, specs: Sequence[P], mesh: Mesh) -> str:
    """Runs the program against one device: "right", or which arrays are wrong and by what factor."""
    shapes = arrays(conv)
    random = np.random.default_rng(0)
    inputs = [random.standard_normal(shape) for shape in shapes]
    y, backward = jax.vjp(plain(conv), *map(jnp.asarray, inputs[:2]))
    wanted = [y, *backward(jnp.asarray(inputs[2]))]
    placed = []
    for value, spec in zip(inputs, specs, strict=True):
        whole = blocks(value.shape, spec, mesh)
        padded = np.pad(value, [(0, w - n) for w, n in zip(whole, value.shape, strict=True)])
        placed.append(jax.device_put(padded, NamedSharding(mesh, spec)))
    wrong = []
    for name, got, want in zip(("y", "dx", "dk"), compiled(*placed), map(np.asarray, wanted), strict=True):
        real = np.asarray(got)[tuple(slice(n) for n in want.shape)]
        factor = float(np.vdot(real, want) / np.vdot(want, want))
        scale = np.abs(want).max()
        if np.abs(real - want).max() < 1e-10 * scale:
            continue
        scaled = np.abs(real - factor * want).max() < 1e-10 * scale
        wrong.append(f"{name} x{factor:.3g}" if scaled else f"{name} (not by a factor)")
    return f"WRONG {', '.join(wrong)}" if wrong else "right"


def measure(conv: Conv, kernel: str, cut: str, mesh: Mesh) -> ConvRow:
    """Both sides of one row."""
    full, small = {}, {}
    for name, at in (("full", conv), ("small", conv.small())):
        specs = layouts(at, kernel, mesh)
        dtype = "float32" if name == "full" else "float64"
        for side, function in (("ours", ours(at, kernel)), ("xla", plain(at))):
            compiled = program(function, at, specs, mesh, dtype)
            sends = st.census.census(compiled, mesh)
            if name == "full":
                full[side] = sends, (compiled.cost_analysis() or {}).get("flops", float("nan"))
            else:
                small[side] = sends, result(compiled, at, specs, mesh)
    (mine, my_work), (theirs, their_work) = full["ours"], full["xla"]
    return ConvRow(
        cut,
        conv.name,
        kernel,
        kinds(mine),
        kinds(theirs),
        as_scatters(theirs, conv, mesh),
        small["ours"][1],
        small["xla"][1],
        gathers_image(theirs, conv),
        their_work / my_work,
        kinds(theirs).keys() == kinds(small["xla"][0]).keys(),
    )


def cases(convs: Sequence[Conv], cuts: Sequence[str]) -> list[tuple[Conv, str, str, Mesh]]:
    """All rows: convolution, cut of the kernel, cut of the images, mesh.

    A kernel is cut over output channels; where nn.Conv itself would cut it over input channels, that too.
    """
    found = []
    for cut in cuts:
        mesh = st.make_mesh(cut)
        for conv in convs:
            if size(mesh, "channel") == 1:
                found.append((conv, "", cut, mesh))
                continue
            found.append((conv, "out", cut, mesh))
            pixels = conv.stride**2 if conv.window > 1 else 1
            if channel_plan(Layout(), mesh, conv.channels, (pixels, 1)).mode == "scatter":
                found.append((conv, "in", cut, mesh))
    return found


def by_kind(sent: Mapping[str, int]) -> str:
    """`"ar:252 cp:128"`, in KiB."""
    return " ".join(f"{SHORT[kind]}:{sent[kind] / 1024:,.0f}" for kind in SHORT if sent.get(kind))


HEADER = ("convolution", "ours", "by kind", "XLA", "by kind", "XLA's result", "gathers", "flops")


def cells(row: ConvRow) -> list[str]:
    """A row as text."""
    mine, theirs = (f"{total / 1024:,.0f}" for total in row.totals)
    gathers = "image" if row.gathers else ""
    name = row.conv + (f", k {row.kernel}" if row.kernel else "")
    return [
        name,
        mine,
        by_kind(row.ours),
        theirs,
        by_kind(row.xla),
        row.xla_result,
        gathers,
        f"x{row.work:.1f}",
    ]


def terminal(rows: Sequence[ConvRow]) -> Table:
    """All rows for a terminal of 100 columns."""
    table = Table(
        title="KiB that one device sends, forward and backward", caption=LEGEND, padding=(0, 0, 0, 1)
    )
    for name in HEADER:
        numbers = name in ("ours", "XLA", "flops")
        table.add_column(
            name, justify="right" if numbers else "left", no_wrap=numbers or name == "convolution"
        )
    for cut in dict.fromkeys(row.cut for row in rows):
        table.add_section()
        table.add_row(f"[bold]{cut}")
        for row in rows:
            if row.cut == cut:
                style = "red" if not row.right else "yellow" if row.totals[0] > row.totals[1] else None
                table.add_row(*cells(row), style=style)
    return table


LEGEND = (
    "cp collective-permute, ag all-gather, rs reduce-scatter, ar all-reduce, aa all-to-all; k: which of the "
    "kernel's channels are cut; gathers: XLA gathers an image along a spatial axis; flops: of XLA's device "
    "over ours"
)


def verdict(rows: Sequence[ConvRow]) -> list[str]:
    """What the table says, in sentences."""
    right = [row for row in rows if row.right]
    lost = [row for row in right if row.totals[0] > row.totals[1]]
    lost_too = [row for row in right if row.totals[1] >= row.totals[0] > row.xla_scatters]
    bad = [row.title for row in rows if row.ours_result != "right"]
    unlike = [row.title for row in rows if not row.same_kinds]

    def listed(some: Sequence[ConvRow], theirs: Callable[[ConvRow], int]) -> str:
        return "; ".join(
            f"{r.title} ({r.totals[0] / 1024:,.0f} to {theirs(r) / 1024:,.0f} KiB)" for r in some
        )

    lines = [
        f"XLA is right in {len(right)} of {len(rows)} rows; in {len(right) - len(lost)} of those ours sends "
        f"at most as many bytes. Ours is right in {len(rows) - len(bad)} of {len(rows)}."
    ]
    if bad:
        lines.append(f"Ours is WRONG: {'; '.join(bad)}.")
    if lost:
        lines.append(f"Ours sends more: {listed(lost, lambda r: r.totals[1])}.")
    if lost_too:
        lines.append(
            "XLA on CPUs leaves a sum that it cuts at once as an all-reduce, of twice the bytes. With "
            "reduce-scatters in their place, as XLA makes on GPUs and TPUs, ours sends more in "
            f"{len(lost_too)} more: {listed(lost_too, lambda r: r.xla_scatters)}."
        )
    if unlike:
        lines.append(f"XLA's program that was run has other kinds of collective in: {'; '.join(unlike)}.")
    return lines


def markdown(rows: Sequence[ConvRow]) -> str:
    """The table, its caption and the verdict for the document."""
    lines = [
        f"KiB that one device sends, forward and backward, batch {BATCH}, float32; jax {jax.__version__}, "
        f"8 simulated CPU devices; {LEGEND}.",
        "",
        "| cut | " + " | ".join(HEADER) + " |",
        "|---|---|--:|---|--:|---|---|---|--:|",
    ]
    lines += ["| " + " | ".join([row.cut, *cells(row)]) + " |" for row in rows]
    return "\n".join([*lines, "", *verdict(rows)])


def write_between(marker: str, text: str, document: Path = DOCUMENT) -> None:
    """Puts `text` between the document's `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(
            f"error: docs/{document.name} has no {begin} ... {end}; put the two lines where the table goes"
        )
    document.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conv", action="append", metavar="NAME", help="only convolutions of this name")
    parser.add_argument("--cut", action="append", metavar="MESH", help="only these cuts, of 8 devices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    convs = [conv for conv in CONVS if conv.name in (args.conv or [conv.name])]
    if not convs:
        parser.error(f"--conv {args.conv}: there are {', '.join(repr(conv.name) for conv in CONVS)}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    todo = cases(convs, args.cut or CUTS)
    rows = [measure(*case) for case in track(todo, "compiling", console=Console(stderr=True), transient=True)]
    console = Console(width=100)
    console.print(terminal(rows))
    for line in verdict(rows):
        console.print(line, highlight=False)
    if args.json:
        numbers = {"jax": jax.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
    if args.markdown:
        write_between(MARKER, markdown(rows))


if __name__ == "__main__":
    main()
