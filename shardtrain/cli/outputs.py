"""What the command line writes: only files that are new or its own, and only characters that can be seen."""

import os
import tempfile
from pathlib import Path

from shardtrain.errors import UserError
from shardtrain.files import regular

BEGINNING_BYTES = 4096
"""How much of a file is looked at to know whether it is one of ours."""


def printable(text: str, keep: str = "") -> str:
    r"""Returns a text in which characters that cannot be seen, such as those that move a cursor, are escapes.

    Args:
        text: of whatever origin, such as the name of a folder.
        keep: characters that stay as they are.

    Example:
        >>> print(printable("red: \x1b[31m"))
        red: \x1b[31m
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def refuse_foreign(flag: str, path: Path, mark: bytes) -> None:
    """Refuses to write to a file that is there and that this command has not written.

    Args:
        flag: that names the file, such as `"--out"`.
        path: of the file.
        mark: what the beginning of each file has that this command writes.

    Raises:
        UserError: if there is another file, or if it cannot be looked at.
    """
    if not os.path.lexists(path):
        return
    try:
        with regular(path) as file:
            ours = mark in file.read(BEGINNING_BYTES)
    except OSError as error:
        what = "is a folder" if path.is_dir() else f"cannot be replaced ({error.strerror})"
        raise UserError(f"{flag} {path} {what}; name a new file") from error
    if not ours:
        raise UserError(
            f"{flag} {path} is there and is not one that this command wrote; name a new file, or remove it"
        )


def write_new(flag: str, path: Path, text: str, mark: str) -> bool:
    """Writes a text to a file that is new or ours; the file is replaced when the new one is complete.

    Args:
        flag: that names the file.
        path: of the file; its folder is made.
        text: of the file.
        mark: what the beginning of each such file has.

    Returns:
        Whether it replaced another text.

    Raises:
        UserError: if there is another file, or if the file cannot be written.
    """
    refuse_foreign(flag, path, mark.encode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = path.read_text(errors="replace") if path.exists() else text
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name[:100]}.", delete=False
        ) as part:
            part.write(text)
        os.chmod(part.name, 0o666 & ~_umask())
        os.replace(part.name, path)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}); name another file") from error
    return earlier != text


def _umask() -> int:
    before = os.umask(0o077)
    os.umask(before)
    return before
