"""Before the first step: flags that no data could make right, devices that are not there, early signals."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from recipe_process import ROOT, environment

from shardtrain import UserError, cli
from shardtrain.cli.flags import check
from shardtrain.launch.local import free_port

RECIPE = [sys.executable, str(ROOT / "recipes" / "train_cnn.py"), "--mesh", "data=1", "--steps", "1"]


@dataclass(frozen=True)
class Flags(cli.RunFlags):
    """Of a recipe."""

    mesh: str = "data=1"
    data: str = "digits"
    out: cli.Folder = Path("runs/mine")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "--seed -1: use a number from 0"),
        ({"seed": 2**63}, f"--seed {2**63}: use a number from 0 to {2**63 - 1}"),
        ({"steps": 2**31}, f"--steps {2**31}: use {2**31 - 1} or less"),
        ({"batch_size": 10**20}, "--batch-size 1000"),
        ({"keep": 0}, "--keep 0: use 1 or more"),
    ],
)
def test_numbers_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        check(Flags(**given))


def test_platforms_that_are_not_here(tmp_path):
    done = subprocess.run(
        [*RECIPE, "--out", str(tmp_path / "run")],
        env=environment(JAX_PLATFORMS="nonsense"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: JAX_PLATFORMS=nonsense: jax finds no such devices here (Unable to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's list of open ports")
def test_a_signal_that_asks_for_a_trace_ends_no_run_that_has_not_begun(tmp_path):
    """While it waits for another process, which does not come."""
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process-id", "0"]
    job = subprocess.Popen(
        [*RECIPE, *place, "--start-limit", "4", "--out", str(tmp_path)],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    port = f":{int(place[1].rpartition(':')[2]):04X} "
    while not any(port in Path("/proc/net", table).read_text() for table in ("tcp", "tcp6")):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert b"did not come" in job.communicate()[1]
    assert job.returncode == 76
