"""What a compiled program sends between devices: its collectives, how often they run, how many bytes.

Read from the optimized HLO text, so it is what XLA made of the model, not what the model asked for. It
holds for the backend that compiled it: XLA on CPUs, for one, sends a bf16 sum or gather as f32.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, Mesh
from rich.table import Table

from shardtrain import hlo
from shardtrain.errors import UserError
from shardtrain.hlo import KINDS

log = logging.getLogger(__name__)

__all__ = ["KINDS", "Collective", "census", "ring", "summary", "table"]


@dataclass(frozen=True)
class Collective:
    """One array that one instruction moves. XLA fuses several arrays into one instruction: several rows.

    The one exception is an all-to-all given as a tuple of its n pieces: one row, shape `"4*f32[1,8]"`.

    Attributes:
        kind: one of `KINDS`.
        shape: of the result on one device, `"f32[2,4,8,8]"`.
        group: devices in one group; for a collective-permute the pairs whose source is not their target.
        axes: mesh axes that a group (or pair) spans, in mesh order; None if no mesh was given.
        count: runs in one call of the program.
        payload: bytes of the operand on one device, for one run.
        bytes: what one device sends in all runs by the ring algorithm, rounded up. In a permute without
            wrap-around the last device sends nothing; this is the number of the others.
        source: the last three parts of the op's name, or `file:line`, or `""`.
    """

    kind: str
    shape: str
    group: int
    axes: tuple[str, ...] | None
    count: int
    payload: int
    bytes: int
    source: str


def census(compiled: jax.stages.Compiled | str, mesh: Mesh | AbstractMesh | None = None) -> list[Collective]:
    """The collectives of a compiled program, or of its HLO text.

    What a `while` runs is multiplied by its trip count; if XLA does not know the trips, one is counted and
    a warning is logged. All branches of a conditional are counted, since which one runs is not known.
    Groups of one device are left out. Device i of the program is `mesh.devices.flat[i]`. Not looked for:
    send and recv, collective-broadcast, ragged-all-to-all.

    Raises:
        UserError: if `mesh` has another number of devices than the program.

    Example:
        >>> [c.bytes for c in census(step.lower(state, batch).compile(), mesh)]  # doctest: +SKIP
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    devices = hlo.devices(text)
    if mesh is not None and mesh.size != devices:
        raise UserError(
            f"the mesh has {mesh.size} devices, the program {devices}; give the mesh it was compiled for"
        )

    entry, computations = hlo.parse(text)
    sends = {name: [i for i in body if i.collective] for name, body in computations.items()}
    calls = {name: [call for i in body for call in i.calls] for name, body in computations.items()}
    runs: Counter[str] = Counter()
    unsure = set()

    def visit(name: str, times: int, sure: bool) -> None:
        runs[name] += times
        if not sure:
            unsure.add(name)
        for call in calls[name]:
            if call.name in computations:
                visit(
                    call.name, times * (1 if call.runs is None else call.runs), sure and call.runs is not None
                )

    if entry:
        visit(entry, 1, True)
    if any(sends[name] for name in unsure):
        log.warning("collectives run in a loop of unknown length: the census counts one trip of it")
    return [
        row
        for name, times in runs.items()
        for send in sends[name]
        for row in _rows(send, times, devices, mesh)
    ]


def _rows(
    send: hlo.Instruction, times: int, devices: int, mesh: Mesh | AbstractMesh | None
) -> Iterator[Collective]:
    kind, shape = send.collective or "", send.shape
    groups = hlo.groups(send, devices)
    if not groups or not times:
        return
    n = len(groups) if kind == "collective-permute" else max(map(len, groups))
    # of a -start (operands, results, ...); all-reduce-start of jax before 0.12 has only results
    if send.op != kind and (kind != "all-reduce" or shape.startswith("((")):
        shape = list(hlo.pieces(shape[1:-1], ","))[1]
    arrays = hlo.arrays(shape)
    if kind == "all-to-all" and len(arrays) > 1:
        arrays = [(f"{len(arrays)}*{arrays[0][0]}", sum(size for _, size in arrays))]
    axes = None if mesh is None else hlo.crossed(groups, mesh)
    for array, size in arrays:
        payload = {"all-gather": size // n, "reduce-scatter": size * n}.get(kind, size)
        yield Collective(kind, array, n, axes, times, payload, ring(kind, n, payload * times), send.source)


def ring(kind: str, n: int, payload: int) -> int:
    """Bytes that one of `n` devices sends."""
    if kind == "collective-permute":
        return payload
    if kind == "all-gather":
        return (n - 1) * payload
    return -(-(2 if kind == "all-reduce" else 1) * (n - 1) * payload // n)


def summary(collectives: Iterable[Collective]) -> list[dict]:
    """Rows `{"kind", "axes", "count", "bytes"}` merged by kind and axes, most bytes first, ready for JSON."""
    totals: dict[tuple[str, tuple[str, ...] | None], Counter[str]] = defaultdict(Counter)
    for c in collectives:
        totals[c.kind, c.axes].update(count=c.count, bytes=c.bytes)
    rows = [
        {"kind": kind, "axes": None if axes is None else list(axes), **total}
        for (kind, axes), total in totals.items()
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], json.dumps(row)))


def table(collectives: Iterable[Collective]) -> Table:
    """The census for a terminal of 100 columns; equal collectives share a line, most bytes first."""
    totals: dict[tuple[str, str, str, int], Counter[str]] = defaultdict(Counter)
    for c in collectives:
        axes = "?" if c.axes is None else ",".join(c.axes)
        totals[c.kind, axes, c.shape, c.payload].update(count=c.count, bytes=c.bytes)
    result = Table(title="collectives of one call, bytes that one device sends", show_footer=True)
    result.add_column("kind", "total", no_wrap=True)
    result.add_column("axes", overflow="fold")
    count, sent = (sum(total[key] for total in totals.values()) for key in ("count", "bytes"))
    result.add_column("count", str(count), justify="right", no_wrap=True)
    result.add_column("shape", overflow="fold")
    result.add_column("payload", justify="right", no_wrap=True)
    result.add_column("bytes", _human(sent), justify="right", no_wrap=True)
    for (kind, axes, shape, payload), total in sorted(totals.items(), key=lambda item: -item[1]["bytes"]):
        numbers = str(total["count"]), _human(payload), _human(total["bytes"])
        result.add_row(kind, axes, numbers[0], shape, *numbers[1:])
    return result


def _human(size: int | float) -> str:
    """`1536` as `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
