"""Flags of guards, what the closing table says of them, and their lines on stderr."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardtrain import UserError
from shardtrain.cli import guards
from shardtrain.guard.events import Events


def flags(**given):
    plain = {"steps": 100, "watchdog": 600.0, "on_nan": "stop", "spike": None, "profile": ""}
    return SimpleNamespace(**(plain | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"watchdog": -1.0}, "--watchdog -1: give seconds, or 0"),
        ({"watchdog": float("nan")}, "--watchdog nan"),
        ({"spike": 1.0}, "--spike 1: a spike is more than 1 times"),
        ({"profile": "10"}, "--profile 10: write the first and the last step"),
        ({"profile": "20:10"}, "--profile 20:10: write"),
        ({"profile": "0:3"}, "--profile 0:3: write"),
        ({"profile": "101:103"}, "--profile 101:103: the run has --steps 100"),
    ],
)
def test_refused_in_a_sentence(given, message):
    with pytest.raises(UserError, match=message):
        guards.guard(flags(**given), Path("runs"))


def test_no_limit_and_both_ends_of_a_profile():
    made = guards.guard(flags(watchdog=0.0, profile="10:20"), Path("runs"))
    assert made.profiler.steps == range(10, 21)
    assert made._watch.seconds is None
    assert guards.steps_of("90:999", steps=100) == range(90, 101)  # what will be traced is what is said


def test_the_summary_says_where_the_time_went(tmp_path):
    row = {"seconds": 0.1, "data_seconds": 0.02, "compute_seconds": 0.07, "checkpoint_seconds": 0.005}
    found = guards.summary([row, row | {"skipped": 1.0, "peak_memory": 3 * 2**20}], tmp_path)
    assert (
        found["time of a step (median)"]
        == "100.0 ms; the host waited for compute 70 %, data 20 %, checkpoint 5 %"
    )
    assert (found["bad steps left out"], found["device memory (peak)"]) == ("1", "3 MiB")
    assert "bad steps gone back from" not in found


def test_an_event_is_one_line_with_rank_and_step(tmp_path, capsys):
    log = logging.getLogger("shardtrain")
    before = log.handlers, log.propagate, log.level
    try:
        guards.log_to_stderr()
        Events(tmp_path)("checkpoint", 40, "saved", path="x")
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" rank 0 step 40: checkpoint: saved")
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 1
