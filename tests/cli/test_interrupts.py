"""Ctrl-C ends a recipe with one line on stderr and status 130, at whatever moment it comes."""

import gc
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from recipe_process import ROOT, environment

from shardtrain import interrupts

RECIPE = ROOT / "recipes" / "train_cnn.py"

BEGINS_SECONDS = 0.3
"""Until then Python itself may still be starting."""

STARTS_SECONDS = 12.0
"""About as long as a recipe takes until its first step."""

PROGRAM = "import runpy, sys; print('begins', flush=True); sys.argv[0] = '{0}'; runpy.run_path('{0}', run_name='__main__')"

LOG = re.compile(r"\d\d:\d\d:\d\d rank 0 .*|step \d+/\d+ .*")


def interrupted(words, seconds, **env):
    """What a program says and returns that gets SIGINT so many seconds after it has begun."""
    with subprocess.Popen(
        words, env=environment(**env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "begins\n"
        time.sleep(seconds)
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=120)
    return job.returncode, out, err


def check(words, seconds):
    status, out, err = interrupted(words, seconds)
    *before, last = err.splitlines()
    assert (status, last, out) == (130, "interrupted", ""), (seconds, err)
    assert all(LOG.fullmatch(line) for line in before), (seconds, err)


def recipe(folder):
    flags = ["--model", "lenet", "--mesh", "data=2", "--steps", "100000", "--out", str(folder / "run")]
    return [sys.executable, "-c", PROGRAM.format(RECIPE), *flags]


def test_ctrl_c_at_some_early_moment(tmp_path):
    moments = random.Random()
    seconds = [moments.uniform(BEGINS_SECONDS, 3), moments.uniform(3, 7), moments.uniform(7, STARTS_SECONDS)]
    for k, moment in enumerate(seconds):
        check(recipe(tmp_path / str(k)), moment)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ctrl_c_at_fifty_moments(tmp_path):
    for k in range(50):
        check(recipe(tmp_path / str(k)), random.uniform(BEGINS_SECONDS, 1.5 * STARTS_SECONDS))


def test_ctrl_c_of_the_command(tmp_path):
    """While it imports what it needs, and while a job runs."""
    program = "print('begins', flush=True); import runpy, sys; sys.argv[0] = '-m'; runpy.run_module('shardtrain', run_name='__main__')"
    child = [sys.executable, "-c", "import time; print('there', flush=True); time.sleep(100)"]
    words = [sys.executable, "-c", program, "launch", "local", "-n", "1", "--", *child]
    check(words, BEGINS_SECONDS + 0.5)
    status, _, err = interrupted(words, STARTS_SECONDS / 2)
    assert status == 130, err


IN_A_CALLBACK = """
import gc, os, signal, sys, time
from shardtrain import interrupts

def callback(phase, info):
    if phase == "start" and not done:
        done.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

done = []
with interrupts.at_once():
    interrupts.as_exceptions()
    gc.callbacks.append(callback)
    try:
        gc.collect()
        gc.callbacks.remove(callback)
        time.sleep(60)
    except KeyboardInterrupt:
        print("put away", flush=True)
        interrupts.leave()
"""


def test_an_interrupt_that_the_garbage_collector_swallows_comes_again():
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CALLBACK], env=environment(), capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "put away\n", "interrupted\n")


def test_handlers_of_others_stay():
    """Those of a program around, and pytest's, after a recipe in the same process."""
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
        with interrupts.at_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interrupts.at_once():
            assert interrupts.is_at_once()
            interrupts.as_exceptions()
            assert not interrupts.is_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert sys.unraisablehook is hook
        gc.collect()
    finally:
        signal.signal(signal.SIGINT, before)


def test_importing_the_package_is_cheap_and_leaves_signals_alone():
    """So that `shardtrain.cli` can handle Ctrl-C before what takes seconds."""
    source = "import signal, sys; import shardtrain; assert 'jax' not in sys.modules; import shardtrain.cli; print(signal.getsignal(signal.SIGINT).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "default_int_handler\n"


def test_every_recipe_imports_the_command_line_first():
    for path in sorted((ROOT / "recipes").glob("*.py")):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert lines[0].startswith("from shardtrain import cli"), path
