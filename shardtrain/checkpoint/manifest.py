"""The manifest of a checkpoint: which run wrote it, with which versions, and the checksums of its files.

Orbax renames a checkpoint into its place when it is complete, so a killed process leaves the earlier ones as
they were. It does not notice files that were truncated or changed afterwards (by a power failure, an
incomplete copy, a bad disk), because tensorstore checks its index and not the arrays. Therefore the manifest
has the length and the CRC-32 of each file, which are compared before anything is restored. CRC-32 protects
against accidents and not against attackers; it comes with Python, releases its lock, and reads more than 1
GB/s on one core.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
"""File name of the manifest in the folder of a checkpoint."""


def seal(folder: Path, entries: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint: `entries`, and length and checksum of every file in `folder`.

    Args:
        folder: folder of a checkpoint whose other files are complete.
        entries: values that JSON can represent.
    """
    files = {name: [path.stat().st_size, _crc(path)] for name, path in _files(folder).items()}
    whole = json.loads(json.dumps({**entries, "files": files}))  # as it is after reading
    text = json.dumps({**whole, "crc32": _own_crc(whole)}, indent=1) + "\n"
    (folder / NAME).write_text(text)


def read(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
        ValueError: if there is none, or if it is damaged.
    """
    try:
        found = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{NAME} cannot be read ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ValueError(f"{NAME} is no manifest")
    if found.pop("crc32", None) != _own_crc(found):
        raise ValueError(f"{NAME} is not as it was written")
    return found


def verify(folder: Path, found: Mapping[str, Any], share: slice = slice(None)) -> None:
    """Reads the files of a checkpoint and compares them with its manifest.

    Args:
        folder: folder of the checkpoint.
        found: its manifest.
        share: which of its files to read; processes that share the work take `slice(rank, None, count)`.

    Raises:
        ValueError: if a file is missing or not as it was written; names the file.
    """
    for name, (size, crc) in sorted(found["files"].items())[share]:
        path = folder / name
        try:
            if (length := path.stat().st_size) != size:
                raise ValueError(f"{name} has {length:,} of {size:,} bytes")
            if _crc(path) != crc:
                raise ValueError(f"{name} is not as it was written")
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from error


def _files(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != NAME}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc


def _own_crc(entries: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entries, sort_keys=True).encode())
