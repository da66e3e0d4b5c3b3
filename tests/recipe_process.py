"""A recipe as a user runs it, in a process of its own; but it is compiled in haste, as all that tests compile."""

import os
import re
import subprocess
import sys
from pathlib import Path

from shardtrain import compat

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"

OTHERS = ("JAX_", "XLA_", "SLURM_", "OMPI_", "SHARDTRAIN_")

IN_HASTE = " ".join(f"--{name}={str(value).lower()}" for name, value in compat.IN_HASTE.items())
"""XLA's flags for tests, which compile much and compute little."""


def environment(**more):
    """The environment of a process that a test starts: nothing of the test's jax, nor of a scheduler's job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": IN_HASTE} | more


def run(recipe, *flags):
    command = [sys.executable, str(ROOT / "recipes" / recipe), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)


def gaps(done):
    """The relative differences of the table that --compare prints."""
    return [float(gap) for gap in re.findall(r"│\s+(\d\.\de[-+]\d\d) │", done.stdout)]


def check_refused(done, message, out):
    """One sentence with `message`, exit status 2, and nothing written."""
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not out.exists()
