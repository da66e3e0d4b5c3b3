"""A folder that cannot take a checkpoint is one sentence, after which the process ends."""

import errno
import os
import subprocess
import sys

import pytest
from recipe_process import environment

from shardtrain.checkpoint.checkpoints import _disk_error

PROGRAM = """
import pathlib, shutil, sys
import numpy as np
from shardtrain import Checkpoints, UserError
folder = pathlib.Path(sys.argv[1])
state = {"x": np.arange(200_000.0), "y": np.zeros(3)}
try:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        shutil.rmtree(folder)
        folder.write_text("")
        checkpoints.save(2, state)
except UserError as error:
    print(error)
"""


def test_a_folder_that_cannot_be_made_does_not_hold_the_process(tmp_path):
    """Orbax's threads would wait for it, long after the sentence."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert "could not be written to" in done.stdout
    assert "Not a directory" in done.stdout
    assert "Traceback" not in done.stderr


FULL = {
    "python": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "python, of a file": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/mine/manifest.json"),
    "tensorstore": ValueError(f"UNKNOWN: Error writing d/0 [os_error_code='{errno.ENOSPC}']"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_the_same_reason_whoever_says_it(error):
    assert _disk_error(error) == "No space left on device"
