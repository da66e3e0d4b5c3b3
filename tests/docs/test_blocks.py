"""What the documentation shows, runs: every block of code of its pages, every example of a docstring."""

import json
import subprocess
import sys

import pytest
from recipe_process import environment

from docs.examples import FENCE, ROOT, Checker, blocks, docstrings

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SLOW = {
    "README.md",  # tests/test_recipe.py runs its code with every change
    "docs/guides/checkpoints.md",
    "docs/guides/command_line.md",
    "docs/guides/communication.md",
    "docs/guides/layouts.md",
    "docs/guides/pipelines.md",
    "docs/guides/training.md",
    "shardtrain/nn/models/classic.py",
    "shardtrain/nn/models/resnet.py",
    "shardtrain/nn/models/unet.py",
    "shardtrain/train/trainer.py",
}
"""What takes more than a few seconds of CPU."""


def named(path):
    return path.relative_to(ROOT).as_posix()


def with_code():
    """Pages and modules that have code to run."""
    pages = [named(path) for path in PAGES if blocks(path.read_text(), "python")]
    modules = [named(path) for path in sorted((ROOT / "shardtrain").rglob("*.py")) if docstrings(path)]
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in (*pages, *modules)]


@pytest.fixture(scope="module")
def failures(request, tmp_path_factory):
    """The failures of all that is to be run here, which one process runs."""
    mine = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["name"] for item in mine if "name" in item.callspec.params]
    results = tmp_path_factory.mktemp("docs") / "results.json"
    command = [sys.executable, ROOT / "tests/docs/examples.py", results, *names]
    done = subprocess.run(
        command, env=environment(JAX_NUM_CPU_DEVICES="8"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())["failures"]


@pytest.mark.parametrize("name", with_code())
def test_its_code_runs(name, failures):
    assert not failures[name], "\n".join(failures[name])


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_block_says_what_it_is(path):
    """A block without a language would be run by nothing and checked by nothing."""
    languages = {match[2] for match in FENCE.finditer(path.read_text())}
    assert languages <= {"python", "sh", "bash", "text"}


def test_what_is_slow_is_there():
    assert [name for name in SLOW if not (ROOT / name).exists()] == []


def test_fractions_are_compared_to_six_digits():
    check = Checker().check_output
    assert check("[1.0986123, 2]\n", "[1.0986121, 2]\n", 0)
    assert not check("[1.09861, 2]\n", "[1.09863, 2]\n", 0)
    assert not check("[1.09861, 2]\n", "[1.09861, 3]\n", 0)


def test_an_example_that_is_wrong_is_seen():
    module = ROOT / "shardtrain/errors.py"
    assert [name for name, *_ in docstrings(module)] == ["first_line", "UserError"]
    page = "```python\nx = 1\n```\n\n- item\n\n    ```python\n    assert x == 2\n    ```\n"
    assert blocks(page, "python") == [(2, "x = 1\n"), (8, "assert x == 2\n")]
