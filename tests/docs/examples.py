"""Runs the code of pages and docstrings in one process, and writes down what failed.

    python tests/docs/examples.py RESULTS.json README.md shardtrain/mesh.py ...

A page's ```python blocks share a namespace, in their order, and begin with nothing in it. A module's examples see the
module, the names that every reader of the documentation has (jax, jnp, np, nnx, optax, st, cli, P and Path) and `tmp`, an
empty folder. The process is a fresh one because docstrings print what float32 prints, and tests compute in float64.
"""

import ast
import contextlib
import doctest
import importlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)


def blocks(text, *languages):
    """Fenced blocks of these languages: the line of their first line, and their text without the indentation."""
    found = []
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        if language in languages:
            line = text.count("\n", 0, match.start()) + 2
            found.append((line, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)))
    return found


def docstrings(path):
    """Names and docstrings of a module and of all that is defined in it, those with an example."""
    found = []

    def visit(node, name):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ">>>" in (
            ast.get_docstring(node) or ""
        ):
            found.append((name, ast.get_docstring(node), getattr(node, "lineno", 0)))
        for child in ast.iter_child_nodes(node):
            visit(child, ".".join(filter(None, (name, getattr(child, "name", "")))))

    visit(ast.parse(path.read_text()), "")
    return found


FRACTION = re.compile(r"-?\d+\.\d*(?:e[-+]?\d+)?")


class Checker(doctest.OutputChecker):
    """Compares output where an example gives any, fractions to six digits: compilers round differently."""

    def check_output(self, want, got, optionflags):
        want, got = (FRACTION.sub(lambda number: f"{float(number[0]):.5e}", text) for text in (want, got))
        return not want or super().check_output(want, got, optionflags)


def of_module(name):
    """The failures of a module's examples."""
    import flax.nnx
    import jax
    import numpy
    import optax

    import shardtrain
    from shardtrain import cli

    standard = {
        "jax": jax,
        "jnp": jax.numpy,
        "np": numpy,
        "nnx": flax.nnx,
        "optax": optax,
        "st": shardtrain,
        "cli": cli,
        "P": jax.sharding.PartitionSpec,
        "Path": Path,
    }
    parts = Path(name).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failures = []
    for where, docstring, line in docstrings(ROOT / name):
        report = io.StringIO()
        runner = doctest.DocTestRunner(Checker(), verbose=False, optionflags=flags)
        with elsewhere() as folder:
            names = standard | vars(module) | {"tmp": folder}
            test = doctest.DocTestParser().get_doctest(docstring, names, where or name, name, line)
            if runner.run(test, out=report.write).failed:
                failures.append(report.getvalue())
    return failures


def of_page(name):
    """The failure of a page's first block that fails."""
    namespace = {"__name__": "__main__"}
    with elsewhere():
        for line, body in blocks((ROOT / name).read_text(), "python"):
            try:
                exec(compile("\n" * (line - 1) + body, name, "exec"), namespace)
            except BaseException:
                return [traceback.format_exc()]
    return []


@contextlib.contextmanager
def elsewhere():
    """An empty folder to write to, and nothing printed."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def main(results, *names):
    """Runs all, and writes the failures by name."""
    import time

    found, seconds = {}, {}
    for name in names:
        began = time.perf_counter()
        try:
            found[name] = of_module(name) if name.endswith(".py") else of_page(name)
        except Exception:
            found[name] = [traceback.format_exc()]
        seconds[name] = round(time.perf_counter() - began, 2)
    Path(results).write_text(json.dumps({"failures": found, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
