"""Before the first step: flags that no data could make right, devices that are not there, early signals."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from recipe_process import ROOT, environment

from shardtrain import UserError, cli
from shardtrain.cli.flags import check
from shardtrain.cli.start import lock_folder, start_jax
from shardtrain.errors import StartError
from shardtrain.launch.local import free_port


def enter(folder, wait):
    with lock_folder(folder, wait):
        return None


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
        ({"start_limit": 1e9}, r"--start-limit 1e\+09: use seconds above 0, and 86400"),
    ],
)
def test_numbers_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        check(Flags(**given))


def test_no_devices_at_all(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "0")
    with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES=0: set this variable to 1 or more, or unset it"):
        start_jax(None, "data=1", x64=False)


def test_a_run_that_is_started_again_waits_for_the_one_on_its_way_out(tmp_path):
    with ThreadPoolExecutor(1) as elsewhere, lock_folder(tmp_path, wait=0.0):
        with pytest.raises(StartError, match="another run is writing there"):
            enter(tmp_path, 0.0)
        later = elsewhere.submit(enter, tmp_path, 30.0)
        with pytest.raises(TimeoutError):
            later.result(0.2)
    assert later.result() is None


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
