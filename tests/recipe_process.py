"""A recipe as a user runs it, in a process of its own; but it is compiled in haste, as all that tests compile."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from shardtrain import compat

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"

OTHERS = ("JAX_", "XLA_", "SLURM_", "OMPI_", "SHARDTRAIN_")


def _flags(options):
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


IN_HASTE = _flags(compat.IN_HASTE)
"""XLA's flags for tests, which compile much and compute little."""

FOR_RUNS = _flags(compat.IN_HASTE | {"xla_backend_optimization_level": 1})
"""XLA's flags for whole runs, which compute for longer than they compile."""

if "SHARDTRAIN_TEST_CACHE" not in os.environ:
    os.environ["SHARDTRAIN_TEST_CACHE"] = tempfile.mkdtemp(prefix="shardtrain-")
CACHE = os.environ["SHARDTRAIN_TEST_CACHE"]
"""Folder of the programs that were compiled in this session, for all of its processes."""

KEPT_SECONDS = 0.3
"""Programs that take longer than this to compile are kept."""


def environment(**more):
    """The environment of a process that a test starts: nothing of the test's jax, nor of a scheduler's job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(KEPT_SECONDS),
    }
    return kept | cache | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FOR_RUNS} | more


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["shardtrain.cli", "sklearn.datasets", "sklearn.model_selection", "matplotlib.pyplot", "tensorboardX"]
)


def _recipe(path, flags, streams):
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY), number)
    os.chdir(ROOT)
    os.environ["XLA_FLAGS"] = FOR_RUNS
    sys.argv = [str(path), *flags]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def run(recipe, *flags):
    """What a recipe says and returns; its process is the fork of one that has imported what all import."""
    path, flags = ROOT / "recipes" / recipe, [*map(str, flags)]
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = _FORKS.Process(target=_recipe, args=(path, flags, (out.name, err.name)))
        with mock.patch.dict(os.environ, environment(), clear=True):
            process.start()
        process.join()
        texts = [Path(stream.name).read_text() for stream in (out, err)]
    return subprocess.CompletedProcess([path, *flags], process.exitcode, *texts)


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
