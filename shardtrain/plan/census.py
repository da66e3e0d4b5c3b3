"""What a compiled program sends between devices: its collectives, how often they run, how many bytes.

Read from the optimized HLO text, so it is what XLA made of the model, not what the model asked for. It
holds for the backend that compiled it: XLA on CPUs, for one, sends a bf16 sum or gather as f32.
"""

import json
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from rich.table import Table

from shardtrain.errors import UserError

log = logging.getLogger(__name__)

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


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


@dataclass
class _Computation:
    sends: list[tuple[str, str, str, str]] = field(default_factory=list)  # opcode, shape, code, source
    calls: list[tuple[str, int | None]] = field(default_factory=list)  # callee, runs (None: unknown)


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
    head = text.strip().partition("\n")[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head))
    if mesh is not None and mesh.size != devices:
        raise UserError(
            f"the mesh has {mesh.size} devices, the program {devices}; give the mesh it was compiled for"
        )

    entry, computations = _parse(text)
    runs: Counter[str] = Counter()
    unsure = set()

    def visit(name: str, times: int, sure: bool) -> None:
        runs[name] += times
        if not sure:
            unsure.add(name)
        for callee, trips in computations[name].calls:
            if callee in computations:
                visit(callee, times * (1 if trips is None else trips), sure and trips is not None)

    if entry:
        visit(entry, 1, True)
    if any(computations[name].sends for name in unsure):
        log.warning("collectives run in a loop of unknown length: the census counts one trip of it")
    return [
        row
        for name, times in runs.items()
        for send in computations[name].sends
        for row in _rows(*send, times, devices, mesh)
    ]


_STRING = r'"(?:\\.|[^"\\])*"'
_TRIPS = re.compile(r'"known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|(?:true|false)_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)


def _parse(text: str) -> tuple[str, dict[str, _Computation]]:
    """Name of the entry, and every computation with what it sends and calls."""
    entry, current = "", _Computation()
    computations: dict[str, _Computation] = {}
    for line in text.splitlines():
        if header := re.match(r"\s*(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$", line):
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)", line):
            code = re.sub(_STRING, '""', instruction[1])  # a name in the metadata must not look like code
            shape = next(_cut(code, " "))
            op = code[len(shape) + 1 :].partition("(")[0]
            if op.removesuffix("-start") in KINDS:
                current.sends.append((op, shape, code, _source(line)))
            elif not op.endswith(("-done", "-update")):  # those name what their -start calls once more
                known = _TRIPS.search(line)
                trips = 1 if op != "while" else int(known[1]) if known else None
                for role, names in _CALLS.findall(code):
                    # a loop asks its condition once more than it runs its body
                    times = trips + 1 if role == "condition" and trips is not None else trips
                    current.calls += [(name, times) for name in re.findall(r"[\w.\-]+", names)]
    return entry, computations


def _rows(
    op: str, shape: str, code: str, source: str, times: int, devices: int, mesh: Mesh | AbstractMesh | None
) -> Iterator[Collective]:
    kind = op.removesuffix("-start")
    if kind == "collective-permute":
        groups = [pair for pair in _lists(code, "source_target_pairs") if pair[0] != pair[1]]
        n = len(groups)
    else:
        groups = [group for group in _groups(code, devices) if len(group) > 1]
        n = max(map(len, groups), default=0)
    if not groups or not times:
        return
    if op != kind and kind != "all-reduce":  # (operands, results, ...); all-reduce-start has only results
        shape = list(_cut(shape[1:-1], ","))[1]
    arrays = [(f"{dtype}[{dims}]", _size(dtype, dims)) for dtype, dims in _ARRAY.findall(shape)]
    if kind == "all-to-all" and len(arrays) > 1:
        arrays = [(f"{len(arrays)}*{arrays[0][0]}", sum(size for _, size in arrays))]
    axes = None if mesh is None else _axes(groups, mesh)
    for array, size in arrays:
        payload = {"all-gather": size // n, "reduce-scatter": size * n}.get(kind, size)
        yield Collective(kind, array, n, axes, times, payload, ring(kind, n, payload * times), source)


def ring(kind: str, n: int, payload: int) -> int:
    """Bytes that one of `n` devices sends."""
    if kind == "collective-permute":
        return payload
    if kind == "all-gather":
        return (n - 1) * payload
    return -(-(2 if kind == "all-reduce" else 1) * (n - 1) * payload // n)


def _groups(code: str, devices: int) -> list[list[int]]:
    """The replica groups; XLA writes them as lists, as a reshaped iota, or as axes of a mesh of its own."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", code):
        return _iota(iota[2]).reshape(_ints(iota[1])).tolist()
    if own := re.search(r"replica_groups=mesh\[(.+?)\](?:, device_ids=\((.+?)\))? \{(.*?)\}", code):
        sizes = dict(re.findall(r"([^,=]+)=(\d+)", own[1]))
        names, shape = list(sizes), [int(size) for size in sizes.values()]
        ids = _iota(own[2] or f"[{math.prod(shape)}]")
        coords = np.indices(shape).reshape(len(shape), -1)
        for name, before, part in re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?", own[3]):
            k = names.index(name)
            # 'a':(2)4 is the part of size 4 that has parts of 2 in all before it
            size = int(part or shape[k])
            stride = shape[k] // (int(before or 1) * size)
            coords[k] -= coords[k] // stride % size * stride
        same = np.ravel_multi_index(tuple(coords), shape)
        return [ids[same == key].tolist() for key in np.unique(same)]
    if "replica_groups=" in code and not re.search(r"replica_groups=\{[{}]", code):
        raise ValueError(f"replica_groups in an unknown form: {code}")
    return _lists(code, "replica_groups") or [list(range(devices))]  # {} means all


def _lists(code: str, attribute: str) -> list[list[int]]:
    """`attribute={{0,1},{2,3}}` as lists."""
    found = re.search(attribute + r"=\{((?:\{[\d,]*\},?)*)\}", code)
    return [_ints(group) for group in re.findall(r"\{([\d,]*)\}", found[1])] if found else []


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0 to 7 as 4x2, transposed, flat; or the plain numbers `3,1,0,2`."""
    form = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not form:
        return np.array(_ints(text))
    shape = _ints(form[1])
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid.transpose(_ints(form[2])) if form[2] else grid).ravel()


def _axes(groups: Iterable[list[int]], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    shape = tuple(mesh.shape.values())
    spans = np.zeros(len(shape), bool)
    for group in groups:
        coords = np.array(np.unravel_index(group, shape))
        spans |= (coords != coords[:, :1]).any(axis=1)
    return tuple(name for name, spanned in zip(mesh.axis_names, spans, strict=True) if spanned)


_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\]")


def _size(dtype: str, dims: str) -> int:
    bits = re.search(r"\d+", "pred8" if dtype == "pred" else dtype)  # bf16, f8e4m3fn, c64: the first number
    return -(-int(bits[0] if bits else 0) * math.prod(_ints(dims.replace("<=", ""))) // 8)


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _cut(text: str, at: str) -> Iterator[str]:
    """Pieces of `text` between those `at` that are outside all brackets."""
    depth = begin = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == at and depth == 0:
            yield text[begin:i]
            begin = i + 1
    yield text[begin:]


def _source(line: str) -> str:
    if name := re.search(rf"op_name=({_STRING})", line):
        return "/".join(name[1][1:-1].split("/")[-3:])
    place = re.search(r'source_file="(?:[^"]*/)?([^"/]+)" source_line=(\d+)', line)
    return f"{place[1]}:{place[2]}" if place else ""


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
