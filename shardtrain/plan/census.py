"""The collectives of a compiled program: how often each one runs, and how many bytes it sends.

The census is read from the optimized HLO text. It therefore shows what XLA made of the model and not what the
model asked for, and it holds for the backend that compiled the program: XLA on CPUs, for one, sends a sum or
a gather of bfloat16 as float32.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """One array that one collective instruction sends.

    XLA fuses the collectives of several arrays into one instruction, which has one `Collective` for each
    array. The exception is an all-to-all whose operand is a tuple of its n pieces: it has one `Collective`,
    of the shape `"4*f32[1,8]"`.

    Attributes:
        kind: one of `KINDS`.
        shape: shape of the result on one device, such as `"f32[2,4,8,8]"`.
        group: number of devices in one group; for a collective-permute the number of pairs whose source is
            not their target.
        axes: mesh axes that a group (or pair) spans, in mesh order; None if no mesh was given.
        count: number of runs in one call of the program.
        payload: bytes of the operand on one device, in one run.
        bytes: bytes that one device sends in all runs by the ring algorithm, rounded up. In a permute without
            wrap-around the last device sends nothing; this is the number of the others.
        source: the last three parts of the operation's name, or `file:line`, or `""`.
        scope: the whole of the operation's name, or `""`.
    """

    kind: str
    shape: str
    group: int
    axes: tuple[str, ...] | None
    count: int
    payload: int
    bytes: int
    source: str
    scope: str = ""


def census(compiled: jax.stages.Compiled | str, mesh: Mesh | AbstractMesh | None = None) -> list[Collective]:
    """Returns the collectives of a compiled program, or of its optimized HLO text.

    The body of a `while` is counted once for each trip of the loop. If XLA does not know the number of trips,
    one trip is counted and a warning is logged. All branches of a conditional are counted, since it is not
    known which one runs. Groups of one device are left out, and so are send and recv, collective-broadcast
    and ragged-all-to-all. Device i of the program is `mesh.devices.flat[i]`.

    Args:
        compiled: the program, for example `jax.jit(f).lower(...).compile()`.
        mesh: the mesh that the program was compiled for. Without it, `Collective.axes` is None.

    Returns:
        One entry for each array that an instruction sends.

    Raises:
        UserError: if the mesh has another number of devices than the program.

    Example:
        >>> mesh = st.make_mesh("data=8")
        >>> sharded = jax.NamedSharding(mesh, P("data"))
        >>> x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharded)
        >>> program = jax.jit(jnp.sum).lower(x).compile()
        >>> [(c.kind, c.axes, c.payload) for c in st.census.census(program, mesh)]
        [('all-reduce', ('data',), 4)]
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    devices = hlo.devices(text)
    if mesh is not None and mesh.size != devices:
        raise UserError(
            f"the mesh has {mesh.size} devices, the program {devices}; give the mesh it was compiled for"
        )
    entry, computations = hlo.parse(text)
    collectives = {name: [i for i in body if i.collective] for name, body in computations.items()}
    runs = _Runs(computations)
    if entry:
        runs.add(entry, 1, known=True)
    if any(collectives[name] for name in runs.unknown):
        log.warning("collectives run in a loop of unknown length: the census counts one trip of it")
    return [
        row
        for name, times in runs.count.items()
        for instruction in collectives[name]
        for row in _rows(instruction, times, devices, mesh)
    ]


class _Runs:
    """How often each computation of a program runs.

    Attributes:
        count: the number of runs, by the name of the computation.
        unknown: the computations that run in a loop whose number of trips XLA does not know.
    """

    def __init__(self, computations: Mapping[str, Sequence[hlo.Instruction]]) -> None:
        self.count: Counter[str] = Counter()
        self.unknown: set[str] = set()
        self._calls = {name: [call for i in body for call in i.calls] for name, body in computations.items()}

    def add(self, name: str, times: int, known: bool) -> None:
        """Counts `times` runs of a computation, and of all that it calls."""
        self.count[name] += times
        if not known:
            self.unknown.add(name)
        for call in self._calls[name]:
            if call.name in self._calls:
                trips = 1 if call.runs is None else call.runs
                self.add(call.name, times * trips, known and call.runs is not None)


def _rows(
    instruction: hlo.Instruction, times: int, devices: int, mesh: Mesh | AbstractMesh | None
) -> Iterator[Collective]:
    """The arrays that a collective sends when it runs `times` times."""
    kind, shape = instruction.collective or "", instruction.shape
    groups = hlo.groups(instruction, devices)
    if not groups or not times:
        return
    n = len(groups) if kind == "collective-permute" else max(map(len, groups))
    # The shape of a -start is (operands, results, ...); all-reduce-start before jax 0.12 has only results.
    if instruction.op != kind and (kind != "all-reduce" or shape.startswith("((")):
        shape = list(hlo.pieces(shape[1:-1], ","))[1]
    arrays = hlo.arrays(shape)
    if kind == "all-to-all" and len(arrays) > 1:
        arrays = [(f"{len(arrays)}*{arrays[0][0]}", sum(size for _, size in arrays))]
    axes = None if mesh is None else hlo.crossed(groups, mesh)
    for array, size in arrays:
        payload = {"all-gather": size // n, "reduce-scatter": size * n}.get(kind, size)
        sent = ring(kind, n, payload * times)
        yield Collective(kind, array, n, axes, times, payload, sent, instruction.source, instruction.scope)


def ring(kind: str, n: int, payload: int) -> int:
    """Returns the bytes that one of `n` devices sends in a collective by the ring algorithm.

    Args:
        kind: one of `KINDS`.
        n: number of devices in the group.
        payload: bytes of the operand on one device.

    Example:
        >>> st.census.ring("all-reduce", 4, 1000)
        1500
    """
    if kind == "collective-permute":
        return payload
    if kind == "all-gather":
        return (n - 1) * payload
    return -(-(2 if kind == "all-reduce" else 1) * (n - 1) * payload // n)


def summary(collectives: Iterable[Collective]) -> list[dict]:
    """Returns the sums of a census by kind and mesh axes, most bytes first.

    Returns:
        Rows `{"kind": ..., "axes": ..., "count": ..., "bytes": ...}`, which JSON can represent.

    Example:
        >>> mesh = st.make_mesh("data=8")
        >>> x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=jax.NamedSharding(mesh, P("data")))
        >>> program = jax.jit(jnp.sum).lower(x).compile()
        >>> st.census.summary(st.census.census(program, mesh))
        [{'kind': 'all-reduce', 'axes': ['data'], 'count': 1, 'bytes': 7}]
    """
    totals: dict[tuple[str, tuple[str, ...] | None], Counter[str]] = defaultdict(Counter)
    for c in collectives:
        totals[c.kind, c.axes].update(count=c.count, bytes=c.bytes)
    rows = [
        {"kind": kind, "axes": None if axes is None else list(axes), **total}
        for (kind, axes), total in totals.items()
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], json.dumps(row)))


def table(collectives: Iterable[Collective]) -> Table:
    """Returns a census as a table for a terminal of 100 columns, most bytes first.

    Collectives of equal kind, axes, shape and payload share a line.
    """
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
