"""Finds the versions of Python and of packages, and the git revision of the running program."""

import contextlib
import functools
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RUN_PACKAGES = ("shardtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run depends on."""
    return {"python": platform.python_version()} | installed(RUN_PACKAGES)


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def newer(
    there: Mapping[str, Any], packages: Sequence[str] = ("shardtrain", "jax", "orbax-checkpoint")
) -> str:
    """Returns a clause that names the packages of a file's writer that are newer than those here.

    Args:
        there: versions of packages, as the file says.
        packages: those that may make a difference.

    Returns:
        The clause; empty if none is newer.

    Example:
        >>> newer({"shardtrain": "999.0"})
        'it was written by shardtrain 999.0, which is newer than 0.1.0 here'
    """
    here = versions()
    found = [
        f"{name} {version}, which is newer than {here[name]} here"
        for name in packages
        if isinstance(version := there.get(name), str)
        and name in here
        and version.isprintable()
        and _release(version) > _release(here[name])
    ]
    return f"it was written by {' and by '.join(found)}" if found else ""


def _release(version: str) -> list[int]:
    """Returns the numbers of a version: `[0, 12, 1]` for `0.12.1.dev3`, without zeros at the end."""
    numbers = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    found = [int(number) for number in numbers[0].split(".")] if numbers else []
    while found and not found[-1]:
        found.pop()
    return found


def revision(folder: Path | None = None) -> str | None:
    """Returns the git revision of the program, with `-dirty` if files were changed since.

    Args:
        folder: a folder in the repository; by default that of the script that Python was started with.

    Returns:
        The revision; None outside of a repository.

    Example:
        >>> revision(tmp) is None
        True
    """
    where = folder or Path(sys.argv[0]).resolve().parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
