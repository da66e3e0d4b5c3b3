"""Gradients of every schedule on every kind of mesh equal those of one device, in float64."""

import os
import subprocess
import sys

import pytest
from recipe_process import ROOT, environment

from .models import MODELS
from .parity import GROUPS, check

QUICK = [
    ("unequal", "pipe=2,data=2,height=2"),
    ("resnet", "pipe=4,channel=2"),
    ("alexnet", "pipe=2,height=2"),
]
LONG = [(QUICK[1], "interleaved"), (QUICK[2], "one stage a rank")]
SLOW = [
    (name, f"pipe={ranks}{inner}")
    for name in MODELS
    for ranks, inners in (
        (2, ("", ",data=2", ",height=2", ",channel=2", ",data=2,height=2")),
        (4, ("", ",data=2", ",height=2", ",channel=2")),
        (8, ("",)),
    )
    for inner in inners
    if (name, f"pipe={ranks}{inner}") not in QUICK
]
SIXTEEN = ["pipe=4,data=2,height=2", "pipe=8,data=2", "pipe=8,height=2", "pipe=8,channel=2"]


@pytest.mark.parametrize(
    ("name", "mesh", "group"),
    [
        pytest.param(*one, group, marks=pytest.mark.slow if (one, group) in LONG else ())
        for one in QUICK
        for group in GROUPS
    ],
)
def test_gradients(name, mesh, group):
    check(name, mesh, group, 8)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("name", "mesh"), SLOW)
def test_gradients_on_more_meshes(name, mesh, group):
    check(name, mesh, group, 8)


def check_on_sixteen(name, mesh, group):
    """In a process of its own, since the tests' has eight devices."""
    env = environment(PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    command = [sys.executable, "-m", "pipeline.sixteen", name, mesh, group]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gradients_on_sixteen_devices():
    check_on_sixteen("unequal", "pipe=4,data=2,height=2", "one stage a rank")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mesh", SIXTEEN)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_on_more_meshes_of_sixteen_devices(name, mesh, group):
    check_on_sixteen(name, mesh, group)
