"""Reports what the compiler makes of every GPU kernel, without a GPU.

    make gpu-compiler
    python tools/gpu_evidence.py --markdown
    python tools/gpu_evidence.py --targets sm_90a --quick --json rows.json

Every kernel is lowered and compiled for the card, its PTX assembled by ptxas and disassembled: registers,
spills, shared memory, tensor core instructions. Bytes are what it moves to and from memory if the cache holds
what is read again, and next to them the least that operands without padding need; loads count a tile of an
operand as often as it is needed. `model` is the roofline time by the card's data sheet, with a cache of 1.6
times the memory's rate (an assumption), and no measurement; direct convolution's is that of a perfect one.
Budgets are checked: no spills, shared memory within the card's limit, tensor core instructions in every
product. Training steps of a small convolutional network on meshes of 8 and 16 cards follow, with the
collectives of the compiled program and its peak of memory.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cards
from gpu_cases import LAYER, Case, cases

CACHE = 1.6
"""Rate of the second level cache over the memory's: assumed, data sheets do not say."""

TENSOR = re.compile(r"\b(?:HGMMA|HMMA|QGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class KernelEvidence:
    """What the compiler made of one kernel; times are in microseconds, by the model."""

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


def compiled(card: cards.TargetCard, case: Case, dump: Path) -> KernelEvidence:
    """Compiles one kernel and reads what the compiler wrote."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from shardtrain import compat

    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir()
    mesh = compat.auto_mesh(cards.devices(card)[:1], ["data"])
    here = NamedSharding(mesh, PartitionSpec())
    operands = [jax.ShapeDtypeStruct(o.shape, o.dtype, sharding=here) for o in case.operands]
    with jax.set_mesh(mesh), quietly(dump):
        jax.jit(case.call).lower(*operands).compile()
    assembled = [a for path in dump.rglob("*.ptx") for a in assemble(path, card.arch)]
    if not assembled:
        sys.exit(f"error: {case.kernel}, {case.config}, for {card.arch}: no kernel was compiled")
    registers, spilled, tensor = max(assembled, key=lambda a: a[0])
    return KernelEvidence(
        case.kernel,
        case.config,
        card.arch,
        registers,
        spilled,
        shared_memory(dump),
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


def shared_memory(dump: Path) -> int:
    """Bytes that a program asks for when it is launched, from what either back end writes down."""
    patterns = {
        "*mlir-passes.log": r"dynamic_shared_memory_size %c(\d+)_i32",
        "*thunk_sequence.txt": r"(?:winograd|matmul)\S* grid.*shared_memory: (\d+) bytes",
    }
    texts = [
        (p, path.read_text(errors="replace")) for glob, p in patterns.items() for path in dump.rglob(glob)
    ]
    return max((int(n) for pattern, text in texts for n in re.findall(pattern, text)), default=0)


def roofline(card: cards.TargetCard, case: Case) -> float:
    """Seconds by the rates of the data sheet that `algorithm="auto"` uses."""
    from shardtrain.kernels.conv import costs

    rates = costs.sheet_rates(card.kind, case.dtype, None)
    assert rates is not None
    operations, bandwidth = rates.by_pass["forward"]["winograd"]
    return max(case.flops / operations, case.bytes / bandwidth, case.loads / (CACHE * bandwidth))


def against_direct(rows: Sequence[KernelEvidence]) -> list[list[str]]:
    """Returns forward passes by the model, and direct convolution's: the better of both ways through the
    kernels.

    Products of three TF32 are compared with direct convolution in float32: there is none in TF32x3.
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


def direct_us(card: cards.TargetCard, dtype: str, taps: int, exact: bool) -> float:
    """Direct convolution of the layer by the model of `algorithm="auto"`."""
    from shardtrain.kernels.conv import costs
    from shardtrain.kernels.conv.task import parse

    shape = "x".join(map(str, LAYER))
    task = parse(f"{shape}->{LAYER[-1]},window={taps},dtype={dtype}")
    rates = costs.sheet_rates(card.kind, dtype, "highest" if exact else None)
    assert rates is not None
    return 1e6 * costs.seconds(task, "direct", rates.by_pass["forward"]["direct"], 0)


def broken(row: KernelEvidence, card: cards.TargetCard) -> str | None:
    """Which budget a kernel breaks."""
    if row.spill_bytes:
        return f"{row.spill_bytes} bytes of spills"
    if row.smem_bytes > card.shared_per_block:
        return f"{row.smem_bytes} bytes of shared memory, {card.shared_per_block} are there"
    if "product" in row.kernel and not row.tensor_core_instructions:
        return "no tensor core instruction"
    return None


@dataclass(frozen=True)
class StepEvidence:
    """A training step compiled for a mesh."""

    target: str
    mesh: str
    hosts: int
    kernels: str
    collectives: dict[str, int]
    peak_bytes: int

    @property
    def sent(self) -> str:
        """The collectives in words."""
        return ", ".join(f"{n} {kind}" for kind, n in self.collectives.items())


def program(card: cards.TargetCard, hosts: int, dump: Path) -> StepEvidence:
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
    with jax.set_mesh(mesh), quietly(dump):
        run = jax.jit(step, donate_argnums=0).lower(kernels, x).compile()
    text = run.as_text() or ""
    counts: Counter[str] = Counter()
    for row in st.census.census(text, mesh):
        counts[row.kind] += row.count
    targets = set(re.findall(r'custom_call_target="([^"]+)"', text))
    kernels_by = "Mosaic" if any("mosaic" in t for t in targets) else "Triton"
    if not any("mosaic" in t or "triton" in t for t in targets):
        sys.exit(f"error: the training step for {card.arch} has none of our kernels, only {targets}")
    memory: Any = run.memory_analysis()
    peak = memory.peak_memory_in_bytes
    name = ",".join(f"{axis}={n}" for axis, n in sizes.items())
    return StepEvidence(card.arch, name, hosts, kernels_by, dict(counts), peak)


@contextlib.contextmanager
def quietly(dump: Path) -> Iterator[None]:
    """Keeps what the compilers print from the terminal."""
    before = os.dup(1), os.dup(2)
    with open(dump / "printed.log", "ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, was in zip((1, 2), before, strict=True):
                os.dup2(was, fd)
                os.close(was)


COMPARISON_HEADER = ("target", "config", "winograd", "direct", "direct / winograd")
HEADER = ("target", "kernel", "config", "regs", "spill", "shared", "tensor", "MB", "least", "model µs")


def cells(row: KernelEvidence) -> list[str]:
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


def measured(target: str, quick: bool) -> tuple[list[KernelEvidence], list[StepEvidence]]:
    """All of one card, in a process of its own: Mosaic keeps what it compiled, for whatever card."""
    with tempfile.TemporaryDirectory(prefix="gpu_evidence_") as folder:
        dump = Path(folder) / "dump"
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump / 'xla'}"
        os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_MLIR_PASSES": "1"}
        os.environ |= {"MOSAIC_GPU_DUMP_TO": str(dump), "XLA_FLAGS": flags}
        cards.prepare()

        from rich.console import Console
        from rich.progress import track

        card = cards.CARDS[target]
        progress = track(list(cases(card, quick)), target, console=Console(stderr=True), transient=True)
        rows = [compiled(card, case, dump) for case in progress]
        return rows, [program(card, hosts, dump) for hosts in ((1,) if quick else (1, 2))]


def arguments() -> argparse.Namespace:
    """Parses the command line, and refuses what cannot be right before anything is compiled."""
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
    return args


def show(rows: Sequence[KernelEvidence], programs: Sequence[StepEvidence]) -> None:
    """Prints the tables in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100 if not sys.stdout.isatty() else None)
    table = Table(title="GPU kernels, as compiled", padding=(0, 0, 0, 0))
    for name in HEADER:
        table.add_column(name, justify="left" if name in HEADER[:3] else "right")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    comparison = Table(title="forward pass by the model, µs")
    for name in COMPARISON_HEADER:
        comparison.add_column(name, justify="left" if name in COMPARISON_HEADER[:2] else "right")
    for line in against_direct(rows):
        comparison.add_row(*line)
    console.print(comparison)
    for found in programs:
        console.print(
            f"{found.target}: {found.mesh} on {found.hosts} host(s), {found.kernels}: {found.sent}; peak "
            f"{found.peak_bytes / 2**20:.0f} MiB a card"
        )


def write_document(rows: Sequence[KernelEvidence], programs: Sequence[StepEvidence]) -> None:
    """Writes the tables into docs/gpu_evidence.md."""
    import jax
    from census_conv import DOCUMENT, write_between

    head = ["| " + " | ".join(HEADER) + " |", "|---|---|---|" + "--:|" * (len(HEADER) - 3)]
    lines = ["| " + " | ".join(cells(row)) + " |" for row in rows]
    meshes = ["| target | mesh | hosts | kernels | collectives | peak MiB |", "|---|---|--:|---|---|--:|"]
    for found in programs:
        peak = f"{found.peak_bytes / 2**20:.0f}"
        meshes.append(
            f"| {found.target} | {found.mesh} | {found.hosts} | {found.kernels} | {found.sent} | {peak} |"
        )
    ratios = ["| " + " | ".join(COMPARISON_HEADER) + " |", "|---|---|--:|--:|--:|"]
    ratios += ["| " + " | ".join(line) + " |" for line in against_direct(rows)]
    caption = f"Layer {LAYER} to {LAYER[-1]} channels; jax {jax.__version__}."
    write_between(
        "gpu_evidence",
        "\n".join([caption, "", *head, *lines, "", *ratios, "", *meshes]),
        DOCUMENT.with_name("gpu_evidence.md"),
    )


def main() -> None:
    """Compiles for each card, prints and writes the tables, and fails where a budget is broken."""
    args = arguments()
    rows: list[KernelEvidence] = []
    programs: list[StepEvidence] = []
    for target in args.targets:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            kernels, steps = pool.submit(measured, target, args.quick).result()
        rows += kernels
        programs += steps
    show(rows, programs)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if args.markdown:
        write_document(rows, programs)
    complaints = [
        f"{row.target}, {row.kernel}, {row.config}: {reason}"
        for row in rows
        if (reason := broken(row, cards.CARDS[row.target]))
    ]
    if complaints:
        sys.exit("error: budgets are broken\n" + "\n".join(complaints))


if __name__ == "__main__":
    main()
