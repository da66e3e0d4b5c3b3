"""Every recipe in two processes: the losses of one, and the same files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from recipe_process import ROOT, environment

SMALL = {
    "train_local": "--mesh height=2,width=2 --batch-size 32 --features 4 4",
    "train_volume": "--mesh depth=2 --voxel 8 --features 4 8",
    "train_pipeline": "--mesh pipe=2,data=2 --model lenet --batch-size 32 --microbatches 4",
    "train_alexnet_hybrid": "--mesh channel=2 --width 8 --hidden 32 --batch-size 16",
}


def run(recipe, out, *launcher):
    command = [*launcher, sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *SMALL[recipe].split()]
    command += ["--steps", "4", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.timeout(600)
def test_two_processes_give_the_losses_and_files_of_one(recipe, tmp_path):
    if recipe == "train_volume":
        pytest.importorskip("nilearn")
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run(recipe, one)
    launcher = [sys.executable, "-m", "shardtrain", "launch", "local", "-n", "2", "--"]
    together = run(recipe, two, *launcher)
    assert together["processes"] == 2
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-5)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
