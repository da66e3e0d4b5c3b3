"""Finds the versions of Python and of packages, and the git revision of the running program."""

import contextlib
import functools
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

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
