"""Reads the text of a compiled program (optimized HLO) as computations that call each other."""

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import AbstractMesh, Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
"""The collectives; on GPUs each is a pair of a `-start` and a `-done`."""


@dataclass(frozen=True)
class Call:
    """A computation that an instruction runs.

    Attributes:
        role: such as `"body"`, `"condition"`, `"branch_computations"`, `"calls"`.
        name: of the computation.
        runs: how often, for one run of the instruction: at most once for a branch, which counts as 1; None
            for a loop whose length XLA does not know.
    """

    role: str
    name: str
    runs: int | None


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the `%`.
        op: its opcode, such as `"all-reduce-start"`.
        shape: of its result, as text.
        code: the text behind the `=`, with all strings empty, so that no metadata looks like code.
        line: the whole line.
        at_most_once: whether it is a loop of which each run makes at most one turn.
    """

    name: str
    op: str
    shape: str
    code: str
    line: str
    at_most_once: bool = False

    @property
    def collective(self) -> str | None:
        """The kind of collective that it starts, None for none."""
        kind = self.op.removesuffix("-start")
        return kind if kind in KINDS else None

    @property
    def calls(self) -> Iterator[Call]:
        """Yields the computations that it runs; a `-done` does not name those of its `-start` again."""
        if self.collective or self.op.endswith(("-done", "-update")):
            return
        trips = self.trips if self.op == "while" and not self.at_most_once else 1
        for role, names in _CALLS.findall(self.code):
            # A loop evaluates its condition once more than its body.
            runs = trips + 1 if role == "condition" and trips is not None else trips
            yield from (Call(role, name, runs) for name in re.findall(r"[\w.\-]+", names))

    def called(self, role: str) -> str:
        """Returns the computation that it runs in a role that just one has."""
        return next(call.name for call in self.calls if call.role == role)

    @property
    def trips(self) -> int | None:
        """The number of turns of a loop; None if XLA does not know it."""
        known = _TRIPS.search(self.line)
        return int(known[1]) if known else None

    @property
    def divergent(self) -> bool:
        """Whether devices may run different parts of it: a conditional, or a loop of unknown length."""
        return self.op == "conditional" or (self.op == "while" and self.trips is None)

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        inner = next(pieces(self.code[len(self.shape) + 1 + len(self.op) :], ","))[1:-1]
        words = [re.sub(r"/\*.*?\*/", "", piece).split() for piece in pieces(inner, ",")]
        return [word[-1].removeprefix("%") for word in words if word]

    @property
    def scope(self) -> str:
        """The whole of the op's name, such as `"jit(step)/shard_map/psum"`, or `""`."""
        name = re.search(rf"op_name=({_STRING})", self.line)
        return name[1][1:-1] if name else ""

    @property
    def frame(self) -> str:
        """The number of the stack frame that it was written in, see `places`, or `""`."""
        found = re.search(r"stack_frame_id=(\d+)", self.line)
        return found[1] if found else ""

    @property
    def source(self) -> str:
        """The last three parts of the op's name, or `file:line`, or `""`."""
        if self.scope:
            return "/".join(self.scope.split("/")[-3:])
        place = re.search(r'source_file="(?:[^"]*/)?([^"/]+)" source_line=(\d+)', self.line)
        return f"{place[1]}:{place[2]}" if place else ""


Computations = dict[str, list[Instruction]]

_STRING = r'"(?:\\.|[^"\\])*"'
_TRIPS = re.compile(r'"known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|(?:true|false)_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)


def parse(text: str) -> tuple[str, Computations]:
    """Returns the name of the entry, and the instructions of each computation."""
    entry, current = "", list[Instruction]()
    computations: Computations = {}
    for line in text.splitlines():
        if header := re.match(r"\s*(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$", line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            code = re.sub(_STRING, '""', found[2])
            shape = next(pieces(code, " "))
            op = code[len(shape) + 1 :].partition("(")[0]
            current.append(Instruction(found[1], op, shape, code, line))
    for body in computations.values():
        body[:] = [replace(i, at_most_once=True) if _runs_at_most_once(i, computations) else i for i in body]
    return entry, computations


def places(text: str, skip: Callable[[str], bool]) -> dict[str, str]:
    """Returns where the operations of a program were written, as `"model.py:12 (Net.__call__)"`.

    Args:
        text: of the program.
        skip: whether a file, by its path, is not one to name, such as a library's.

    Returns:
        By the number of the stack frame that an instruction has: the innermost place in a file that is not
        skipped. Instructions whose whole stack is skipped have none, nor have those of a program without
        tables of frames.
    """
    tables = _frames(text)
    found: dict[str, str] = {}
    for frame in tables["StackFrames"]:
        for path, line, function in _stack(frame, tables):
            if not skip(path):
                found[frame] = f"{path.rpartition('/')[2]}:{line} ({function})"
                break
    return found


_FRAME = re.compile(r"file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
_LOCATION = re.compile(r"file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")


def _stack(frame: str, tables: dict[str, dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    """File, line and function of a frame and of those around it; the outermost may name itself as its own."""
    seen = set[str]()
    while frame not in seen and (where := _FRAME.search(tables["StackFrames"].get(frame, ""))):
        seen.add(frame)
        location, frame = where[1], where[2] or ""
        if place := _LOCATION.search(tables["FileLocations"].get(location, "")):
            path, function = tables["FileNames"].get(place[1], ""), tables["FunctionNames"].get(place[2], "")
            yield path.strip('"'), place[3], function.strip('"')


def _frames(text: str) -> dict[str, dict[str, str]]:
    """The tables of stack frames at the head of a program, each by its numbers."""
    tables: dict[str, dict[str, str]] = {
        name: {} for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    }
    current: dict[str, str] = {}
    for line in map(str.rstrip, io.StringIO(text)):
        if line.startswith(("%", "ENTRY")):
            break
        current = tables.get(line, current)
        if row := re.match(r"(\d+) (.*)", line):
            current[row[1]] = row[2]
    return tables


def _runs_at_most_once(loop: Instruction, computations: Computations) -> bool:
    """Whether a loop runs while one of its carried values is true, which its body makes false."""
    if not (loop.op == "while" and loop.divergent):
        return False
    body = computations[loop.called("body")]
    asked, made = root(computations[loop.called("condition")]), root(body)
    if asked.op != "get-tuple-element" or made.op != "tuple":
        return False
    by_name = {i.name: i for i in body}
    value = by_name[made.operands[index(asked)]]
    while value.op == "copy":
        value = by_name[value.operands[0]]
    return value.op == "constant" and "constant(false)" in value.code


def root(computation: Iterable[Instruction]) -> Instruction:
    """Returns the instruction whose value a computation returns."""
    return next(i for i in computation if i.line.lstrip().startswith("ROOT "))


def index(element: Instruction) -> int:
    """Returns the number of the element that a `get-tuple-element` reads."""
    found = re.search(r"\bindex=(\d+)", element.code)
    if not found:
        raise ValueError(f"not an element of a tuple: {element.line}")
    return int(found[1])


def devices(text: str) -> int:
    """Returns the number of devices that a program is for."""
    head = text.strip().partition("\n")[0]
    return math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head))


def groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Returns the groups of devices of a collective that have more than one; of a permute the pairs."""
    if instruction.collective == "collective-permute":
        return [pair for pair in _lists(instruction.code, "source_target_pairs") if pair[0] != pair[1]]
    return [group for group in _groups(instruction.code, devices) if len(group) > 1]


def _groups(code: str, devices: int) -> list[list[int]]:
    """Returns the replica groups, written as lists, as a reshaped iota or as axes of a mesh of XLA's."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", code):
        return _iota(iota[2]).reshape(ints(iota[1])).tolist()
    if own := re.search(r"replica_groups=mesh\[(.+?)\](?:, device_ids=\((.+?)\))? \{(.*?)\}", code):
        sizes = dict(re.findall(r"([^,=]+)=(\d+)", own[1]))
        names, shape = list(sizes), [int(size) for size in sizes.values()]
        ids = _iota(own[2] or f"[{math.prod(shape)}]")
        coords = np.indices(shape).reshape(len(shape), -1)
        for name, before, part in re.findall(r"([^,:]+)(?::\((\d+)\)(\d+))?", own[3]):
            k = names.index(name)
            # 'a':(2)4 is the part of size 4 of the axis a that comes after parts of size 2 in all.
            size = int(part or shape[k])
            stride = shape[k] // (int(before or 1) * size)
            coords[k] -= coords[k] // stride % size * stride
        same = np.ravel_multi_index(tuple(coords), shape)
        return [ids[same == key].tolist() for key in np.unique(same)]
    if "replica_groups=" in code and not re.search(r"replica_groups=\{[{}]", code):
        raise ValueError(f"replica_groups in an unknown form: {code}")
    return _lists(code, "replica_groups") or [list(range(devices))]  # {} stands for all devices


def _lists(code: str, attribute: str) -> list[list[int]]:
    """Returns `attribute={{0,1},{2,3}}` as lists."""
    found = re.search(attribute + r"=\{((?:\{[\d,]*\},?)*)\}", code)
    return [ints(group) for group in re.findall(r"\{([\d,]*)\}", found[1])] if found else []


def _iota(text: str) -> np.ndarray:
    """Returns the numbers of `[4,2]T(1,0)` (0 to 7 as 4x2, transposed, flat), or those of `3,1,0,2`."""
    form = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not form:
        return np.array(ints(text))
    shape = ints(form[1])
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid.transpose(ints(form[2])) if form[2] else grid).ravel()


def crossed(groups: Iterable[list[int]], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes that groups span, in mesh order; device i is `mesh.devices.flat[i]`."""
    shape = tuple(mesh.shape.values())
    spans = np.zeros(len(shape), bool)
    for group in groups:
        coords = np.array(np.unravel_index(group, shape))
        spans |= (coords != coords[:, :1]).any(axis=1)
    return tuple(name for name, spanned in zip(mesh.axis_names, spans, strict=True) if spanned)


_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\]")


def arrays(shape: str) -> list[tuple[str, int]]:
    """Returns the arrays of a shape, each as `"f32[2,4]"` and its bytes."""
    return [(f"{dtype}[{dims}]", _size(dtype, dims)) for dtype, dims in _ARRAY.findall(shape)]


def _size(dtype: str, dims: str) -> int:
    bits = re.search(r"\d+", "pred8" if dtype == "pred" else dtype)  # the first number of bf16, f8e4m3fn, c64
    return -(-int(bits[0] if bits else 0) * math.prod(ints(dims.replace("<=", ""))) // 8)


def ints(text: str) -> list[int]:
    """Returns `"1,2"` as numbers."""
    return [int(number) for number in text.split(",") if number]


def pieces(text: str, at: str) -> Iterator[str]:
    """Yields the pieces of `text` between those `at` that are outside of all brackets."""
    depth = begin = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == at and depth == 0:
            yield text[begin:i]
            begin = i + 1
    yield text[begin:]
