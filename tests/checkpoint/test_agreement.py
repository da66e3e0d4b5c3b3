"""Two real processes that see different files, or read different parts, agree on what is damaged."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from recipe_process import environment

from shardtrain import Checkpoints
from shardtrain.launch.local import free_port

PROGRAM = """
import json, sys
from pathlib import Path
import jax
port, rank, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from shardtrain import Checkpoints

found = {"steps": Checkpoints(folder / f"of {rank}").steps()}
for name in ("whole", "even", "odd"):
    found[name] = Checkpoints(folder / name).newest()[0]
(folder / f"{rank}.json").write_text(json.dumps(found))
"""


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    """Copies of three checkpoints: `even` and `odd` have each such file of the last one damaged, in the order
    of names; `of 1` is older than `of 0`, as a network file system shows it to one host and not to another."""
    with Checkpoints(tmp_path / "whole") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": np.arange(6.0), "y": np.ones(3)})
    for name in ("even", "odd", "of 0", "of 1"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    shutil.rmtree(tmp_path / "of 1" / "3")
    files = sorted(json.loads((tmp_path / "whole/3/default/manifest.json").read_text())["files"])
    assert len(files) > 2
    for k, file in enumerate(files):
        flip(tmp_path / ("odd" if k % 2 else "even") / "3" / "default" / file)
    return tmp_path


def test_processes_judge_alike_and_see_what_one_of_them_sees(folder):
    port = str(free_port())
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(rank), str(folder)],
            env=environment(JAX_PLATFORMS="cpu"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    for rank in range(2):
        found = json.loads((folder / f"{rank}.json").read_text())
        # The damage is in the share of one process, and both go back; of steps the first one knows.
        assert found == {"steps": [1, 2, 3], "whole": 3, "even": 2, "odd": 2}
        assert errors[rank].count("DAMAGED CHECKPOINT") == 2
