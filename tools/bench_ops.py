"""Times operators: ours against jax's on one device, and partitioned against XLA's partitioner.

    python tools/bench_ops.py --markdown

Forward and backward pass, float32, in turns; the ratio is the median over the rounds of our time over
theirs, so other work on the machine slows both equally. Partitioned rows where XLA's result is wrong are left
out: see `tools/census_ops.py`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax
from census_conv import write_between
from census_ops import BY_NAME, result
from jax.sharding import Mesh
from operator_cases import Case, compiled, inputs
from rich.console import Console
from rich.progress import track
from rich.table import Table

import shardtrain as st

ALONE = (
    "local 3x3",
    "depthwise 3x3",
    "grouped 3x3, 8 groups",
    "conv 3x3",
    "conv 3x3x3",
    "transposed 4x4 s2",
    "max pool 3x3 s2",
    "linear x2",
)

CUT = (
    ("conv 3x3", "data=2,height=4"),
    ("conv 3x3", "height=4,width=2"),
    ("conv 3x3, circular", "height=8"),
    ("conv 3x3x3", "depth=2,height=2,width=2"),
    ("depthwise 3x3", "height=8"),
    ("depthwise 3x3", "channel=8"),
    ("transposed 4x4 s2", "data=2,height=4"),
    ("local 3x3", "data=2,height=4"),
    ("local 3x3", "height=4,width=2"),
    ("max pool 3x3 s2", "height=4,width=2"),
    ("linear x2", "data=2,height=4"),
    ("batch norm", "data=2,height=4"),
    ("group norm, 4 groups", "data=2,height=4"),
    ("concat", "channel=8"),
)

HEADER = ("operator", "cut", "ours, ms", "jax, ms", "ratio", "middle half")


def in_turns(sides: Sequence[Callable[[], object]], rounds: int, seconds: float) -> list[list[float]]:
    """Seconds for one call of each side, a number for every round; blocks last about `seconds`.

    Each block begins with a call that is not timed: caches are the side's own, and threads that spin after
    the side before have gone to sleep.
    """

    def block(side: Callable[[], object], calls: int) -> float:
        time.sleep(0.002)
        jax.block_until_ready(side())
        clock = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(side())
        return (time.perf_counter() - clock) / calls

    for side in sides:
        block(side, 3)
    calls = max(1, round(seconds / max(block(side, 3) for side in sides)))
    taken: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        for i in list(range(len(sides)))[:: 1 if turn % 2 else -1]:
            taken[i].append(block(sides[i], calls))
    return taken


def row(case: Case, cut: str, mesh: Mesh, rounds: int, seconds: float) -> list[str] | None:
    """One line of the table, None where XLA's result is wrong."""
    if cut and result(compiled(case, case.plain, mesh, "float64"), case, mesh) != "right":
        return None
    programs = [compiled(case, side, mesh, "float32") for side in (case.ours, case.plain)]
    arrays = inputs(case, mesh, "float32")
    sides: list[Callable[[], object]] = [lambda p=p: p(*arrays) for p in programs]  # type: ignore[misc]
    ours, theirs = in_turns(sides, rounds, seconds)
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    times = [f"{1e3 * statistics.median(side):.2f}" for side in (ours, theirs)]
    return [
        case.name,
        cut or "one device",
        *times,
        f"{statistics.median(ratios):.2f}",
        f"{low:.2f}-{high:.2f}",
    ]


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each side")
    parser.add_argument("--seconds", type=float, default=0.5, help="that a block lasts")
    parser.add_argument("--operator", action="append", metavar="NAME", help="only operators of this name")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    if unknown := set(args.operator or ()) - set(BY_NAME):
        parser.error(f"--operator {unknown.pop()}: there are {', '.join(map(repr, BY_NAME))}")
    return args


def measure(args: argparse.Namespace) -> list[list[str]]:
    """The lines of the table, without those for which XLA's result is wrong."""
    one = st.make_mesh("data=1", devices=jax.devices()[:1])
    todo = [(name, "", one) for name in ALONE] + [(name, cut, st.make_mesh(cut)) for name, cut in CUT]
    todo = [entry for entry in todo if entry[0] in (args.operator or [entry[0]])]
    progress = track(todo, "timing", console=Console(stderr=True), transient=True)
    found = [row(BY_NAME[name], cut, mesh, args.rounds, args.seconds) for name, cut, mesh in progress]
    return [cells for cells in found if cells is not None]


def is_slower(cells: Sequence[str]) -> bool:
    """Whether ours takes longer than jax's in a line of the table, by more than the noise."""
    return float(cells[4]) > 1.05


def markdown(rows: Sequence[Sequence[str]], rounds: int) -> str:
    """The table and its caption for the document."""
    lost = [f"{cells[0]} on {cells[1]} ({cells[4]})" for cells in rows if is_slower(cells)]
    text = [
        f"Forward and backward pass, float32, {rounds} rounds in turns; jax {jax.__version__}, CPU; "
        f"the cut ones on 8 simulated devices of one machine.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|---|--:|--:|--:|--:|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        f"Above 1.05: {'; '.join(lost)}." if lost else "No ratio is above 1.05.",
    ]
    return "\n".join(text)


def main() -> None:
    """Measures, prints, writes."""
    args = arguments()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    rows = measure(args)
    table = Table(title="forward and backward, our time over jax's")
    for name in HEADER:
        table.add_column(name, justify="left" if name in HEADER[:2] else "right")
    for cells in rows:
        table.add_row(*cells, style="yellow" if is_slower(cells) else None)
    Console(width=100).print(table)
    if args.markdown:
        write_between("bench_ops", markdown(rows, args.rounds))


if __name__ == "__main__":
    main()
