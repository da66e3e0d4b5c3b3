"""The manifest of a checkpoint: which run wrote it, with which versions, and the checksums of its files.

Orbax renames a checkpoint into its place when it is complete, so a killed process leaves the earlier ones as
they were. It does not notice files that were truncated or changed afterwards (by a power failure, an
incomplete copy, a bad disk), because tensorstore checks its index and not the arrays. Therefore the manifest
has the length and the CRC-32 of each file, which are compared before anything is restored. CRC-32 protects
against accidents and not against attackers; it comes with Python, releases its lock, and reads more than 1
GB/s on one core.

A checkpoint may come from elsewhere. Names in a manifest are therefore those of regular files in its folder,
and their lengths are compared before they are read.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from shardtrain.files import parsed, regular, whole

NAME = "manifest.json"
"""File name of the manifest in the folder of a checkpoint."""

MOST_BYTES = 1 << 28
"""A longer manifest is none: it would name millions of files."""


def seal(folder: Path, entries: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint: `entries`, and length and checksum of every file in `folder`.

    Args:
        folder: folder of a checkpoint whose other files are complete.
        entries: values that JSON can represent.
    """
    files = {name: _length_and_crc(path) for name, path in _files(folder).items()}
    said = json.loads(json.dumps({**entries, "files": files}))  # as it is after reading
    text = json.dumps({**said, "crc32": _own_crc(said)}, indent=1) + "\n"
    (folder / NAME).write_text(text)


def read(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
        ValueError: if there is none, or if it is damaged.
    """
    try:
        found = parsed(whole(folder / NAME, MOST_BYTES))
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except OSError as error:
        raise ValueError(f"{NAME} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{NAME} cannot be read ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ValueError(f"{NAME} is no manifest")
    if found.pop("crc32", None) != _own_crc(found):
        raise ValueError(f"{NAME} is not as it was written")
    if not all(isinstance(found.get(name, {}), dict) for name in ("versions", "metrics")):
        raise ValueError(f"{NAME} is no manifest")
    return found


def verify(folder: Path, found: Mapping[str, Any], share: slice = slice(None)) -> None:
    """Reads the files of a checkpoint and compares them with its manifest.

    Args:
        folder: folder of the checkpoint.
        found: its manifest.
        share: which of its files to read; processes that share the work take `slice(rank, None, count)`.

    Raises:
        ValueError: if a file is missing, not as it was written, or none of this checkpoint; names the file.
    """
    _refuse_irregular(folder)
    for name, entry in sorted(found["files"].items())[share]:
        path = _inside(folder, name)
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)):
            raise ValueError(f"{NAME} has no length and checksum of {name!r}")
        size, crc = entry
        try:
            with regular(path) as file:
                if (length := os.fstat(file.fileno()).st_size) != size:
                    raise ValueError(f"{name} has {length:,} of {size:,} bytes")
                if _crc(file, size) != crc:
                    raise ValueError(f"{name} is not as it was written")
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from error


def _inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a checkpoint; refuses names and links that lead out of it."""
    parts = PurePosixPath(name).parts
    path = folder / name
    good = parts and ".." not in parts and not PurePosixPath(name).is_absolute() and "\0" not in name
    if not (good and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))):
        raise ValueError(f"{NAME} names {name!r}, which is no file of this checkpoint")
    return path


def _refuse_irregular(folder: Path) -> None:
    """Refuses pipes, devices and sockets in a checkpoint, also those that its manifest does not name."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if path.exists() and not path.is_file():
                raise ValueError(f"{path.relative_to(folder).as_posix()} is no regular file")


def _files(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != NAME}


def _length_and_crc(path: Path) -> list[int]:
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        return [length, _crc(file, length)]


def _crc(file: BinaryIO, length: int) -> int:
    crc = 0
    while length > 0 and (piece := file.read(min(length, 1 << 22))):
        crc, length = zlib.crc32(piece, crc), length - len(piece)
    return crc


def _own_crc(entries: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entries, sort_keys=True).encode())
