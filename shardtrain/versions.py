"""Versions of Python and of packages, and the git revision of the running program."""

import contextlib
import functools
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("shardtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run is made of."""
    return {"python": platform.python_version()} | installed(PACKAGES)


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def revision(folder: Path | None = None) -> str | None:
    """The git revision of the program, with `-dirty` where files were changed since; None outside of git.

    Args:
        folder: anywhere in the repository; that of the script which Python was started with by default.

    Example:
        >>> revision()  # doctest: +SKIP
        '4f0c6dd0f5e7f4f2a3c8ac1ce1f8d7a1f5f9e1aa-dirty'
    """
    where = folder or Path(sys.argv[0]).resolve().parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
