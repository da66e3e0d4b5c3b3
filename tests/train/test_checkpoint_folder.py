"""A folder in which no checkpoint can be begun is a sentence, and the process ends with it."""

import subprocess
import sys

from recipe_process import environment

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
