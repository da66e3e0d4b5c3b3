"""Functions that a reader can hold: the decisions of a function, those of the functions in it included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 20
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def decisions(function: ast.AST) -> int:
    """One more than the places where a function's way forks: branches, loops, handlers, conditional
    expressions, operands of `and` and `or`, and what comprehensions iterate over and filter by."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.IfExp | ast.For | ast.While | ast.ExceptHandler | ast.match_case):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def outermost(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods that are in no other function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            yield node
        else:
            yield from outermost(node)


def too_complex(folder: Path) -> dict[str, int]:
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for function in outermost(ast.parse(path.read_text())):
            if (count := decisions(function)) > MOST:
                found[f"{path.relative_to(folder.parent)}:{function.lineno} {function.name}"] = count
    return found


@pytest.mark.parametrize("folder", ["shardtrain", "recipes", "tools"])
def test_a_reader_can_hold_every_function(folder):
    assert too_complex(ROOT / folder) == {}


def test_decisions_in_nested_functions_count():
    tree = ast.parse(
        "def f(x):\n    def g(y):\n        return [z for z in y if z and x]\n    return g(x) if x else lambda: x or 1\n"
    )
    assert decisions(tree.body[0]) == 1 + 2 + 1 + 1 + 1
