"""`tools/tune_conv.py`: a table of one's own, from the command line to the choice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardtrain.kernels.conv import PASSES, tables
from shardtrain.kernels.conv.task import parse

ROOT = Path(__file__).parents[2]
LAYER = "2x10x10x4->6,window=3x3"


def tune(*flags):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "tune_conv.py"), *map(str, flags)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_a_layer_of_ones_own(tmp_path):
    file = tmp_path / "mine.json"
    strided = "2x10x10x4->6,window=3x3,strides=2x2,dtype=bfloat16"
    done = tune("--layer", LAYER, "--layer", strided, "--rounds", 1, "--out", file)
    assert done.returncode == 0, done.stderr
    assert "2 layers in" in done.stdout
    found = json.loads(file.read_text())
    assert [row["layer"] for row in found["rows"]] == [LAYER, strided]
    assert {name: len(found["rows"][0]["seconds"][name]) for name in PASSES} == dict.fromkeys(PASSES, 4)
    assert list(found["rows"][1]["seconds"]["input"]) == ["direct"]
    assert found["rates"] is None  # too few rows to fit a model
    assert set(tables.read(file.read_text(), "mine").seconds(parse(LAYER), "kernel")) == {
        "direct",
        "im2col",
        "fft",
        "winograd",
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--layer", LAYER), "error: --layer: name the file of your table with --out\n"),
        (("--layer", "8x8", "--out", "x.json"), "error: layer '8x8' is no convolution"),
        (("--rounds", 0), "error: --rounds 0: use 1 or more\n"),
    ],
)
def test_bad_flags(flags, says):
    done = tune(*flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr.partition("error: ")[2]
