"""What the compiler says of every GPU kernel, without a GPU.

    make gpu-compiler
    python tools/gpu_evidence.py --markdown
    python tools/gpu_evidence.py --targets sm_90a --quick --json rows.json

Every kernel is lowered and compiled for the card, its PTX assembled by ptxas and disassembled: registers,
spills, shared memory, tensor core instructions. Bytes are what it moves to and from memory if the cache holds
what is read again, beside the least that operands without padding need; loads count a tile of an operand as
often as it is needed. `model` is the roofline time by the card's data sheet, with a cache of 1.6 times the
memory's rate (an assumption), and no measurement; direct convolution's is that of a perfect one. Budgets
are checked: no spills, shared memory within the card's limit, tensor core instructions in every product.
Training steps of a small convolutional network on meshes of 8 and 16 cards follow, with the collectives of
the compiled program and its peak of memory.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cards

DUMP = Path(tempfile.mkdtemp(prefix="gpu_evidence_"))
LAYER = 32, 56, 56, 256
"""Batch, rows, columns and channels, in and out, of the layer whose kernels are compiled."""

CACHE = 1.6
"""Rate of the second level cache over the memory's: assumed, data sheets do not say."""

TENSOR = re.compile(r"\b(?:HGMMA|HMMA|QGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Case:
    """A kernel to compile.

    Attributes:
        kernel, config: its name and what distinguishes it.
        call, operands: a function and the shapes and types of its arguments.
        bytes, least: that it moves, and that it would without padding.
        flops: of products.
        dtype: of its operands.
        loads: bytes, those counted again that are read again.
    """

    kernel: str
    config: str
    call: Callable[..., Any]
    operands: tuple[Any, ...]
    bytes: int
    least: int
    flops: int
    dtype: str
    loads: int = 0


@dataclass(frozen=True)
class Row:
    """What the compiler says of a kernel; times in microseconds are the model's."""

    kernel: str
    config: str
    target: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    tensor_core_instructions: int
    bytes: int
    least_bytes: int
    flops: int
    model_us: float


def winograd_cases(
    implementation: str, dtype: Any, outputs: int, taps: int, precision: str
) -> Iterator[Case]:
    """Every kernel of one convolution and its gradients."""
    import jax
    import jax.numpy as jnp

    from shardtrain.kernels.matmul import matmul
    from shardtrain.kernels.winograd import stages
    from shardtrain.kernels.winograd.cook_toom import algorithm

    name = jnp.dtype(dtype).name
    found = algorithm(outputs, taps)
    static = stages.Static((found, found), implementation, precision, jnp.dtype(dtype), relu=True)
    batch, rows, columns, channels = LAYER
    shape = batch, rows + taps - 1, columns + taps - 1, channels
    p = stages.plan(static, shape, channels, dtype)
    points, size = found.tile**2, jnp.dtype(dtype).itemsize
    width = p.side * p.depth
    images = p.batch // p.side
    config = f"{implementation} {name} F({outputs},{taps})"

    def of(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def extent(tiles: int, step: int, reach: int) -> int:
        return (tiles - 1) * step + reach

    image = images, *(extent(t, outputs, found.tile) for t in p.tiles), width
    tiles = points, p.strips, p.tiles[1], width
    real = points * batch * math.prod(-(-n // outputs) for n in (rows, columns)) * channels
    strip = {"strips": p.strips, "count": p.count, "tiles": p.tiles, "interpreted": False}
    back = tuple(zip(*found.output, strict=True))
    dense = images, *(t * outputs for t in p.tiles), width
    if precision == "default":
        yield Case(
            "transform of x",
            config,
            lambda x: static.room.transform(x, rows=(found.input,) * 2, steps=(outputs,) * 2, **strip),
            (of(*image),),
            size * (math.prod(image) + math.prod(tiles)),
            size * (math.prod(shape) + real),
            0,
            name,
        )
        yield Case(
            "transform of dy",
            config,
            lambda dy: static.room.transform(dy, rows=(back,) * 2, steps=(outputs,) * 2, **strip),
            (of(*dense),),
            size * (math.prod(dense) + math.prod(tiles)),
            size * (math.prod(LAYER) + real),
            0,
            name,
        )
        yield Case(
            "untransform, bias, relu",
            config,
            lambda m, bias: static.room.untransform(
                m,
                bias,
                rows=(found.output,) * 2,
                tiles=p.tiles,
                batch=images,
                count=p.count,
                relu=True,
                out_type=dtype,
                interpreted=False,
            ),
            (of(*tiles, dtype=jnp.float32), of(width, dtype=jnp.float32)),
            4 * math.prod(tiles) + size * math.prod(dense),
            4 * real + size * math.prod(LAYER),
            0,
            name,
        )
    times = 3 if precision == "tf32x3" else 1
    v, u = (points, p.rows, p.depth), (points, p.depth, p.columns)
    flops = 2 * points * p.rows * p.depth * p.columns * times
    product = {"precision": precision, "implementation": implementation, "out_type": jnp.float32}
    label = config if precision == "default" else f"{config} {precision}"

    def read(bm: int, bn: int) -> int:
        """Bytes of both operands, each as often as a tile of the result needs it."""
        return size * (math.prod(v) * -(-p.columns // bn) + math.prod(u) * -(-p.rows // bm))

    once = size * (math.prod(v) + math.prod(u))
    moved = once + 4 * points * p.rows * p.columns
    least = size * (real + math.prod(u)) + 4 * real
    yield Case(
        "product",
        label,
        lambda v, u: matmul(v, u, **product),
        (of(*v), of(*u)),
        moved,
        least,
        flops,
        name,
        times * read(128, 128),
    )
    yield Case(
        "product for wgrad",
        label,
        lambda v, d: matmul(v, d, transpose_a=True, **product),
        (of(*v), of(*v)),
        2 * size * math.prod(v) + 4 * math.prod(u),
        2 * size * real + 4 * math.prod(u),
        flops,
        name,
        times * 2 * size * math.prod(v) * -(-p.columns // 128),
    )
    if outputs**2 in static.room.FUSED and precision == "default":
        result = outputs**2, p.rows, p.columns
        yield Case(
            "product and untransform",
            config,
            lambda v, u: static.room.multiply_and_untransform(
                v, u, rows=(found.output,) * 2, out_type=dtype, interpreted=False
            ),
            (of(*v), of(*u)),
            once + 3 * size * math.prod(result),  # its result is put in order by a copy
            size * (real + math.prod(u) + math.prod(LAYER)),
            flops,
            name,
            read(*static.room.FUSED[outputs**2]),
        )


def cases(card: cards.Card, quick: bool) -> Iterator[Case]:
    """All kernels for a card, or one of each kind."""
    import jax.numpy as jnp

    def writes(implementation: str, dtype: Any) -> bool:
        if implementation == "triton":
            return not quick or card.capability == 8 or (card.capability == 10 and dtype == jnp.float32)
        return card.capability == 9 or (card.capability == 10 and dtype != jnp.float32)

    few = [(jnp.bfloat16, 2, 3), (jnp.float32, 4, 3)]
    many = [
        (dtype, *tile)
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        for tile in ((2, 3), (4, 3), (6, 3), (4, 5))
    ]
    for implementation in ("mosaic", "triton"):
        for dtype, outputs, taps in few if quick else many:
            if not writes(implementation, dtype):
                continue
            for precision in ("default", "tf32x3") if (dtype, outputs) == (jnp.float32, 4) else ("default",):
                for case in winograd_cases(implementation, dtype, outputs, taps, precision):
                    fused = case.kernel == "product and untransform"
                    if not (fused and implementation == "mosaic" and card.capability == 10):
                        yield case


def compiled(card: cards.Card, case: Case) -> Row:
    """Compiles one kernel and reads what the compiler wrote."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from shardtrain import compat

    shutil.rmtree(DUMP, ignore_errors=True)
    DUMP.mkdir()
    mesh = compat.auto_mesh(cards.devices(card)[:1], ["data"])
    here = NamedSharding(mesh, PartitionSpec())
    operands = [jax.ShapeDtypeStruct(o.shape, o.dtype, sharding=here) for o in case.operands]
    with jax.set_mesh(mesh), quietly():
        jax.jit(case.call).lower(*operands).compile()
    new = set(DUMP.rglob("*"))
    assembled = [a for path in new if path.suffix == ".ptx" for a in assemble(path, card.arch)]
    if not assembled:
        sys.exit(f"error: {case.kernel}, {case.config}, for {card.arch}: no kernel was compiled")
    registers, spilled, tensor = max(assembled, key=lambda a: a[0])
    return Row(
        case.kernel,
        case.config,
        card.arch,
        registers,
        spilled,
        shared_memory(new),
        tensor,
        case.bytes,
        case.least,
        case.flops,
        1e6 * roofline(card, case),
    )


def assemble(ptx: Path, arch: str) -> Iterator[tuple[int, int, int]]:
    """Registers, bytes of spills and tensor core instructions of our kernels in a PTX file."""
    text = ptx.read_text()
    if not re.search(r"\.entry (?:winograd|matmul)", text):
        return
    target = ptx.with_suffix(".cubin")
    run = subprocess.run(
        [cards.binary("ptxas"), "-v", f"-arch={arch}", str(ptx), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f"error: ptxas: {run.stderr.strip()[-500:]}")
    sass = subprocess.run(
        [cards.binary("nvdisasm"), "-c", str(target)], capture_output=True, text=True, check=True
    ).stdout
    report = run.stdout + run.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    yield max(registers), sum(spilled), len(TENSOR.findall(sass))


def shared_memory(dumped: set[Path]) -> int:
    """Bytes that a program asks for when it is launched, from what either back end writes down."""
    found = [0]
    for path in dumped:
        if path.name.endswith("mlir-passes.log"):
            pattern = r"dynamic_shared_memory_size %c(\d+)_i32"
        elif path.name.endswith("thunk_sequence.txt"):
            pattern = r"(?:winograd|matmul)\S* grid.*shared_memory: (\d+) bytes"
        else:
            continue
        found += [int(n) for n in re.findall(pattern, path.read_text(errors="replace"))]
    return max(found)


def roofline(card: cards.Card, case: Case) -> float:
    """Seconds by the rates of the data sheet that `algorithm="auto"` uses."""
    from shardtrain.kernels.conv import costs

    rates = costs.sheet_rates(card.kind, case.dtype, None)
    assert rates is not None
    operations, bandwidth = rates.by_pass["forward"]["winograd"]
    return max(case.flops / operations, case.bytes / bandwidth, case.loads / (CACHE * bandwidth))


def against_direct(rows: list[Row]) -> list[list[str]]:
    """Forward passes by the model, beside direct convolution's: the better of both ways through the kernels.

    Products of three TF32 stand beside direct convolution in float32 proper: there is none in TF32x3.
    """
    found = []
    for target, config in dict.fromkeys((row.target, row.config) for row in rows):
        times = {row.kernel: row.model_us for row in rows if (row.target, row.config) == (target, config)}
        plain = config.removesuffix(" tf32x3")
        for row in rows:  # the transforms do not depend on the precision
            if (row.target, row.config) == (target, plain) and "product" not in row.kernel:
                times.setdefault(row.kernel, row.model_us)
        if "transform of x" not in times:
            continue
        apart = times["product"] + times["untransform, bias, relu"]
        ours = times["transform of x"] + min(apart, times.get("product and untransform", apart))
        taps = int(config.split(",")[1][0])
        direct = direct_us(cards.CARDS[target], config.split()[1], taps, config != plain)
        found.append([target, config, f"{ours:.0f}", f"{direct:.0f}", f"{direct / ours:.2f}"])
    return found


def direct_us(card: cards.Card, dtype: str, taps: int, exact: bool) -> float:
    """Direct convolution of the layer by the model of `algorithm="auto"`."""
    from shardtrain.kernels.conv import costs
    from shardtrain.kernels.conv.task import parse

    shape = "x".join(map(str, LAYER))
    task = parse(f"{shape}->{LAYER[-1]},window={taps},dtype={dtype}")
    rates = costs.sheet_rates(card.kind, dtype, "highest" if exact else None)
    assert rates is not None
    return 1e6 * costs.seconds(task, "direct", rates.by_pass["forward"]["direct"], 0)


def broken(row: Row, card: cards.Card) -> str | None:
    """Which budget a kernel breaks."""
    if row.spill_bytes:
        return f"{row.spill_bytes} bytes of spills"
    if row.smem_bytes > card.shared_per_block:
        return f"{row.smem_bytes} bytes of shared memory, {card.shared_per_block} are there"
    if "product" in row.kernel and not row.tensor_core_instructions:
        return "no tensor core instruction"
    return None


@dataclass(frozen=True)
class Program:
    """A training step compiled for a mesh."""

    target: str
    mesh: str
    hosts: int
    kernels: str
    collectives: dict[str, int]
    peak_bytes: int


def program(card: cards.Card, hosts: int) -> Program:
    """A training step with the kernels inside, cut on batch, height and channels."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import shardtrain as st
    from shardtrain import compat

    sizes = {"data": 2 * hosts, "height": 2, "channel": 2}
    found = np.array(cards.devices(card, hosts=hosts, per_host=8)).reshape(tuple(sizes.values()))
    mesh = compat.auto_mesh(found, list(sizes))

    def loss(kernels: list[Any], x: Any) -> Any:
        for kernel in kernels:
            x = jax.nn.relu(st.ops.conv(x, kernel, algorithm="winograd"))
        return (x.astype(jnp.float32) ** 2).mean()

    def step(kernels: list[Any], x: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(kernels, x)
        return value, jax.tree.map(lambda k, g: k - 0.1 * g, kernels, gradients)

    def of(shape: tuple[int, ...], spec: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    filters = PartitionSpec(None, None, None, "channel")
    kernels = [of((3, 3, 128, 256), filters), of((3, 3, 256, 128), filters)]
    x = of((16 * hosts, 56, 56, 128), PartitionSpec("data", "height", None, "channel"))
    with jax.set_mesh(mesh), quietly():
        run = jax.jit(step, donate_argnums=0).lower(kernels, x).compile()
    text = run.as_text() or ""
    kinds = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}
    targets = set(re.findall(r'custom_call_target="([^"]+)"', text))
    kernels_by = "Mosaic" if any("mosaic" in t for t in targets) else "Triton"
    if not any("mosaic" in t or "triton" in t for t in targets):
        sys.exit(f"error: the training step for {card.arch} has none of our kernels, only {targets}")
    memory: Any = run.memory_analysis()
    peak = memory.peak_memory_in_bytes
    name = ",".join(f"{axis}={n}" for axis, n in sizes.items())
    return Program(card.arch, name, hosts, kernels_by, {k: n for k, n in counts.items() if n}, peak)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps what the compilers print from the terminal."""
    kept = os.dup(1), os.dup(2)
    with open(DUMP / "printed.log", "ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, was in zip((1, 2), kept, strict=True):
                os.dup2(was, fd)
                os.close(was)


BESIDE = ("target", "config", "winograd", "direct", "direct / winograd")
HEADER = ("target", "kernel", "config", "regs", "spill", "shared", "tensor", "MB", "least", "model µs")


def cells(row: Row) -> list[str]:
    """A line of the table."""
    return [
        row.target,
        row.kernel,
        row.config,
        str(row.registers),
        str(row.spill_bytes),
        f"{row.smem_bytes / 1024:.0f}K",
        str(row.tensor_core_instructions),
        f"{row.bytes / 1e6:.0f}",
        f"{row.least_bytes / 1e6:.0f}",
        f"{row.model_us:.0f}",
    ]


def measured(target: str, quick: bool) -> tuple[list[Row], list[Program]]:
    """All of one card, in a process of its own."""
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_MLIR_PASSES": "1"}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP / 'xla'}"
    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(DUMP), "XLA_FLAGS": flags}
    cards.prepare()

    from rich.console import Console
    from rich.progress import track

    card = cards.CARDS[target]
    progress = track(list(cases(card, quick)), target, console=Console(stderr=True), transient=True)
    rows = [compiled(card, case) for case in progress]
    programs = [program(card, hosts) for hosts in ((1,) if quick else (1, 2))]
    shutil.rmtree(DUMP, ignore_errors=True)
    return rows, programs


def main() -> None:
    """Compiles, prints, checks, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=list(cards.CARDS), default=list(cards.CARDS))
    parser.add_argument("--quick", action="store_true", help="two convolutions of each card, one mesh")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here")
    parser.add_argument("--markdown", action="store_true", help="write the tables into docs/gpu_evidence.md")
    args = parser.parse_args()
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: it is a folder, or there is no folder {args.json.parent}")
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100 if not sys.stdout.isatty() else None)
    rows: list[Row] = []
    programs: list[Program] = []
    for (
        target
    ) in args.targets:  # Mosaic keeps what it has compiled, for whatever card, as long as a process lives
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            kernels, steps = pool.submit(measured, target, args.quick).result()
        rows += kernels
        programs += steps
    shutil.rmtree(DUMP, ignore_errors=True)
    complaints = [
        f"{row.target}, {row.kernel}, {row.config}: {reason}"
        for row in rows
        if (reason := broken(row, cards.CARDS[row.target]))
    ]

    table = Table(title="GPU kernels, as compiled", padding=(0, 0, 0, 0))
    for name in HEADER:
        table.add_column(name, justify="left" if name in HEADER[:3] else "right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    beside = Table(title="forward pass by the model, µs")
    for name in BESIDE:
        beside.add_column(name, justify="left" if name in BESIDE[:2] else "right")
    for line in against_direct(rows):
        beside.add_row(*line)
    console.print(beside)
    for found in programs:
        counts = ", ".join(f"{n} {kind}" for kind, n in found.collectives.items())
        console.print(
            f"{found.target}: {found.mesh} on {found.hosts} host(s), {found.kernels}: {counts}; peak "
            f"{found.peak_bytes / 2**20:.0f} MiB a card"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if args.markdown:
        import jax
        from census_conv import DOCUMENT, write_between

        head = ["| " + " | ".join(HEADER) + " |", "|---|---|---|" + "--:|" * (len(HEADER) - 3)]
        lines = ["| " + " | ".join(cells(row)) + " |" for row in rows]
        meshes = ["| target | mesh | hosts | kernels | collectives | peak MiB |", "|---|---|--:|---|---|--:|"]
        for found in programs:
            counts = ", ".join(f"{n} {kind}" for kind, n in found.collectives.items())
            peak = f"{found.peak_bytes / 2**20:.0f}"
            meshes.append(
                f"| {found.target} | {found.mesh} | {found.hosts} | {found.kernels} | {counts} | {peak} |"
            )
        ratios = ["| " + " | ".join(BESIDE) + " |", "|---|---|--:|--:|--:|"]
        ratios += ["| " + " | ".join(line) + " |" for line in against_direct(rows)]
        says = f"Layer {LAYER} to {LAYER[-1]} channels; jax {jax.__version__}."
        write_between(
            "gpu_evidence",
            "\n".join([says, "", *head, *lines, "", *ratios, "", *meshes]),
            DOCUMENT.with_name("gpu_evidence.md"),
        )
    if complaints:
        sys.exit("error: budgets are broken\n" + "\n".join(complaints))


if __name__ == "__main__":
    main()
