"""What a compiled pipeline sends is its closed form; and the tool that compiles one for cards that are not here."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax

import shardtrain as st
from shardtrain import UserError
from shardtrain.plan.pipelined import _merged, copies, memory, sends, ticks, traffic
from shardtrain.plan.trace import sent

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def step():
    def make():
        return st.models.ResNet(8, classes=4, channels=1, rngs=nnx.Rngs(0))

    mesh = st.make_mesh("pipe=2,data=2,height=2")
    trainer = st.Trainer(nnx.eval_shape(make), optax.adam(1e-3), mesh=mesh, accumulate=2)
    images = jax.ShapeDtypeStruct((8, 16, 16, 1), jnp.float32)
    program = trainer.prepare(images, jax.ShapeDtypeStruct((8,), jnp.int32))
    return trainer.pipeline, program


def test_what_is_sent_is_the_closed_form(step):
    pipeline, program = step
    found = traffic(pipeline, program)
    assert {t.what for t in found} == {"messages", "in stages", "gradients", "others"}
    for t in found:
        assert t.right, t
        if t.what != "others":
            assert t.payload == t.expected == t.merged > 0, t
    (messages,) = (t for t in found if t.what == "messages")
    out = pipeline.programs[0].outs
    assert messages.count == ticks(pipeline)  # both ways in one permute, of two ranks
    # two microbatches there and back, each in a tick of its own
    assert sends(pipeline) == (4, ticks(pipeline))
    assert messages.payload == messages.count * sum(s.size * s.dtype.itemsize for s in out)
    # Batch norm's backward pass needs its scale's and bias's gradients summed, in every microbatch.
    params = pipeline.shapes.params.items()
    whole = sum(s.size * s.dtype.itemsize for name, s in params if name.endswith("kernel") or "head" in name)
    assert sum(t.payload for t in found if t.what == "gradients") == whole  # once, not once a microbatch


@pytest.mark.parametrize("what", ["messages", "gradients", "in stages"])
def test_more_than_the_closed_form_is_noticed(step, what):
    pipeline, program = step
    for t in traffic(pipeline, program):
        if t.what == what:
            assert not dataclasses.replace(t, payload=t.payload + t.expected).right


def test_a_collective_that_is_lost_is_noticed(step):
    pipeline, program = step
    text = program.as_text()
    for t in traffic(pipeline, text):
        if t.what == "in stages":
            assert not dataclasses.replace(t, payload=0, count=0).right
            assert not dataclasses.replace(t, payload=t.payload - t.payload // t.count).right
    without = re.sub(r"^.* all-gather\(.*$", "", text, flags=re.MULTILINE)
    assert without != text
    assert [t.kind for t in traffic(pipeline, without) if not t.right] == ["all-gather"]


def test_only_what_is_sent_twice_out_of_the_same_operands_may_be_merged():
    def program(x, y):
        return [lax.psum(v, "data") for v in (x + 1, x + 1, y + 1, x + 2)]

    jaxpr = jax.make_jaxpr(program, axis_env=[("data", 2)])(1.0, 1.0).jaxpr
    mesh = st.make_mesh("data=2")
    assert (len(sent(jaxpr, mesh)), len(sent(_merged(jaxpr), mesh))) == (4, 3)


def test_what_a_device_needs(step):
    _, program = step
    need, text = memory(program), program.as_text()
    assert need.arguments > 0
    assert need.temporary > copies(text).carried / 2
    with pytest.raises(UserError, match="no loop over loops of one turn"):
        copies(text.replace(" while(", " call("))


def tool(*arguments, timeout=280):
    return subprocess.run(
        [sys.executable, "tools/plan_pipeline.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )


SMALL = ["--model=resnet8", "--image=32", "--classes=4", "--batch=8", "--microbatches=2"]
MESH = "--mesh=pipe=2,data=2,height=2"


@pytest.mark.slow
def test_compiled_for_cards_that_are_not_here(tmp_path):
    if not (Path(sys.prefix) / "gpu-compiler").is_dir():
        pytest.skip("jax's CUDA plugin is not installed; run `make gpu-compiler`")
    run = tool(*SMALL, MESH, "--hlo", str(tmp_path / "step.hlo"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 100
    assert "pipe=2,data=2,height=2 on sm_90a, 2 host(s)" in run.stdout
    assert re.search(r"messages *│collective-permute *│pipe *│ *\d+│ *[\d.]+│ *equal", run.stdout)
    assert re.search(r"gradients *│all-reduce *│data,height *│ *\d+│ *[\d.]+│ *equal", run.stdout)
    assert re.search(r"one device: arguments \d+ MiB, temporary \d+ MiB, peak \d+ MiB", run.stdout)
    text = (tmp_path / "step.hlo").read_text()
    assert "collective-permute-start" in text
    assert "__cudnn$conv" in text


def test_the_tool_speaks_to_its_user(tmp_path):
    run = tool("--cpu", *SMALL, "--mesh=data=2,height=2")
    assert run.returncode == 1
    assert "has no pipe" in run.stderr
    for wrong, sentence in (
        ("--mesh=pipe=x", "error: mesh 'pipe=x': 'pipe=x' is not axis=number"),
        ("--mesh=pipe=-1", "error: --mesh pipe=-1: no device is here to count; use sizes of 1 or more"),
        ("--hosts=0", "--hosts 0: use 1 or more"),
    ):
        assert sentence in tool("--cpu", *SMALL, MESH, wrong).stderr
    run = tool("--cpu", *SMALL, MESH, "--batch=7")
    assert "a batch of 7 does not divide" in run.stderr
    run = tool("--cpu", *SMALL, MESH, "--hlo", str(tmp_path / "none" / "x"))
    assert run.returncode == 2
    assert "there is no folder" in run.stderr
