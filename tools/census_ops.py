"""Counts the bytes of all partitioned operators, forward and backward: ours and XLA's partitioner.

    python tools/census_ops.py --markdown

Both sides start and end with the same arrays in the same places. Bytes are those of `shardtrain.census`
for float32, what one device sends. Whether a result is right is measured by running the same program in
float64 on 8 simulated devices, against one device. Convolutions have a table of their own, with strides
and windows: `tools/census_conv.py`.
"""

import argparse
import dataclasses
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import numpy as np
from census_conv import by_kind, kinds, write_between
from jax.sharding import Mesh
from operator_cases import CASES, Case, compiled, inputs
from rich.console import Console
from rich.progress import track
from rich.table import Table

import shardtrain as st
from shardtrain.mesh import SPATIAL

CUTS = (
    "data=8",
    "height=8",
    "height=4,width=2",
    "depth=2,height=2,width=2",
    "channel=8",
    "height=4,channel=2",
    "data=2,height=2,channel=2",
)

BY_NAME = {case.name: case for case in CASES}

HEADER = ("cut", "operator", "ours", "by kind", "XLA", "by kind", "XLA's result")

LEGEND = (
    "cp collective-permute, ag all-gather, rs reduce-scatter, ar all-reduce, aa all-to-all; gathers: XLA "
    "gathers the whole activation along an axis that cuts pixels or the batch"
)


@dataclasses.dataclass(frozen=True)
class OperatorRow:
    """One operator on one mesh, both sides: bytes by kind, results, and whether XLA gathers."""

    cut: str
    name: str
    ours: Mapping[str, int]
    xla: Mapping[str, int]
    ours_result: str
    xla_result: str
    gathers: bool

    def cells(self) -> list[str]:
        numbers = [f"{sum(side.values()) / 1024:,.0f}" for side in (self.ours, self.xla)]
        verdict = self.xla_result + (", gathers" if self.gathers else "")
        return [self.cut, self.name, numbers[0], by_kind(self.ours), numbers[1], by_kind(self.xla), verdict]


def result(program: Any, case: Case, mesh: Mesh) -> str:
    """`"right"`, or which of y, dx and the gradients are wrong."""
    arrays, cotangent = inputs(case, mesh, "float64")
    y, pull = jax.vjp(case.plain, *(np.asarray(a) for a in arrays))
    wanted = [y, *pull(np.asarray(cotangent))]
    names = ["y", "dx", *(f"dw{i}" for i in range(len(case.parameters)))]
    found = program(arrays, cotangent)
    wrong = [
        name
        for name, a, b in zip(names, found, wanted, strict=True)
        if np.abs(np.asarray(a) - b).max() > 1e-9 * max(1.0, float(np.abs(b).max()))
    ]
    return f"WRONG {', '.join(wrong)}" if wrong else "right"


def gathers(program: Any, case: Case, mesh: Mesh) -> bool:
    """Whether a device is sent the activation along an axis that cuts its batch or pixels."""
    return any(
        c.kind == "all-gather"
        and set(c.axes or ()) & {*SPATIAL, "data"}
        and c.payload * c.group * 2 >= 4 * np.prod(case.x) // mesh.size * c.group
        for c in st.census.census(program, mesh)
    )


Side = tuple[dict[str, int], str, bool]


def start() -> None:
    """Eight simulated devices, float64."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)


def measure(name: str, cut: str, plain: bool) -> Side:
    """Bytes by kind, result and gathers of one side of one row."""
    case, mesh = BY_NAME[name], st.make_mesh(cut)
    side = case.plain if plain else case.ours
    single, double = (compiled(case, side, mesh, dtype) for dtype in ("float32", "float64"))
    sent = kinds(st.census.census(single, mesh))
    return sent, result(double, case, mesh), gathers(single, case, mesh)


class Workers:
    """A process for XLA's partitioner, whose failed checks end the process they are in."""

    def __init__(self) -> None:
        self.pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start)

    def measure(self, name: str, cut: str) -> Side:
        try:
            return self.pool.submit(measure, name, cut, True).result()
        except BrokenProcessPool:
            self.pool = self._new()
            return {}, "the compiler aborts", False


def compare(case: Case, cut: str, workers: Workers) -> OperatorRow:
    """Both sides of one row."""
    ours, right, gathered = measure(case.name, cut, False)
    theirs, verdict, looks = workers.measure(case.name, cut)
    return OperatorRow(cut, case.name, ours, theirs, right, verdict, looks and not gathered)


def verdict(rows: Sequence[OperatorRow]) -> list[str]:
    """What the table says, in sentences."""

    def listed(some: Sequence[OperatorRow]) -> str:
        return "; ".join(f"{row.name} on {row.cut}" for row in some)

    totals = {id(row): (sum(row.ours.values()), sum(row.xla.values())) for row in rows}
    right = [row for row in rows if row.xla_result == "right"]
    lost = [row for row in right if totals[id(row)][0] > totals[id(row)][1]]
    bad = [row for row in rows if row.ours_result != "right"]
    lines = [
        f"Ours is right in {len(rows) - len(bad)} of {len(rows)} rows, XLA in {len(right)}; in "
        f"{len(right) - len(lost)} of those ours sends at most as many bytes."
    ]
    if bad:
        lines.append(f"Ours is WRONG: {listed(bad)}.")
    if lost:
        lines.append(f"Ours sends more: {listed(lost)}.")
    if wrong := [row for row in rows if row.xla_result.startswith("WRONG")]:
        lines.append(f"XLA is wrong: {listed(wrong)}.")
    if aborted := [row for row in rows if "aborts" in row.xla_result]:
        lines.append(f"XLA's compiler aborts the process: {listed(aborted)}.")
    if whole := [row for row in rows if row.gathers]:
        lines.append(f"XLA gathers what ours leaves in place: {listed(whole)}.")
    return lines


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operator", action="append", metavar="NAME", help="only operators of this name")
    parser.add_argument("--cut", action="append", metavar="MESH", help="only these cuts, of 8 devices")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    if unknown := set(args.operator or ()) - set(BY_NAME):
        parser.error(f"--operator {unknown.pop()}: there are {', '.join(map(repr, BY_NAME))}")
    start()
    workers = Workers()
    meshes = {cut: st.make_mesh(cut) for cut in args.cut or CUTS}
    chosen = [case for case in CASES if case.name in (args.operator or [case.name])]
    todo = [(case, cut) for cut, mesh in meshes.items() for case in chosen if case.cut_by(mesh)]
    progress = track(todo, "compiling", console=Console(stderr=True), transient=True)
    rows = [compare(case, cut, workers) for case, cut in progress]
    table = Table(
        title="KiB that one device sends, forward and backward", caption=LEGEND, padding=(0, 0, 0, 1)
    )
    for name in HEADER:
        table.add_column(name, justify="right" if name in ("ours", "XLA") else "left")
    for line in rows:
        table.add_row(*line.cells(), style=None if line.xla_result == "right" else "red")
    console = Console(width=100)
    console.print(table)
    for sentence in verdict(rows):
        console.print(sentence, highlight=False)
    if args.markdown:
        text = [
            f"KiB that one device sends, forward and backward, float32; jax {jax.__version__}, 8 simulated "
            f"CPU devices; {LEGEND}.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|---|---|--:|---|--:|---|---|",
            *("| " + " | ".join(line.cells()) + " |" for line in rows),
            "",
            *verdict(rows),
        ]
        write_between("census_ops", "\n".join(text))


if __name__ == "__main__":
    main()
