"""What must not stand in a branch: a collective that waits for devices which take another branch."""

from collections.abc import Collection, Iterator

from jax.sharding import AbstractMesh, Mesh

from shardtrain import hlo
from shardtrain.errors import UserError


def refuse_divergent(text: str, mesh: Mesh | AbstractMesh, axes: Collection[str] = ("pipe",)) -> None:
    """Raises where a compiled program would wait forever, because devices of other stages never come.

    In a conditional's branches, in loops whose length XLA does not know, and in all that they call, there
    must be

    - no collective-permute: all devices of the program meet in one, also those that send nothing,
    - no collective whose groups span any of `axes`, along which devices take other branches.

    Others may have them if what they ask for is computed of constants and counted turns alone, so that all
    devices do the same.

    Args:
        text: optimized HLO, of any backend.
        mesh: that the program was compiled for.
        axes: along which devices may take other branches.

    Raises:
        UserError: names the instruction and the conditional or loop.

    Example:
        >>> refuse_divergent(step.lower(state, batch).compile().as_text(), mesh)  # doctest: +SKIP
    """
    devices = hlo.devices(text)
    for branch, instruction in in_branches(text):
        name = f"{branch.name!r}{_of(branch)}"
        where, do = (
            (f"a branch of the conditional {name}", "take the branch")
            if branch.op == "conditional"
            else (f"the loop {name}, whose length XLA does not know", "run it as often")
        )
        what = f"{instruction.collective} {instruction.name!r}{_of(instruction)}"
        if instruction.collective == "collective-permute":
            reason = "all devices must meet in it"
        else:
            crossed = hlo.crossed(hlo.groups(instruction, devices), mesh)
            shared = [axis for axis in crossed if axis in axes]
            if not shared:
                continue
            reason = f"its groups span {','.join(shared)}"
        raise UserError(
            f"the compiled program has the {what} in {where}: {reason}, but only some devices {do}, and "
            f"they would wait forever; use psum, all_gather or another collective of groups that stay inside "
            f"a stage"
        )


def in_branches(text: str) -> Iterator[tuple[hlo.Instruction, hlo.Instruction]]:
    """Every collective that only some devices may run, after the conditional or loop that it is in."""
    entry, computations = hlo.parse(text)
    same = _Same(computations)
    seen: set[tuple[str, bool]] = set()
    todo: list[tuple[str, hlo.Instruction | None]] = [(entry, None)]
    while todo:
        name, branch = todo.pop()
        if (name, branch is not None) in seen or name not in computations:
            continue
        seen.add((name, branch is not None))
        for instruction in computations[name]:
            if branch is not None and instruction.collective:
                yield branch, instruction
            inner = branch
            if branch is None and instruction.divergent and not same.everywhere(name, instruction):
                inner = instruction
            todo += [(call.name, inner) for call in instruction.calls]


Value = tuple[str, str, int | None]
"""A computation, an instruction of it, and which element of its tuple, None for all."""


class _Same:
    """Which values are the same on all devices: those that depend on constants and loops of them alone."""

    def __init__(self, computations: hlo.Computations) -> None:
        self.computations = computations
        self.by_name = {name: {i.name: i for i in body} for name, body in computations.items()}
        self.loops: dict[str, list[tuple[str, hlo.Instruction]]] = {}
        """The loops that run a computation, and the computations they are in."""
        for name, body in computations.items():
            for instruction in body:
                if instruction.op == "while":
                    for call in instruction.calls:
                        self.loops.setdefault(call.name, []).append((name, instruction))

    def everywhere(self, computation: str, branch: hlo.Instruction) -> bool:
        """Whether all devices take the same branch of a conditional, or leave a loop after as many turns."""
        todo: list[Value] = [
            (computation, branch.operands[0], None)
            if branch.op == "conditional"
            else self._root(branch.called("condition"), None)
        ]
        seen = set(todo)
        for value in todo:
            needed = self._needed(value)
            if needed is None:
                return False
            todo += [v for v in needed if v not in seen]
            seen |= set(needed)
        return True

    def _needed(self, value: Value) -> list[Value] | None:
        """What a value is made of; None where that may differ between devices."""
        computation, name, index = value
        instruction = self.by_name[computation][name]
        operands = instruction.operands
        if instruction.op == "get-tuple-element":
            return [(computation, operands[0], hlo.index(instruction))]
        if instruction.op == "tuple" and index is not None:
            return [(computation, operands[index], None)]
        if instruction.op == "while":
            return self._carried(computation, instruction, index)
        if instruction.op == "parameter":
            loops = self.loops.get(computation, [])
            return [v for where, loop in loops for v in self._carried(where, loop, index)] or None
        if instruction.op in ("constant", "iota"):
            return []
        if not self._pure(instruction):
            return None
        return [(computation, operand, None) for operand in operands]

    def _pure(self, instruction: hlo.Instruction) -> bool:
        inner = [i for call in instruction.calls for i in self.computations[call.name]]
        return instruction.op in _PURE and all(map(self._pure, inner))

    def _carried(self, computation: str, loop: hlo.Instruction, index: int | None) -> list[Value]:
        """What a value that a loop carries is made of."""
        return [
            (computation, loop.operands[0], index),
            self._root(loop.called("body"), index),
            self._root(loop.called("condition"), None),
        ]

    def _root(self, computation: str, index: int | None) -> Value:
        return computation, hlo.root(self.computations[computation]).name, index


# fmt: off
_PURE = frozenset(
    {
        "add", "and", "bitcast", "broadcast", "call", "clamp", "compare", "constant", "convert", "copy",
        "dynamic-slice", "fusion", "get-tuple-element", "iota", "maximum", "minimum", "multiply", "negate",
        "not", "or", "parameter", "reduce", "reshape", "select", "slice", "subtract", "transpose",
        "tuple", "xor",
    }
)
# fmt: on
"""Operations that give the same where their operands are the same."""


def _of(instruction: hlo.Instruction) -> str:
    return f" ({instruction.source})" if instruction.source else ""
