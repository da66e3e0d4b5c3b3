"""The guard knows every phase that a run can be in: of an unknown one it could not tell who is behind."""

import re
from pathlib import Path

import shardtrain
from shardtrain.guard.peers import PHASES
from shardtrain.guard.watch import AFTER_TRAINING, SLOW_PHASES


def test_every_phase_of_a_run_is_known():
    root = Path(shardtrain.__file__).parent
    named = {
        phase
        for path in root.rglob("*.py")
        for phase in re.findall(r"progress\.at\(\s*\"(\w+)\"", path.read_text())
    }
    assert {"data", "compiling", "compute", "validating", "checkpoint", "evaluating"} <= named
    assert named | {*SLOW_PHASES, *AFTER_TRAINING} <= set(PHASES)
