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
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def regular(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a regular file to read it.

    Raises:
        OSError: if there is no such file, if it cannot be read, or if it is no regular file.

    Example:
        >>> with regular("/dev/zero"):
        ...     pass
        Traceback (most recent call last):
        OSError: [Errno 22] it is no regular file: '/dev/zero'
    """
    no_regular_file = OSError(errno.EINVAL, "it is no regular file", str(path))
    if not stat.S_ISREG(os.stat(path).st_mode):  # a device may act on being opened
        raise no_regular_file
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it has become a pipe meanwhile
            raise no_regular_file
        yield file


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
