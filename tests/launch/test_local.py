"""`launch local` with small real processes: which failed first, which are ended, which start again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_process import ForkedProcess

from shardtrain import UserError
from shardtrain.launch import detect, local
from shardtrain.launch.local import run_local


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(local, "FIRST_PAUSE_SECONDS", 0.0)


START = """
import os, signal, sys, time
rank, processes, restart = (int(os.environ["SHARDTRAIN_" + name]) for name in ("PROCESS_ID", "PROCESSES", "RESTARTS"))
"""


def launch(capfd, program, processes, **more):
    """The exit status, stdout, and stderr of a program in several processes."""
    status = run_local([sys.executable, "-c", START + program], processes, **more)
    out, err = capfd.readouterr()
    return status, out, err


COMMAND = Path(__file__).with_name("shardtrain_command.py")


class Launcher(ForkedProcess):
    """`shardtrain launch local` in a forked process, whose output comes through pipes."""

    def __init__(self, folder, *arguments, program=COMMAND):
        streams = [folder / name for name in ("launcher.out", "launcher.err")]
        for stream in streams:
            os.mkfifo(stream)
        super().__init__(program, ["launch", "local", *arguments], *streams)
        self.stdout, self.stderr = (stream.open() for stream in streams)

    def communicate(self, timeout=None):
        """Waits for its end, and returns the rest of its output."""
        self.wait(timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()


def fresh_launcher(folder, *arguments):
    """`shardtrain launch local` as a user starts it."""
    command = [sys.executable, "-m", "shardtrain", "launch", "local", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sizes(out):
    """How many processes each attempt had, from lines `[rank] attempt processes`."""
    attempts = [line.split()[1:] for line in out.splitlines() if line.startswith("[0]")]
    return [int(processes) for _, processes in attempts]


def test_output_carries_the_rank_and_keeps_its_stream(capfd):
    status, out, err = launch(capfd, "print('out', rank); print('err', rank, file=sys.stderr, end='')", 11)
    assert status == 0
    assert sorted(out.splitlines()) == sorted(f"[{rank:>2}] out {rank}" for rank in range(11))
    assert sorted(err.splitlines()) == sorted(f"[{rank:>2}] err {rank}" for rank in range(11))


def test_the_first_failure_is_shown_and_ends_the_others(capfd):
    program = """
if rank == 2: print("bad batch 17", file=sys.stderr); sys.exit(3)
time.sleep(60)
"""
    start = time.monotonic()
    status, _, err = launch(capfd, program, 3)
    assert status == 3
    assert time.monotonic() - start < 5
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert lines[0] == "launch: process 2 failed first: it ended with status 3, its last words:"
    assert lines[1].strip() == "bad batch 17"
    assert "was killed by SIGTERM" in lines[2]


def test_a_consequence_is_not_the_cause(capfd):
    """jax aborts the others as soon as process 0 is gone."""
    program = """
import threading
if rank == 0: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.45); os.abort()
"""
    status, _, err = launch(capfd, program, 3)
    assert status == 128 + signal.SIGKILL
    assert "process 0 failed first: it was killed by SIGKILL" in err


def test_who_ignores_sigterm_is_killed_within_the_limit(capfd, tmp_path):
    program = f"""
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0: time.sleep(1); sys.exit(4)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    start = time.monotonic()
    status, _, err = launch(capfd, program, 2)
    assert status == 4
    assert time.monotonic() - start < 10
    assert "process 1 was killed by SIGKILL" in err
    time.sleep(0.2)
    state = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_status_2_is_final(capfd):
    status, out, _ = launch(capfd, "print(restart, processes); sys.exit(2)", 2, restarts=3)
    assert status == 2
    assert sizes(out) == [2]


def test_restarts_are_counted(capfd):
    status, out, err = launch(capfd, "print(restart, processes); sys.exit(5)", 2, restarts=2)
    assert status == 5
    assert sizes(out) == [2, 2, 2]
    assert "no restart is left of 2" in err


def test_75_is_not_counted(capfd):
    status, out, err = launch(
        capfd, "print(restart, processes); sys.exit(75 if restart < 3 else 0)", 2, restarts=1
    )
    assert status == 0
    assert sizes(out) == [2, 2, 2, 2]
    assert "1 of 1 restarts are left" in err


def pauses(monkeypatch):
    """The seconds between attempts, which are not waited for."""
    found = []
    monkeypatch.setattr(local, "FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(local.Attempts, "pause", lambda self, seconds: found.append(seconds))
    return found


def test_who_is_told_to_stop_at_once_again_and_again_waits_longer_and_longer(capfd, monkeypatch):
    found = pauses(monkeypatch)
    status, _, err = launch(capfd, "sys.exit(75 if restart < 9 else 0)", 1, restarts=1)
    assert status == 0
    assert found == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert "told to stop after less than 60 s; the next start is in 8 s" in err


def test_who_was_told_to_stop_later_does_not_wait(capfd, monkeypatch):
    found = pauses(monkeypatch)
    monkeypatch.setattr(local, "SHORT_ATTEMPT_SECONDS", 3.0)
    program = "time.sleep(3 if restart == 2 else 0); sys.exit(75 if restart < 4 else 0)"
    assert launch(capfd, program, 1, restarts=1)[0] == 0
    assert found == [1, 2, 0, 1]


def test_failures_follow_each_other_at_once(capfd, monkeypatch):
    found = pauses(monkeypatch)
    assert launch(capfd, "sys.exit(76)", 1, restarts=2)[0] == 76
    assert found == []


LONG_PAUSE = """
from shardtrain.cli.command import main
from shardtrain.launch import local
local.FIRST_PAUSE_SECONDS = 8.0
main()
"""


def test_a_pause_ends_when_the_launcher_is_told_to_stop(tmp_path):
    (tmp_path / "launcher.py").write_text(LONG_PAUSE)
    command = ["-n", "1", "--restarts", "1", "--", "sh", "-c", "exit 75"]
    job = Launcher(tmp_path, *command, program=tmp_path / "launcher.py")
    while "in 8 s" not in job.stderr.readline():
        assert job.poll() is None
    begin = time.monotonic()
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=20)
    assert time.monotonic() - begin < 7  # of 8
    assert job.returncode == 75
    assert "restart" not in err


def test_a_fault_that_always_comes_back_is_counted(capfd):
    """A hang, a lost process, a start that fails: 76. Being told to stop in between is free."""
    program = "print(restart, processes); sys.exit(75 if restart == 1 else 76)"
    status, out, err = launch(capfd, program, 2, restarts=2)
    assert status == 76
    assert sizes(out) == [2, 2, 2, 2]
    assert "no restart is left of 2" in err


def test_a_launcher_in_a_job_that_is_restarted_goes_on_with_it(capfd, monkeypatch):
    program = "print(os.environ['SHARDTRAIN_JOB'], restart); sys.exit(0 if restart == 3 else 1)"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SHARDTRAIN_RESTARTS", "2")
    status, out, _ = launch(capfd, program, 1, restarts=1)
    assert status == 0
    assert out.splitlines() == ["[0] 4711 2", "[0] 4711 3"]


def test_75_passes_where_nothing_restarts(capfd):
    assert launch(capfd, "sys.exit(75)", 2)[0] == 75


def test_who_leaves_with_75_is_given_time(capfd):
    """All processes save; the last is still saving when the first has ended."""
    program = (
        "print(restart, processes); time.sleep(0 if rank == 0 else 3); sys.exit(75 if restart == 0 else 0)"
    )
    status, out, err = launch(capfd, program, 2, restarts=1)
    assert status == 0
    assert "SIG" not in err
    assert sizes(out) == [2, 2]


def test_who_never_ends_after_75_is_killed(capfd):
    """One of the processes that save hangs."""
    start = time.monotonic()
    status, _, err = launch(capfd, "time.sleep(0 if rank == 0 else 60); sys.exit(75)", 2, grace=1.0)
    assert status == 75, err
    assert time.monotonic() - start < 10


def test_a_coordinator_of_another_job_is_not_ours(capfd, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "another-job:62000")
    status, out, _ = launch(capfd, "import json; print(json.dumps(dict(os.environ)))", 2)
    assert status == 0
    environments = [json.loads(line.partition("] ")[2]) for line in out.splitlines()]
    assert [detect(env).coordinator.partition(":")[0] for env in environments] == ["127.0.0.1"] * 2


def test_elastic_leaves_out_what_was_lost_and_grows_again(capfd, tmp_path):
    """At first two processes are lost, as with a host that had both; later one."""
    program = f"""
from pathlib import Path
if rank == 0: print(restart, processes, flush=True)
if restart == 0 and rank in (1, 2):
    Path({str(tmp_path)!r}, str(rank)).touch()
    while len(os.listdir({str(tmp_path)!r})) < 2: time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if restart == 2 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
if restart == 1: sys.exit(6)
if restart == 3: sys.exit(0)
time.sleep(60)
"""
    status, out, err = launch(capfd, program, 4, restarts=5, elastic=True)
    assert status == 0
    # killed; failed without a loss, so all are back; killed again
    assert sizes(out) == [4, 2, 4, 3]
    assert "restart 1: 2 processes, 2 fewer than at first; 4 of 5 restarts are left" in err


def test_without_elastic_all_come_back(capfd):
    program = """
if rank == 0: print(restart, processes, flush=True)
if restart < 2 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0 if restart == 2 else 60)
"""
    status, out, _ = launch(capfd, program, 3, restarts=2)
    assert status == 0
    assert sizes(out) == [3, 3, 3]


def test_a_number_that_is_refused_shrinks_further(capfd):
    program = """
if rank == 0: print(restart, processes, flush=True)
if restart == 0 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
if processes < 4: sys.exit(2 if processes == 3 else 0)
time.sleep(60)
"""
    status, out, err = launch(capfd, program, 4, restarts=1, elastic=True)
    assert status == 0
    assert sizes(out) == [4, 3, 2]
    assert "3 processes were refused" in err


def test_one_process_that_is_refused_is_the_end(capfd):
    program = """
if rank == 0: print(restart, processes, flush=True)
if restart == 0 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60) if restart == 0 else sys.exit(2)
"""
    status, out, _ = launch(capfd, program, 2, restarts=1, elastic=True)
    assert status == 2
    assert sizes(out) == [2, 1]


def test_2_of_a_run_that_had_begun_is_the_end(capfd):
    """After a bad loss or a full disk, it is not the number of processes that was refused."""
    program = """
if rank == 0: print(restart, processes, flush=True)
if restart == 0 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
if restart == 0 or rank: time.sleep(60)
print("12:00:00 rank 0 step 50: resume: 50 of 600 steps are done", file=sys.stderr)
for k in range(100): print("error: the loss is nan", file=sys.stderr)
sys.exit(2)
"""
    status, out, err = launch(capfd, program, 4, restarts=3, elastic=True)
    assert status == 2
    assert sizes(out) == [4, 3]
    assert "refused" not in err


def test_who_is_killed_by_the_launcher_is_not_lost(capfd, monkeypatch):
    monkeypatch.setattr(local, "TERMINATION_SECONDS", 0.5)
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0: print(restart, processes, flush=True)
if restart == 0 and rank == 1: time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if restart == 0 else 0)
"""
    status, out, err = launch(capfd, program, 4, restarts=1, elastic=True)
    assert status == 0
    assert "process 2 was killed by SIGKILL" in err
    assert sizes(out) == [4, 3]


def test_after_75_all_are_back(capfd):
    program = """
if rank == 0: print(restart, processes, flush=True)
if restart == 0 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)
if restart == 0: time.sleep(60)
sys.exit(75 if restart == 1 else 0)
"""
    status, out, _ = launch(capfd, program, 3, restarts=1, elastic=True)
    assert status == 0
    assert sizes(out) == [3, 2, 3]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, closed):
    """As in `launch local ... | head -1`, with more output than a pipe takes."""
    program = f"import sys\nfor k in range(20000): print('line', k, file=sys.{closed})\nsys.exit(3)"
    job = Launcher(tmp_path, "-n", "2", "--", sys.executable, "-c", program)
    getattr(job, closed).readline()
    getattr(job, closed).close()
    with job.stderr if closed == "stdout" else job.stdout as stream:
        text = stream.read()
    assert job.wait(60) == 3, text
    assert "Traceback" not in text
    assert "Error" not in text
    assert (closed == "stderr") == (text == "")


def start(tmp_path, program, *flags, launcher=Launcher):
    """The command, as soon as its two processes run."""
    ready = tmp_path / "ready"
    program = START + f"open({str(ready)!r} + str(rank), 'w').close()\n" + program
    job = launcher(tmp_path, "-n", "2", *flags, "--", sys.executable, "-c", program)
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
        assert job.poll() is None, job.communicate()
    time.sleep(0.3)
    return job


SAVES = (
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print('saved'), sys.exit(75)))\ntime.sleep(60)"
)


def test_sigterm_is_passed_on_and_nothing_restarts(tmp_path):
    job = start(tmp_path, SAVES, "--restarts", "3", launcher=fresh_launcher)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=20)
    assert job.returncode == 75, err
    assert out.count("saved") == 2
    assert "restart" not in err


def test_ctrl_c_once_and_twice(tmp_path):
    patient = "signal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    job = start(tmp_path, patient)
    job.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=10)
    assert job.returncode == 128 + signal.SIGKILL


def test_the_grace_has_an_end(tmp_path):
    patient = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    job = start(tmp_path, patient, "--grace", "1")
    begin = time.monotonic()
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=10)
    assert time.monotonic() - begin < 5
    assert job.returncode == 128 + signal.SIGTERM


def test_the_grace_is_counted_from_the_signal(tmp_path):
    """It is not counted from the end of the first process that has saved."""
    program = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), sys.exit(75)) if rank == 0 else None)"
    job = start(tmp_path, f"{program}\nfor _ in range(60): time.sleep(1)", "--grace", "4")
    begin = time.monotonic()
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=20)
    assert 3.9 < time.monotonic() - begin < 7  # and not 3, 4 and a half
    assert job.returncode == 75, err


@pytest.mark.skipif(not shutil.which("setpriv"), reason="there is no setpriv here (util-linux)")
def test_nothing_outlives_the_launcher(tmp_path):
    job = start(tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    state = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    assert state.exists()
    job.kill()
    job.communicate(timeout=10)
    time.sleep(0.5)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_mistakes_are_sentences(monkeypatch):
    with pytest.raises(UserError, match="write it after --"):
        run_local([], 2)
    with pytest.raises(UserError, match="no-such-program cannot be started"):
        run_local(["no-such-program"], 2)
    with pytest.raises(UserError, match="above 0"):
        run_local(["true"], 0)
    monkeypatch.setenv("SHARDTRAIN_RESTARTS", "abc")
    with pytest.raises(UserError, match="SHARDTRAIN_RESTARTS=abc: set this variable to a whole number"):
        run_local(["true"], 1)
    for grace in ("inf", "nan", "-inf", "0"):
        with pytest.raises(UserError, match=f"--grace {grace}: use seconds above 0 that have an end"):
            run_local(["true"], 1, grace=float(grace))
