"""The order of the rooms: a module imports from the floors below its own, never from one above."""

import ast
from pathlib import Path

import shardtrain

ROOT = Path(shardtrain.__file__).parent
FLOORS = [
    "errors",
    "hlo",
    "compat",
    "mesh",
    "layout",
    "kernels",
    "ops",
    "nn",
    "pipeline",
    "train",
    "plan",
    "launch",
    "cli",
    "__main__",
]


def imports(path: Path) -> set[str]:
    """Names of the rooms that a module imports from, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "shardtrain":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("shardtrain.")}
    return found


def wrong(path: Path) -> list[str]:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return [other for other in imports(path) if FLOORS.index(other) > FLOORS.index(room)]


def test_imports_go_down_only():
    modules = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert len(modules) > 20
    assert {str(path): bad for path in modules if (bad := wrong(path))} == {}


def test_an_import_upward_is_seen(tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    bad = tmp_path / "ops" / "conv.py"
    bad.write_text("def f():\n    from shardtrain.train.loop import run\n")
    monkeypatch.setattr("test_rooms.ROOT", tmp_path)
    assert wrong(bad) == ["train"]


def test_no_module_needs_a_map():
    long = {str(p): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
