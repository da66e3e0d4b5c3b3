"""Gradients of every schedule on every kind of mesh equal those of one device, in float64."""

import os
import subprocess
import sys

import pytest
from flax import nnx
from recipe_process import ROOT, environment

import shardtrain as st
from shardtrain.pipeline import make

from ..models import KINDS, MODELS, data
from ..parity import GROUPS, Case, assert_same, check

QUICK = [
    ("unequal", "pipe=2,data=2,height=2"),
    ("resnet", "pipe=4,channel=2"),
    ("alexnet", "pipe=2,height=2"),
]
LONG = {
    QUICK[0]: ("interleaved", "v"),
    QUICK[1]: tuple(GROUPS),
    QUICK[2]: tuple(GROUPS),
}
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
        pytest.param(*one, group, marks=pytest.mark.slow if group in LONG.get(one, ()) else ())
        for one in QUICK
        for group in GROUPS
    ],
)
def test_gradients(name, mesh, group):
    check(name, mesh, group, 8)


@pytest.mark.slow
def test_a_deep_network_whose_stages_keep_their_inputs_alone():
    """A value is used along many paths; each is looked at once."""
    model = st.models.ResNet(18, 8, 2, stem="small", width=4, **KINDS, rngs=nnx.Rngs(0))
    schedule = make("1f1b", 2, 2)
    case = Case.of(model, "pipe=2", *data("resnet", 4), schedule, remat="nothing")
    first, second = case.pipeline.programs
    assert (first.saved, first.lasting) == ((), ())
    assert sum(s.size for s in (*second.saved, *second.lasting)) == sum(s.size for s in second.ins)
    assert_same(case.run([schedule])[0], case.alone(), "remat")


@pytest.mark.slow
def test_a_schedule_that_reaches_its_steady_state():
    """With four ranks zb-v does not with the four microbatches of the other tests."""
    schedule = make("zb-v", 4, 8)
    case = Case.of(MODELS["unequal"][0](nnx.Rngs(0)), "pipe=4", *data("unequal", 8), schedule)
    assert_same(case.run([schedule])[0], case.alone(), schedule.name)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("name", "mesh"), SLOW)
def test_gradients_on_more_meshes(name, mesh, group):
    check(name, mesh, group, 8)


def check_on_many(name, mesh, group):
    """In a process of its own, since the tests' has eight devices."""
    env = environment(PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    command = [sys.executable, "-m", "pipeline.many", name, mesh, group]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_gradients_on_sixteen_devices():
    check_on_many("unequal", "pipe=4,data=2,height=2", "one stage a rank")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mesh", SIXTEEN)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_on_more_meshes_of_sixteen_devices(name, mesh, group):
    check_on_many(name, mesh, group)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_on_thirty_two_devices(name, group):
    check_on_many(name, "pipe=8,data=2,height=2", group)
