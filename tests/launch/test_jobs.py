"""Recipes and the doctor in jobs of real processes, as a user starts them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import recipe_process
from recipe_process import ROOT, environment

from shardtrain import UserError
from shardtrain.checkpoint.checkpoints import UNFINISHED
from shardtrain.cli.start import check_out
from shardtrain.guard.protocol import says_that_training_begins
from shardtrain.launch.doctor import address, folder
from shardtrain.launch.local import free_port, run_local

RECIPE = [sys.executable, str(ROOT / "recipes" / "train_cnn.py"), "--model", "lenet"]
DOCTOR = [sys.executable, "-m", "shardtrain", "doctor"]
SENTENCE_2 = ["--processes", "2", "--steps", "2"]


def run(command, limit=240, **more):
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(**more), timeout=limit, check=False
    )


def run_forked(command):
    """The same for a Python command, in the fork of a process that has imported what recipes import."""
    python, program, *flags = command
    assert python == sys.executable
    if program == "-m":
        program, *flags = Path(__file__).with_name("shardtrain_command.py"), *flags[1:]
    return recipe_process.run(program, *flags)


def run_locally(command, processes, capfd, **more):
    """What `launch local` returns and prints, without an interpreter for the launcher itself."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        status = run_local(command, processes, **more)
    return subprocess.CompletedProcess(command, status, *capfd.readouterr())


def launch(*flags):
    return [sys.executable, "-m", "shardtrain", "launch", "local", *map(str, flags), "--"]


def result(out):
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_losses_of_one(tmp_path, processes):
    """float32, the numbers of one process on the same mesh; the run's files are those of process 0 alone."""
    mesh = ["--mesh", "data=2,height=2", "--steps", "6"]
    one = run([*RECIPE, *mesh, "--out", str(tmp_path / "1")])
    assert one.returncode == 0, one.stderr
    done = run([*launch("-n", processes), *RECIPE, *mesh, "--out", str(tmp_path / "several")])
    assert done.returncode == 0, done.stderr
    got = result(tmp_path / "several")
    assert got["processes"] == processes
    np.testing.assert_allclose(got["losses"], result(tmp_path / "1")["losses"], rtol=1e-5)
    assert len((tmp_path / "several" / "metrics.jsonl").read_text().splitlines()) == 6
    assert {line[:3] for line in done.stdout.splitlines() if "│" in line} == {"[0]"}
    assert "kept in" not in done.stderr  # nobody moved aside what another had begun


@pytest.mark.slow
def test_compare_shows_one_device_beside_two_processes(tmp_path):
    done = run(
        [*launch("-n", 2), *RECIPE, "--mesh", "data=2", "--steps", "3", "--compare", "--out", str(tmp_path)]
    )
    assert done.returncode == 0, done.stderr
    gaps = [float(gap) for gap in re.findall(r"│\s+(\d\.\de[-+]\d\d) │", done.stdout)]
    assert len(gaps) > 1
    assert max(gaps) < 1e-5


def test_a_wrong_coordinator_name(tmp_path):
    flags = [
        "--coordinator",
        "no-such-host:62000",
        *SENTENCE_2,
        "--process-id",
        "1",
        "--out",
        str(tmp_path / "a"),
    ]
    start = time.monotonic()
    done = run_forked([*RECIPE, *flags])
    assert done.returncode == 2
    assert "error: --coordinator no-such-host:62000: the coordinator's name" in done.stderr
    assert "'no-such-host' does not resolve" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 60
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_not_there_is_named_within_the_limit(tmp_path, rank):
    """Rank 1 without a coordinator, and the coordinator without rank 1."""
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", *SENTENCE_2, "--process-id", str(rank)]
    start = time.monotonic()
    done = run_forked([*RECIPE, *flags, "--start-limit", "2", "--out", str(tmp_path / "a")])
    assert done.returncode == 76, done.stderr
    message = "nothing answers at the coordinator" if rank else "1 did not come to process 0"
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 40


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("", free_port())) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = run_forked(
            [
                *RECIPE,
                "--coordinator",
                address,
                *SENTENCE_2,
                "--process-id",
                "0",
                "--out",
                str(tmp_path / "a"),
            ]
        )
    assert done.returncode == 76
    assert "cannot be used (Address already in use)" in done.stderr


def test_a_mesh_that_processes_cannot_share(tmp_path, capfd):
    done = run_locally([*RECIPE, "--mesh", "data=3", "--out", str(tmp_path / "a")], 2, capfd)
    assert done.returncode == 2
    assert "mesh 'data=3' has 3 devices, which 2 processes cannot share evenly" in done.stderr


@pytest.mark.parametrize("there", [pytest.param([0, 1], marks=pytest.mark.slow), [1]])
def test_processes_with_different_folders_are_refused(tmp_path, there):
    """Like two hosts whose --out is the same path on different disks."""
    outs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for rank in there:
        outs[rank].mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    flags = ["--coordinator", address, *SENTENCE_2, "--start-limit", "10", "--mesh", "data=2"]
    jobs = [
        subprocess.Popen(
            [*RECIPE, *flags, "--process-id", str(rank), "--out", str(out)],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    texts = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], texts
    sentence = f"process 1 on {socket.gethostname()} cannot see what process 0 writes there"
    assert all(sentence in text and "Traceback" not in text for text in texts), texts
    assert [rank for rank, out in enumerate(outs) if out.exists()] == there  # as they were
    assert not any(list(outs[rank].iterdir()) for rank in there)


def test_doctor_alone(tmp_path):
    done = run([*DOCTOR, "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout
    assert all(check in done.stdout for check in ("host name", "devices", "packages", "folder"))
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_doctor_of_a_job(tmp_path, capfd):
    done = run_locally([*DOCTOR, "--out", str(tmp_path / "not" / "yet")], 3, capfd, devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 3 are there" in done.stdout
    assert "equal in all processes" in done.stdout
    assert "2 of cpu" in done.stdout
    assert "shared folder" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_what_is_wrong(tmp_path):
    with socket.create_server(("", free_port())) as server:
        job = [
            "--coordinator",
            f"127.0.0.1:{server.getsockname()[1]}",
            "--processes",
            "2",
            "--process-id",
            "0",
        ]
        done = run_forked([*DOCTOR, *job, "--out", "/proc/nowhere", "--start-limit", "1"])
    assert done.returncode == 1
    assert "cannot be used (Address already in use)" in done.stdout
    assert "name a folder that you may write to with --out" in done.stdout
    done = run_forked([*DOCTOR, "--coordinator", "no-such-host:62000", "--out", str(tmp_path)])
    assert done.returncode == 1
    assert "does not resolve" in done.stdout
    done = run([*DOCTOR, "--out", str(tmp_path)], SLURM_JOB_ID="7", SLURM_NTASKS="4")
    assert done.returncode == 1
    assert "srun shardtrain doctor" in done.stdout


def test_doctor_alone_looks_at_the_port_of_this_host():
    with socket.create_server(("", free_port())) as server:
        finding = address(f"[::1]:{server.getsockname()[1]}")
    assert not finding.good
    assert "Address already in use" in finding.found
    assert "is free" in address(f"[::1]:{free_port()}").found


def test_doctor_where_a_folder_may_not_be_looked_into(monkeypatch):
    """Root may look everywhere, and `exists` raises this before Python 3.12."""

    def refused(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refused)
    (finding,) = folder(Path("/closed/runs"))
    assert (finding.good, finding.check) == (False, "folder")
    assert "cannot be written (Permission denied)" in finding.found


def begin(tmp_path, *flags, steps):
    """A run of 3 processes under `launch local`, its folder and its log."""
    out = tmp_path / "run"
    recipe = [*RECIPE, "--mesh", "data=-1", "--batch-size", "24", "--checkpoint-every", "10", "--x64"]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            [*launch("-n", 3, *flags), *recipe, "--steps", str(steps), "--out", str(out)],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return job, out, tmp_path / "log"


def processes_of(job):
    """The process ids of the processes that a launcher has started, by rank."""
    found = {}
    for pid in subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split():
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(word[22:]): int(pid) for word in words if word.startswith(b"SHARDTRAIN_PROCESS_ID=")}
    return found


def steps_done(out):
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saved(out):
    """The steps of the checkpoints that are complete."""
    return [int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit()]


def until(ready, job, limit=120):
    end = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < end
        assert job.poll() is None
        time.sleep(0.02)


def reference(tmp_path, steps):
    """The losses of the undisturbed run on one process, in float64: no difference can hide in rounding."""
    flags = [
        "--mesh",
        "data=1",
        "--x64",
        "--batch-size",
        "24",
        "--steps",
        str(steps),
        "--out",
        str(tmp_path / "one"),
    ]
    done = run_forked([*RECIPE, *flags])
    assert done.returncode == 0, done.stderr
    return result(tmp_path / "one")["losses"]


@pytest.mark.slow
def test_a_killed_process_is_left_out_and_the_run_ends_as_if_undisturbed(tmp_path):
    losses = reference(tmp_path, 30)
    job, out, log = begin(tmp_path, "--restarts", 2, "--elastic", steps=30)
    until(lambda: saved(out) and steps_done(out) > 12, job)  # a save takes as long as the machine is busy
    os.kill(processes_of(job)[1], signal.SIGKILL)
    job.wait(240)
    text = log.read_text(errors="replace")
    assert job.returncode == 0, text
    assert "restart 1: 2 processes, 1 fewer than at first; 1 of 2 restarts are left" in text
    assert "resumed at step" in text
    assert (
        sum(map(says_that_training_begins, text.splitlines())) == 2
    )  # after which a 2 is not of the number of processes
    assert result(out)["processes"] == 2
    np.testing.assert_allclose(result(out)["losses"], losses, rtol=1e-6)


def unfinished(out):
    """The checkpoints that are being written, or were when a process was killed."""
    found = set()
    for path in (out / "checkpoints").glob(f"*{UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):  # it is finished now
            found.add((path.name, path.stat().st_ino))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(tmp_path):
    """Kills of any process, also in a save: the run completes, with the losses of an undisturbed one."""
    random = np.random.default_rng(0)
    losses = reference(tmp_path, 500)
    job, out, log = begin(tmp_path, "--restarts", 20, "--elastic", steps=500)
    kills, waits, torn = 0, [], 0
    while kills < 20:
        attempt = log.read_bytes().count(b"launch: restart")
        until(lambda: processes_of(job), job)
        # Some kills come while processes start and join, others between and in steps, each fourth in a save.
        if kills % 4 == 3:
            earlier = unfinished(out)
            until(lambda: unfinished(out) - earlier or job.poll() is not None, job)  # noqa: B023
        else:
            if random.random() < 0.7:
                before = steps_done(out)
                until(lambda: steps_done(out) != before or job.poll() is not None, job)  # noqa: B023
            time.sleep(random.uniform(0, 2.0))
        left = list(processes_of(job).values())
        if job.poll() is not None or not left:
            break
        saving = unfinished(out)
        os.kill(left[random.integers(len(left))], signal.SIGKILL)
        kills, start = kills + 1, time.monotonic()
        until(lambda: log.read_bytes().count(b"launch: restart") > attempt or job.poll() is not None, job)  # noqa: B023
        waits.append(time.monotonic() - start)
        torn += kills % 4 == 0 and bool(
            saving & unfinished(out)
        )  # what was being written never came to its end
    job.wait(600)
    text = log.read_text(errors="replace")
    assert job.returncode == 0, text[-5000:]
    assert kills == 20
    assert max(waits) < 15
    assert torn >= 1
    begun = [int(step) for step in re.findall(r"resumed at step (\d+) of 500", text)]
    assert len(set(begun) - {0}) > 3  # restarts went on, and none from further back than the one before
    assert begun == sorted(begun)
    print(f"{torn} kills in a save; resumed at {begun}; at most {max(waits):.1f} s until the next start")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 501))
    np.testing.assert_allclose([row["loss"] for row in rows], losses, rtol=1e-6)


def test_processes_that_try_one_folder_are_not_foreign_to_each_other(tmp_path):
    (tmp_path / ".write-test-0123456789abcdef").mkdir()  # another's, or left behind by a kill
    assert check_out(tmp_path) == tmp_path
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"no run of ours, such as thesis\.tex"):
        check_out(tmp_path)
