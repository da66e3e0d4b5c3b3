"""The order of the rooms: a module imports from the floors below its own, never from one above."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import shardtrain

ROOT = Path(shardtrain.__file__).parent
FLOORS = [
    "errors",
    "files",
    "interrupts",
    "versions",
    "hlo",
    "compat",
    "jaxprs",
    "mesh",
    "layout",
    "data",
    "guard",
    "kernels",
    "launch",
    "ops",
    "metrics",
    "nn",
    "pipeline",
    "checkpoint",
    "train",
    "plan",
    "experiments",
    "api",
    "cli",
    "__main__",
]
SUB_ROOMS = {
    "pipeline": ["schedules", "localize", "cut", "runtime"],
    "train": ["callbacks", "pipelined"],
}
"""Rooms within a room, from the ground up; modules beside them stand wherever the absence of circles lets them."""
WITHOUT_JAX = [
    "pipeline/schedules",
    "guard/protocol.py",
    "guard/token.py",
    "errors.py",
    "interrupts.py",
    "versions.py",
]


def modules() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def imports(path: Path, *, running: bool = False) -> set[str]:
    """Dotted names that a module imports from the package, wherever in the file, without `shardtrain.`.

    With `running`, only those that run when the module is imported: not in a function, not for type checkers.
    """
    found = set()
    for node in walk(ast.parse(path.read_text()), running):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "shardtrain":
            inside = node.module.removeprefix("shardtrain").lstrip(".")
            found |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("shardtrain.") for a in node.names if a.name.startswith("shardtrain.")
            }
    return found


def walk(node: ast.AST, running: bool):
    yield node
    if running and isinstance(node, ast.FunctionDef):
        return
    if running and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    for child in ast.iter_child_nodes(node):
        yield from walk(child, running)


def wrong(path: Path) -> list[str]:
    room, *inner = path.relative_to(ROOT).with_suffix("").parts
    bad = []
    for name in imports(path):
        other, *rest = name.split(".")
        if FLOORS.index(other) > FLOORS.index(room):
            bad.append(other)
        order = SUB_ROOMS.get(room, []) if other == room else []
        ranked = inner and rest and {inner[0], rest[0]} <= set(order)
        if ranked and order.index(rest[0]) > order.index(inner[0]):
            bad.append(".".join((other, rest[0])))
    return bad


def file_of(name: str) -> Path | None:
    """The module that a dotted name is, or is in."""
    parts = name.split(".")
    for count in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:count])
        if count and path.with_suffix(".py").exists():
            return path.with_suffix(".py")
        if count and (path / "__init__.py").exists():
            return path / "__init__.py"
    return None


def graph(root: Path) -> dict[Path, set[Path]]:
    """Every module and those that it needs while it is imported itself."""
    return {
        path: {other for name in imports(path) if (other := file_of(name)) and other != path}
        for path in root.rglob("*.py")
        if path != root / "__init__.py"
    }


def test_imports_go_down_only():
    assert len(modules()) > 150
    assert {str(path): bad for path in modules() if (bad := wrong(path))} == {}


def test_an_import_upward_is_seen(tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    bad = tmp_path / "ops" / "conv.py"
    bad.write_text("def f():\n    from shardtrain.train.loop import run\n")
    (tmp_path / "pipeline" / "cut").mkdir(parents=True)
    within = tmp_path / "pipeline" / "cut" / "graph.py"
    within.write_text("from shardtrain.pipeline.runtime.tick_loop import TickLoop\n")
    monkeypatch.setattr("test_rooms.ROOT", tmp_path)
    assert wrong(bad) == ["train"]
    assert wrong(within) == ["pipeline.runtime"]


def test_no_module_needs_itself():
    """There is no circle, not even one that only a type checker or a late import closes."""
    assert len(list(TopologicalSorter(graph(ROOT)).static_order())) > 150


def test_schedules_are_numbers_only():
    for room in WITHOUT_JAX:
        for path in [ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"):
            names = [
                alias.name if isinstance(node, ast.Import) else node.module or ""
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            ]
            assert not [name for name in names if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax")], (
                path
            )


def test_every_room_says_what_it_holds():
    for folder in {path.parent for path in modules()}:
        if folder.name != "tables":
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
