"""Guards in real processes that are signalled, suspended, killed or raise: exit statuses and messages."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_process import ForkedProcess
from recipe_process import environment

from shardtrain.launch.local import free_port

WORKER = Path(__file__).parent / "guard_worker.py"

LIMIT_SECONDS = 240
"""After this a process hangs. Status and messages say which guard ended a process, not the time that it took.

Orbax saves with many threads: a job that takes a second here took 60 next to four busy processes.
"""


class Job:
    """Processes that run `guard_worker.py`, each with files for its output."""

    def __init__(self, folder, processes=2, **wishes):
        folder.mkdir(exist_ok=True)
        self.folder, self.run = folder, folder / "run"
        port = free_port()
        self.processes = []
        for rank in range(processes):
            out, err = folder / f"{rank}.out", folder / f"{rank}.err"
            out.write_text("")
            err.write_text("")
            arguments = [port, processes, rank, self.run, json.dumps(wishes)]
            self.processes.append(ForkedProcess(WORKER, arguments, out, err))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def err(self, rank):
        return (self.folder / f"{rank}.err").read_text()

    def rows(self, rank):
        lines = re.findall(r"^\{.*\}$", self.out(rank), re.MULTILINE)
        return {row["step"]: row["loss"] for row in map(json.loads, lines)}

    def wait_for_step(self, step, limit=60):
        until = time.monotonic() + limit
        while not all(step <= max(self.rows(r), default=0) for r in range(len(self.processes))):
            assert time.monotonic() < until, [self.err(r) for r in range(len(self.processes))]
            time.sleep(0.05)

    def codes(self, ranks=None):
        """Exit statuses."""
        until = time.monotonic() + LIMIT_SECONDS
        ranks = range(len(self.processes)) if ranks is None else ranks
        try:
            return [self.processes[r].wait(max(0.1, until - time.monotonic())) for r in ranks]
        except subprocess.TimeoutExpired:
            pytest.fail(
                f"still there after {LIMIT_SECONDS} s:\n"
                + "\n".join(map(self.err, range(len(self.processes))))
            )

    def out(self, rank):
        return (self.folder / f"{rank}.out").read_text()

    def saved(self):
        return sorted(int(p.name) for p in (self.run / "checkpoints").iterdir() if p.name.isdigit())

    def events(self, kind):
        rows = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row["event"] == kind]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_rank_saves_the_same_step_of_both(rank, tmp_path):
    with Job(tmp_path / "a") as job:
        job.wait_for_step(5)
        job.processes[rank].send_signal(signal.SIGTERM)
        assert job.codes() == [75, 75]
        steps = {row["step"] for row in job.events("preempted")}
        assert len(job.events("preempted")) >= 2
        (saved,) = job.saved()
        last = max(job.rows(0))
        assert max(job.rows(1)) == last == saved == max(steps)
        assert f"SIGTERM on rank {rank}" in job.err(0)
        assert f"SIGTERM on rank {rank}" in job.err(1)
        first = job.rows(0)
    if rank == 0:
        return
    with Job(tmp_path / "a", steps=last + 5) as job:
        assert job.codes() == [0, 0]
        assert min(job.rows(0)) == last + 1
    with Job(tmp_path / "b", processes=1, steps=last + 5) as straight:
        assert straight.codes() == [0]
        assert first | job.rows(0) == pytest.approx(straight.rows(0), rel=1e-5)


@pytest.mark.parametrize(
    "fault", [pytest.param("sigterm", marks=pytest.mark.slow), "sigterm in save"], ids=["step", "save"]
)
def test_sigterm_in_the_last_step_or_its_save_stops_after_the_save(fault, tmp_path):
    """No evaluation follows, and the same command has nothing left to train."""
    with Job(tmp_path, fault=fault, rank=1, at=6, steps=6) as job:
        assert job.codes() == [75, 75]
        assert job.saved() == [6]
        assert {row["step"] for row in job.events("preempted")} == {6}
        assert "trained" not in job.out(0) + job.out(1)
    with Job(tmp_path, steps=6) as job:
        assert job.codes() == [0, 0]
        assert "trained to example 48" in job.out(0)
        assert job.rows(0) == {}


def test_a_ragged_batch_counts_the_rows_that_there_are(tmp_path):
    """The fourth batch has 4 and 1 rows instead of 8; a resumed run continues after these 5 examples."""
    with Job(tmp_path, ragged=[4, [4, 1]], steps=6) as job:
        assert job.codes() == [0, 0]
        assert "trained to example 45" in job.out(0)
        assert "trained to example 45" in job.out(1)
    with Job(tmp_path, processes=1, steps=8) as job:
        assert job.codes() == [0]
        assert "trained to example 61" in job.out(0)


@pytest.mark.slow
def test_ranks_that_are_traced_or_not_roll_back_together(tmp_path):
    """The trace begins on one rank between the bad step and the next one."""
    wishes = {
        "fault": "nan",
        "rank": 0,
        "at": 4,
        "on_nan": "rollback",
        "profile": [5, 7],
        "every": 2,
    }
    with Job(tmp_path, steps=8, **wishes) as job:
        assert job.codes() == [0, 0]
        assert [row["checkpoint"] for row in job.events("rollback")] == [2]
        assert str(job.rows(0)) == str(job.rows(1))
        assert [row["rank"] for row in job.events("profile")] == [1, 1]


@pytest.mark.parametrize("at", [pytest.param("looking", marks=pytest.mark.slow), "writing"])
@pytest.mark.slow
def test_a_rank_that_dies_in_a_save_is_not_a_full_disk(at, tmp_path):
    """The other rank names it and exits with 76; the checkpoint before it is intact."""
    with Job(tmp_path, fault="killed in a save", rank=1, at=at, every=1, watchdog=8) as job:
        assert job.codes() == [76, -signal.SIGKILL]
        assert "rank 1 did not answer" in job.err(0), job.err(0)
        assert "could not be written" not in job.err(0)
        assert job.saved() == ([] if at == "looking" else [1])


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named(rank, tmp_path):
    with Job(tmp_path, watchdog=5) as job:
        job.wait_for_step(5)
        job.processes[rank].send_signal(signal.SIGSTOP)
        other = 1 - rank
        assert job.codes(ranks=[other]) == [76]
        stderr = job.err(other)
        assert re.search(rf"rank {rank}\b.* (did|does) not answer", stderr), stderr
        assert re.search("no(t answer| progress) for 5 s", stderr), stderr
        assert 'guard_worker.py", line' in stderr  # stacks, down to the user's own code
        assert "in run" in stderr


@pytest.mark.slow
def test_a_rank_lost_while_the_run_is_told_to_stop_is_no_fault(tmp_path):
    """A preempted host may be gone before the others have saved."""
    with Job(tmp_path, watchdog=5) as job:
        job.wait_for_step(5)
        job.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.codes(ranks=[0]) == [75]
        assert re.search(r"rank 1\b.* did not (answer for|come to 'stop' within) 5 s", job.err(0))


def test_a_rank_that_hangs_is_named_and_shows_where(tmp_path):
    with Job(tmp_path, watchdog=5, fault="hang", rank=1, at=6) as job:
        job.wait_for_step(4)
        assert job.codes() == [76, 76]
        assert "no progress for 5 s" in job.err(0) + job.err(1)
        assert "in spin" in job.err(1)
        stderr = job.err(0)
        assert "rank 1 is behind, at step 6 in 'data'" in stderr or "rank 1 saw no progress" in stderr


def test_a_killed_rank_is_named(tmp_path):
    with Job(tmp_path) as job:
        job.wait_for_step(5)
        job.processes[1].kill()
        assert job.codes(ranks=[0]) == [76]
        assert "a collective failed: rank 1 did not answer" in job.err(0)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_exception_on_one_rank_ends_all_with_its_message(rank, tmp_path):
    with Job(tmp_path, fault="raise", rank=rank, at=6) as job:
        job.wait_for_step(4)
        assert job.codes() == [1, 1]
        message = "RuntimeError: the disk of rank 1 is on fire"
        assert "Traceback" in job.err(rank)
        assert message in job.err(rank)
        assert f"rank {rank} failed: {message}" in job.err(1 - rank)
        first, *_ = job.events("exit")
        assert first["rank"] == rank


@pytest.mark.slow
def test_the_launcher_names_rank_0_though_it_ends_last(tmp_path):
    """Rank 0 stays until the others have read of its failure."""
    wishes = {"fault": "user error", "rank": 0, "at": 4}
    place = f'{sys.executable} {WORKER} "${{SHARDTRAIN_COORDINATOR#*:}}" 2 "$SHARDTRAIN_PROCESS_ID" "$0" "$1"'
    job = ["sh", "-c", place, str(tmp_path / "run"), json.dumps(wishes)]
    command = [sys.executable, "-m", "shardtrain", "launch", "local", "-n", "2", "--", *job]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 2
    _, first, words = done.stderr.partition("launch: process 0 failed first: it ended with status 2")
    assert first, done.stderr
    assert "    error: this folder is empty; name another one" in words.splitlines()
    assert "launch: process 1 ended with status 2" in words


@pytest.mark.slow
def test_a_user_error_on_one_rank_is_a_sentence(tmp_path):
    with Job(tmp_path, fault="user error", rank=1, at=4) as job:
        assert job.codes() == [2, 2]
        assert "error: this folder is empty; name another one" in job.err(1)
        assert "Traceback" not in job.err(0) + job.err(1)
        assert "rank 1 failed: this folder is empty" in job.err(0)


def test_a_rank_that_exits_by_itself_ends_all_with_its_status(tmp_path):
    with Job(tmp_path, fault="exit", rank=1, at=4, status=3) as job:
        assert job.codes() == [3, 3]
        assert "rank 1 failed: it exited with status 3" in job.err(0)
        assert "Traceback" not in job.err(0) + job.err(1)
        assert "watchdog" not in job.err(0)


@pytest.mark.slow
def test_a_rank_that_ends_while_others_compute_is_named(tmp_path):
    with Job(tmp_path, watchdog=5, fault="exit", rank=1, at=4, status=0) as job:
        assert job.codes() == [76, 76]
        assert re.search("no progress for 5 s in 'compute'; rank 1 came to the end", job.err(0)), job.err(0)


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_the_end_is_named(tmp_path):
    with Job(tmp_path, watchdog=5, fault="late", rank=1, steps=5) as job:
        job.wait_for_step(5)
        assert job.codes() == [76, 76]
        assert re.search("rank 1 (did not come to 'the end'|is behind)", job.err(0)), job.err(0)


def test_one_process(tmp_path):
    """A single process saves on SIGTERM, resumes, and is ended by its watchdog."""
    with Job(tmp_path, processes=1) as job:
        job.wait_for_step(5)
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.codes() == [75]
        assert job.saved() == [max(job.rows(0))]
    before = job.saved()[0]
    with Job(tmp_path, processes=1, watchdog=5, fault="hang", at=before + 3) as job:
        assert job.codes() == [76]
        assert f"step {before + 3}: watchdog: no progress for 5 s in 'data'" in job.err(0)
        assert "in spin" in job.err(0)


LAST = """
from shardtrain import Guard
from shardtrain.guard.peers import Peers

class Gone:
    def __getattr__(self, name):
        raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")

guard = Guard(watchdog=None)
with guard:
    guard._peers = Peers(Gone(), 1, 2, "job")
print("hangs in the end of jax")
"""


@pytest.mark.slow
def test_a_coordinator_that_is_gone_at_the_end_is_a_way_out(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LAST],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 76
    assert "does not answer (UNAVAILABLE: failed" in done.stderr
    assert done.stdout == ""
