"""Reads files that others may have written: regular files of a sane size only. No jax.

A name may stand for a pipe, which blocks, or for a device, which never ends. What is read is therefore looked
at first, and no more is read than was allowed.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from shardtrain.errors import UserError


@contextmanager
def regular(path: str | Path) -> Iterator[BufferedReader]:
    """Opens a regular file to read it.

    Raises:
        OSError: if there is no such file, if it cannot be read, or if it is no regular file.

    Example:
        >>> with regular("/dev/zero"):
        ...     pass
        Traceback (most recent call last):
        OSError: [Errno 22] it is no regular file: '/dev/zero'
    """
    _refuse_irregular(path, os.stat(path).st_mode)  # before it is opened: a device may act on that
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)  # it may have become a pipe meanwhile
        yield file


def _refuse_irregular(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def whole(path: str | Path, most: int) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: if it cannot be read, if it is no regular file, or if it has more than `most` bytes.
    """
    with regular(path) as file:
        content = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if content is None or len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def expanded(path: str | Path) -> Path:
    """Returns a path in which `~` and `~name` are the folders of users.

    Raises:
        UserError: if there is no such user, for whom pathlib would raise a `RuntimeError`.

    Example:
        >>> expanded("~no such user/runs")
        Traceback (most recent call last):
        shardtrain.errors.UserError: ~no such user/runs: there is no such user; write the whole path
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{path}: there is no such user; write the whole path")
    return Path(found)


def parsed(text: str | bytes) -> Any:
    """Returns what a JSON text says.

    Raises:
        ValueError: if the text is no JSON, or is nested more deeply than any file of ours.

    Example:
        >>> parsed(100_000 * "[")
        Traceback (most recent call last):
        ValueError: it is nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
