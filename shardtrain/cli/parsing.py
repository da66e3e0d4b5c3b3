"""Parses command lines by tyro, whose errors become one sentence that names the flag as it is typed."""

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from typing import Any

import tyro

from shardtrain.errors import UserError
from shardtrain.mesh import AXES

WORDS = {"INT": "a whole number", "FLOAT": "a number", "None": "None"}
"""What tyro calls the kinds of values."""

FLAG, VALUE = r"(?P<flag>\S+)", "'(?P<value>.*?)'"

SENTENCES = {
    rf"Error parsing {FLAG}: invalid literal for int\(\) .*: {VALUE}": "{flag} {value}: write a whole number",
    rf"Error parsing {FLAG}: could not convert string to float: {VALUE}": "{flag} {value}: write a number",
    rf"Error parsing {FLAG}: no type matching (?P<kinds>\S+) could be .* from \[{VALUE}\].*": (
        "{flag} {value}: write {kinds}"
    ),
    rf"invalid choice {VALUE} for argument '{FLAG}'\. Expected one of \((?P<choices>.*?),?\)\.": (
        "{flag} {value}: there is {choices}"
    ),
    rf"Missing value for argument '{FLAG}'.*": "{flag}: write a value behind it",
    r"Unrecognized (or misplaced )?options: (?P<unknown>.*)": "{unknown}: there is no such flag or value",
    r"Expected one of \{(?P<value>.*)\}\.?": "there is no subcommand; write {value}",
    r"Missing from .*?: (?P<flag>\S+) .*": "{flag} is missing",
}
"""What tyro says, and what we say instead; other texts of it stay as they are."""


def parse(kind: Any, args: Sequence[str] | None = None, **more: Any) -> Any:
    """Returns what a command line says.

    Args:
        kind: a dataclass whose fields are the flags, or a union of them.
        args: the words of the command line, by default those of the process.
        more: arguments of `tyro.cli`.

    Raises:
        UserError: if a flag is unknown or missing, or if its value is of another kind.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, args=args, **more)
    except SystemExit as end:
        if end.code != UserError.status or not said.getvalue():
            print(said.getvalue(), end="", file=sys.stderr)
            raise
        words = sys.argv[1:] if args is None else args
        raise UserError(f"{sentence(said.getvalue(), words)}; --help lists what there is") from None


def sentence(box: str, words: Sequence[str]) -> str:
    """Returns in one sentence what tyro says in a box of lines about the words of a command line.

    Example:
        >>> box = '''╭─ Value error ─╮
        ... │ Error parsing --steps: invalid literal for int() with base 10: 'x' │
        ... │ ─────────────── │
        ... │ Argument helptext: │'''
        >>> sentence(box, ["--steps", "x"])
        '--steps x: write a whole number'
    """
    plain = re.sub("\x1b" + r"\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯ ") for line in plain.splitlines()[1:]]  # behind the title
    parts = re.split("^[─-]{3,}$", "\n".join(lines), flags=re.MULTILINE)
    text = " ".join(next(filter(str.strip, parts), "").split())
    for pattern, ours in SENTENCES.items():
        if found := re.fullmatch(pattern, text):
            named = found.groupdict()
            named["kinds"] = " or ".join(_kind(name) for name in (named.get("kinds") or "").split("|")[::-1])
            names = (named.get("flag") or "").split("/")  # of a flag with a short form
            named["flag"] = next((name for name in names if name in words), names[-1])
            unknown = re.split(" Arguments are applied", named.get("unknown") or "")[0]
            named["unknown"] = re.sub(r" \(applied to .*?\)|,", "", unknown)
            named["choices"] = ", ".join(re.findall(r"'(.*?)'", named.get("choices") or ""))
            return ours.format(**named)
    return text.rstrip(".")


def as_typed(text: str, flags: Any) -> str:
    """Returns a message in which `clip_norm=-1.0`, a flag's name and a value, is `--clip-norm -1.0`.

    Messages of the library name arguments of Python, which a user of the command line has not typed. What is
    in quotes stays as it is, and so do axes of a mesh, such as `data=2`.

    Args:
        text: the message.
        flags: a dataclass whose fields are the flags.
    """
    for name in {field.name for field in fields(flags)} - set(AXES):
        text = re.sub(rf"(?<![\w.'\"-]){name}=(?=[^\s=])", f"--{name.replace('_', '-')} ", text)
    return text


def _kind(name: str) -> str:
    return WORDS.get(name.strip("{}"), name)
