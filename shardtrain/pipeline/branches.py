"""What must not stand in a branch: a collective that waits for devices which take another branch."""

from collections.abc import Collection, Iterator

from jax.sharding import AbstractMesh, Mesh

from shardtrain import hlo
from shardtrain.errors import UserError


def refuse_divergent(text: str, mesh: Mesh | AbstractMesh, axes: Collection[str] = ("pipe",)) -> None:
    """Raises where a compiled program would wait forever, because devices of other stages never come.

    In a conditional's branches, and in all that they call, there must be

    - no collective-permute: all devices of the program meet in one, also those that send nothing,
    - no collective whose groups span any of `axes`, along which devices take other branches.

    A conditional whose branch is the same on all devices is not told apart, and refused as well.

    Args:
        text: optimized HLO, of any backend.
        mesh: that the program was compiled for.
        axes: along which devices may take other branches.

    Raises:
        UserError: names the instruction and the conditional.

    Example:
        >>> refuse_divergent(step.lower(state, batch).compile().as_text(), mesh)  # doctest: +SKIP
    """
    devices = hlo.devices(text)
    for branch, instruction in in_branches(text):
        where = f"{branch.name!r}{_of(branch)}"
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
            f"the compiled program has the {what} in a branch of the conditional {where}: {reason}, but only "
            f"some devices take the branch, and they would wait forever; use psum, all_gather or another "
            f"collective of groups that stay inside a stage"
        )


def in_branches(text: str) -> Iterator[tuple[hlo.Instruction, hlo.Instruction]]:
    """Every collective that a branch of a conditional runs, however deep, after that conditional."""
    entry, computations = hlo.parse(text)
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
            inner = instruction if branch is None and instruction.op == "conditional" else branch
            todo += [(call.name, inner) for call in instruction.calls]


def _of(instruction: hlo.Instruction) -> str:
    return f" ({instruction.source})" if instruction.source else ""
