"""A disk that is full or may not be written to is a sentence and status 2, of one process and of several."""

import shutil
import subprocess
import sys

import pytest
from recipe_process import ROOT, environment

RECIPE = [sys.executable, str(ROOT / "recipes" / "train_cnn.py")]
FLAGS = ("--model", "lenet", "--mesh", "data=2", "--batch-size", "32", "--optimizer", "adam", "--lr", "0.001")
APART = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
"""A shell that may mount, what nobody else sees."""


def may_mount():
    if shutil.which("unshare") is None:
        return False
    command = [*APART, "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="needs unshare, and to be allowed to mount")


def run(options, folder, command):
    """The command with `--out` on a disk that is mounted with these options."""
    folder.mkdir()
    script = 'mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"'
    line = [*APART, script, options, str(folder), *command, *FLAGS, "--out", str(folder / "run")]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)


def check(done, message):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.slow
def test_a_disk_that_is_full_of_metrics(tmp_path):
    done = run("size=48k", tmp_path / "disk", [*RECIPE, "--steps", "400"])
    check(done, "run could not be written to (No space left on device); make room there")
    assert "step 1/400" in done.stderr


def test_a_disk_that_is_full_of_checkpoints(tmp_path):
    """Whichever file is the next: a checkpoint is written while steps are."""
    many = ("--steps", "200", "--checkpoint-every", "5", "--keep", "100")
    done = run("size=1m", tmp_path / "disk", [*RECIPE, *many])
    check(done, "could not be written to")
    assert "(No space left on device); make room there" in done.stderr
    assert "step 5: checkpoint" in done.stderr


def test_a_disk_that_is_read_only(tmp_path):
    done = run("ro", tmp_path / "disk", [*RECIPE, "--steps", "4"])
    check(done, "run cannot be written (Read-only file system); name a folder that you may write to")


@pytest.mark.slow
def test_a_full_disk_ends_both_of_two_processes(tmp_path):
    launched = [sys.executable, "-m", "shardtrain", "launch", "local", "-n", "2", "--restarts", "3", "--"]
    done = run("size=48k", tmp_path / "disk", [*launched, *RECIPE, "--steps", "400"])
    assert done.returncode == 2, done.stderr
    assert "run could not be written to (No space left on device); make room there" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
