"""The watch over one real process whose main thread only waits: signals and time limits."""

import re
import signal
import subprocess
import sys
import time

import pytest
from recipe_process import environment

from shardtrain import Guard
from shardtrain.guard.profile import Clock
from shardtrain.guard.watch import (
    MOST_SILENT_SECONDS,
    REPEATED_SIGNAL_SECONDS,
    SLOW_PHASE_FACTOR,
    SLOW_PHASES,
)


@pytest.fixture
def begin():
    """Starts Python programs, and ends those that are left."""
    jobs = []

    def start(program):
        command = [sys.executable, "-c", program]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        jobs.append(subprocess.Popen(command, env=environment(), text=True, **streams))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.communicate()


BUSY = """
import logging, time
from shardtrain import Guard
logging.getLogger("shardtrain").setLevel("INFO")
with Guard(watchdog=None) as guard:
    guard.start(0, 9, {"data": 1})
    guard.stops_before(1)  # the first step is under way
    print("there", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_leaves_at_once_and_one_sent_twice_does_not(begin):
    job = begin(BUSY)
    assert job.stdout.readline() == "there\n"
    job.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)  # as a scheduler and a launcher both do
    time.sleep(REPEATED_SIGNAL_SECONDS + 0.5)
    assert job.poll() is None  # it would stop after this step, which has no end
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=10)
    assert job.returncode == 75
    assert "stopping after step 1" in err
    assert "a second signal: leaving at once" in err


def test_a_job_that_slept_as_a_whole_was_not_silent_all_the_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()
    for pause in (1.0, 3600.0, 1.0):
        now[0] += pause
        clock.tick()
    assert clock.now() == 2.0 + Clock.LONGEST_TICK_SECONDS


@pytest.mark.parametrize(
    ("watchdog", "silence"), [(None, MOST_SILENT_SECONDS), (600.0, MOST_SILENT_SECONDS), (20.0, 20.0)]
)
def test_who_says_nothing_is_lost_before_jax_aborts(watchdog, silence):
    assert Guard(watchdog=watchdog)._watch.silence == silence


SECONDS = 0.4


def test_slow_parts_have_more_time_and_an_end(begin):
    """Each phase takes twice the limit of a step; the last one never ends."""
    *parts, last = SLOW_PHASES
    job = begin(f"""
import time
from shardtrain import Guard
with Guard(watchdog={SECONDS}) as guard:
    for part in {parts}:
        guard.progress.at(part)
        time.sleep({2 * SECONDS})
        print(part, flush=True)
    guard.progress.at({last!r})
    time.sleep(60)
""")
    assert [job.stdout.readline().strip() for _ in parts] == parts
    start = time.monotonic()
    _, err = job.communicate(timeout=20)
    assert job.returncode == 76
    assert re.search(rf"no progress for {SLOW_PHASE_FACTOR * SECONDS:.0f} s in {last!r}", err), err
    assert SLOW_PHASE_FACTOR * SECONDS - 0.2 < time.monotonic() - start < SLOW_PHASE_FACTOR * SECONDS + 5
