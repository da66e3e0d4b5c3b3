"""What the documentation tells a reader to type is there: commands, their flags, files and names in the code."""

import dataclasses
import importlib.util
import re
import shlex
import sys
import typing

import pytest
import tyro

from docs.examples import ROOT, blocks
from docs.test_blocks import PAGES, named
from shardtrain import cli
from shardtrain.cli import command

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CODE = [ROOT, ROOT / "shardtrain", ROOT / "shardtrain/kernels", ROOT / "shardtrain/pipeline"]
"""Where a page may begin a path."""
OTHERS = {"apt-get", "kubectl", "pip", "srun", "mpirun", "sbatch"}
"""Commands that are not ours, and starters of ours."""
FOREIGN = {"--directory", "--signal", "--no-install-recommends", "--xla_gpu_enable_triton_gemm"}
"""Flags of other commands that prose names."""


def commands(text):
    """The words of every command of a page's shell blocks."""
    lines = [line for _, body in blocks(text, "sh") for line in re.sub(r"\\\n\s*", " ", body).splitlines()]
    each = [part for line in lines for part in line.split("&&")]
    return [words for part in each if (words := shlex.split(part, comments=True))]


PAGES_WITH_COMMANDS = [path for path in PAGES if commands(path.read_text())]


@pytest.fixture(scope="module")
def flags_of():
    """The class of flags of every recipe, by the recipe's file name."""
    found = {}
    for path in RECIPES:
        spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
        # tyro reads the flags' docstrings from their module's file.
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.name] = module.Flags
    return found


def check(words, flags_of):
    """Raises for a command that is not there, or that does not take these flags."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    name, *rest = words
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in rest), words
    elif name == "shardtrain":
        check_tool(rest, flags_of)
    elif name.endswith("python"):
        check_python(rest, flags_of)
    else:
        assert name in OTHERS, words
        at = next((i for i, word in enumerate(rest) if word in ("shardtrain", "python")), None)
        if at is not None:
            check(rest[at:], flags_of)


def check_tool(words, flags_of):
    end = words.index("--") if "--" in words else len(words)
    with tyro_says():
        tyro.cli(
            command.Command,
            args=words[:end],
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
    if words[end + 1 :] not in ([], ["python", "..."]):
        check(words[end + 1 :], flags_of)


def check_python(words, flags_of):
    if words[0] == "-m":
        assert words[1] == "pytest"
        assert all((ROOT / word).exists() for word in words[2:] if word.startswith("tests"))
        return
    script, *flags = words
    if script.startswith("recipes/"):
        with tyro_says():
            tyro.cli(flags_of[script.removeprefix("recipes/")], args=flags)
    elif "/" in script:
        text = (ROOT / script).read_text()
        for flag in (word for word in flags if word.startswith("--") and word != "--"):
            field = rf"^    {flag[2:].replace('-', '_')}: "
            assert f'"{flag}"' in text or re.search(field, text, re.MULTILINE), f"{script} has no {flag}"


class tyro_says:  # noqa: N801
    """Turns tyro's exit into a failure."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is not SystemExit, "the flags are refused; see the captured output"


@pytest.mark.parametrize("path", PAGES_WITH_COMMANDS, ids=named)
def test_commands_are_there(path, flags_of):
    for words in commands(path.read_text()):
        check(words, flags_of)


def fields(kind):
    """The names of all flags of a dataclass, or of subcommands that are dataclasses."""
    if dataclasses.is_dataclass(kind):
        names = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)}
        return names.union(*(fields(field.type) for field in dataclasses.fields(kind)))
    return set().union(*map(fields, typing.get_args(kind)))


def test_flags_in_prose_are_there(flags_of):
    known = set().union(FOREIGN, fields(command.Command), *map(fields, flags_of.values()))
    for tool in (ROOT / "tools").glob("*.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', tool.read_text()))
    known |= {"--help", "--submit", "-m"}
    missing = {}
    for path in PAGES:
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        said = {
            flag
            for code in re.findall(r"`([^`\n]+)`", prose)
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        }
        if said - known:
            missing[named(path)] = said - known
    assert missing == {}


def found(path):
    """Whether there is such a file or folder where pages begin a path."""
    return any((root / path).exists() for root in CODE)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_files_and_names_of_the_code_are_there(path):
    if path.name == "CHANGELOG.md":
        pytest.skip("it tells of the past")
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    paths = re.findall(r"`((?:[\w.]+/)+(?:[\w.]+\.\w+)?|(?:[\w.]+/)*\w+\.py)`", text)
    written = re.compile(r"NAME|^runs/|^checkpoints/$|^tensorboard/$|^profile/$|^site/|^aside/$|^data/$")
    missing = [
        name for name in paths if not written.search(name) and not found(name) and not inside(path, name)
    ]
    for name, listed in re.findall(r"`([\w/]+\.py)` \(((?:`\w+`(?:, )?)+)\)", text):
        code = (
            next((root / name).read_text() for root in CODE if (root / name).exists()) if found(name) else ""
        )
        missing += [f"{name}: {word}" for word in re.findall(r"`(\w+)`", listed) if word not in code]
    assert missing == []


def inside(page, name):
    """Whether a page of one room means a file of that room."""
    rooms = {"kernels.md": ["matmul", "winograd", "winograd/.."]}.get(page.name, [])
    near = [ROOT / "recipes", ROOT / "tests", *(ROOT / "shardtrain/kernels" / room for room in rooms)]
    near += [ROOT / "shardtrain/pipeline/localize/rules"]
    return any((folder / name).exists() for folder in near)


def test_a_flag_that_is_not_there_is_seen(flags_of):
    with pytest.raises(AssertionError):
        check(["python", "recipes/train_cnn.py", "--mash", "data=2"], flags_of)
    with pytest.raises(AssertionError):
        check(["python", "tools/bench_conv.py", "--mark"], flags_of)
    with pytest.raises(AssertionError):
        check(["shardtrain", "launch", "local", "-m", "4"], flags_of)
    with pytest.raises(AssertionError):
        check(["make", "trian"], flags_of)


def test_every_recipe_is_in_a_guide():
    text = "".join(path.read_text() for path in PAGES)
    assert [path.name for path in RECIPES if f"`{path.name}`" not in text] == []
    assert cli.RunFlags
