"""A collective that waits for devices which take another branch is found in the compiled program."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain import UserError, make_mesh
from shardtrain.pipeline.runtime.divergence import in_branches, refuse_divergent


@pytest.fixture(scope="module")
def mesh():
    return make_mesh("pipe=2,height=4")


def compiled(mesh, f, *, axes=P("height")):
    """Text of `f` on one device's f32[2,4] of rows; it is never run."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 4), jnp.float32)).compile().as_text()


def shift(x):
    return lax.ppermute(x, "height", [(i, (i + 1) % 4) for i in range(4)])


def divergent(branch):
    """A loop in which each stage takes its own branch, the second with `branch` inside."""

    def f(x):
        def tick(x, _):
            return lax.switch(lax.axis_index("pipe"), [jnp.sin, branch], x), None

        return lax.scan(tick, x, length=3)[0]

    return f


def looping(x):
    return lax.fori_loop(0, 5, lambda _, x: shift(jnp.sin(x)), x)


def until(x):
    """A loop that each device leaves when it likes, with a permute in it."""
    return lax.while_loop(lambda y: y.sum() < 3, lambda y: shift(y) + 1, x)


BAD = {
    "in a branch": shift,
    "in a loop in a branch": looping,
    "in a branch in a branch": lambda x: lax.cond(x.sum() > 0, shift, jnp.cos, x),
    "in a called function in a branch": jax.jit(lambda x: shift(jnp.sin(x))),
}


@pytest.mark.parametrize("branch", BAD.values(), ids=BAD)
def test_a_permute_in_a_branch_is_refused(mesh, branch):
    text = compiled(mesh, divergent(branch))
    with pytest.raises(
        UserError, match=r"collective-permute '[\w.-]*ppermute[\w.-]*' \(.*ppermute\) in a branch"
    ):
        refuse_divergent(text, mesh)


SENTENCES = {
    "conditional": (
        divergent(shift),
        "a branch of the conditional {}: all devices must meet in it, but only some devices take the branch",
    ),
    "while": (
        until,
        "the loop {}, whose length XLA does not know: all devices must meet in it, but only some devices run it "
        "as often",
    ),
}


@pytest.mark.parametrize("op", SENTENCES)
def test_the_sentence_names_the_instruction_and_what_it_is_in(mesh, op):
    f, place = SENTENCES[op]
    text = compiled(mesh, f)
    ((branch, permute),) = in_branches(text)
    with pytest.raises(UserError) as error:
        refuse_divergent(text, mesh)
    where = place.format(f"{branch.name!r} ({branch.source})")
    assert str(error.value) == (
        f"the compiled program has the collective-permute {permute.name!r} ({permute.source}) in {where}, and "
        "they would wait forever; use psum, all_gather or another collective of groups that stay inside a stage"
    )
    assert permute.op == "collective-permute"
    assert branch.op == op


def listed(turns, do):
    """A scan over numbers, in which `do` gets a number and the array."""
    return lambda x: lax.scan(lambda x, n: (do(n, x), None), x, jnp.asarray(turns))[0]


def once(needed, x, send=shift):
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.bool_(False), send(c[1])), (needed, x))[1]


def drifting(x):
    """A loop that asks for a number which is the same everywhere at first, and not after its first turn."""
    start = jnp.int32(0), x
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + (c[1].sum() > 0), shift(c[1])), start)[1]


UNLIKE = {
    "by a device's place": listed([0, 1, 0], lambda n, x: once(n == lax.axis_index("pipe"), x)),
    "by its data": listed([0, 1, 0], lambda n, x: once(n < x[0, 0], x)),
    "after a turn": drifting,
    "a branch by its place": listed(
        [0, 1], lambda n, x: lax.cond(n == lax.axis_index("pipe"), shift, jnp.sin, x)
    ),
}


@pytest.mark.parametrize("f", UNLIKE.values(), ids=UNLIKE)
def test_a_loop_that_devices_leave_unlike_is_refused(mesh, f):
    with pytest.raises(UserError, match="the compiled program has the collective-permute"):
        refuse_divergent(compiled(mesh, f), mesh)


def of_a_loop_of_unlike_turns(needed, x, send):
    """What a loop counts up to on this device, from a constant, decides."""
    counted = lax.while_loop(lambda n: n < lax.axis_index("pipe"), lambda n: n + 1, jnp.int32(0))
    return once(counted == needed, x, send)


STAGES_ALONE = {
    "by a device's place": lambda n, x, send: once(n == lax.axis_index("pipe"), x, send),
    "by turns that differ": of_a_loop_of_unlike_turns,
}


@pytest.mark.parametrize("do", STAGES_ALONE.values(), ids=STAGES_ALONE)
def test_a_loop_that_devices_leave_unlike_is_refused_where_a_stage_is_a_device(do):
    """There the compiled program asks for a device's number itself."""
    mesh = make_mesh("pipe=4")

    def send(x):
        return lax.ppermute(x, "pipe", [(i, (i + 1) % 4) for i in range(4)])

    text = compiled(mesh, listed([0, 1, 0], functools.partial(do, send=send)), axes=P("pipe"))
    assert "partition-id" in text
    with pytest.raises(UserError, match="the compiled program has the collective-permute"):
        refuse_divergent(text, mesh)


FUSED = """HloModule jit_f, num_partitions=8

%asked () -> pred[] {
  %two = u32[] constant(2)
  %number = u32[] INSIDE
  ROOT %less = pred[] compare(%number, %two), direction=LT
}

%sending (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %cp = f32[4]{0} collective-permute(%q), source_target_pairs={{0,4},{4,0}}
}

%keeping (k: f32[4]) -> f32[4] {
  ROOT %k = f32[4]{0} parameter(0)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %fused = pred[] fusion(), kind=kLoop, calls=%asked
  ROOT %cond = f32[4]{0} conditional(%fused, %x, %x), true_computation=%sending, false_computation=%keeping
}
"""


def test_what_a_fusion_asks_inside_counts(mesh):
    refuse_divergent(FUSED.replace("INSIDE", "constant(1)"), mesh)
    with pytest.raises(UserError, match="'cp' in a branch of the conditional 'cond'"):
        refuse_divergent(FUSED.replace("INSIDE", "partition-id()"), mesh)


GOOD = {
    "in a loop that all enter by a list": listed([0, 1, 0], lambda n, x: once(n == 1, x)),
    "in a branch that all take by a list": listed(
        [0, 1, 0], lambda n, x: lax.cond(n == 1, shift, jnp.sin, x)
    ),
    "in a loop that all run": looping,
    "behind a conditional": lambda x: shift(divergent(jnp.cos)(x)),
    "a sum within a stage": divergent(lambda x: lax.psum(x, "height")),
    "a gather within a stage": divergent(lambda x: lax.all_gather(x, "height").sum(0)),
}


@pytest.mark.parametrize("f", GOOD.values(), ids=GOOD)
def test_what_all_devices_run_passes(mesh, f):
    refuse_divergent(compiled(mesh, f), mesh)


def test_a_sum_over_stages_in_a_branch_is_refused(mesh):
    text = compiled(mesh, divergent(lambda x: lax.psum(x, ("pipe", "height"))))
    with pytest.raises(UserError, match=r"all-reduce .* its groups span pipe, but"):
        refuse_divergent(text, mesh)
    refuse_divergent(text, mesh, axes=())


GPU = """HloModule jit_f, num_partitions=8

%branch_of_no_return (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} copy(%p)
}

%sending (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %cps = (f32[4]{0}, f32[4]{0}) collective-permute-start(%q), source_target_pairs={{0,4},{4,0}}
  ROOT %done = f32[4]{0} collective-permute-done(%cps)
}

%wrapped (w: f32[4]) -> f32[4] {
  %w = f32[4]{0} parameter(0)
  ROOT %cp = f32[4]{0} collective-permute(%w), source_target_pairs={{0,4},{4,0}}
}

%asynchronous (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %s = ((f32[4]{0}), f32[4]{0}) async-start(%a), calls=%wrapped
  ROOT %d = f32[4]{0} async-done(%s)
}

ENTRY %main (x: f32[4], i: s32[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %i = s32[] parameter(1)
  ENTRY_LINE
}
"""
CONDITIONAL = "ROOT %cond = f32[4]{0} conditional(%i, %x, %x), branch_computations={%branch_of_no_return, "

PREDICATED = (
    "ROOT %cond = f32[4]{0} conditional(%i, %x, %x), true_computation=%branch_of_no_return, "
    "false_computation=%sending"
)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (CONDITIONAL + "%sending}", "cps"),
        (CONDITIONAL + "%asynchronous}", "cp"),
        (PREDICATED, "cps"),
        ("ROOT %call = f32[4]{0} call(%x), to_apply=%sending", None),
        ("ROOT %s = f32[4]{0} call(%x), to_apply=%asynchronous", None),
    ],
)
def test_the_forms_of_gpus(mesh, line, name):
    text = GPU.replace("ENTRY_LINE", line)
    if name is None:
        return refuse_divergent(text, mesh)
    with pytest.raises(
        UserError, match=f"the collective-permute '{name}' in a branch of the conditional 'cond'"
    ):
        refuse_divergent(text, mesh)


class Sending(nnx.Module):
    """A layer of a user who sends by hand."""

    def __call__(self, x):
        return jax.shard_map(
            shift, axis_names={"height"}, in_specs=P(None, "height"), out_specs=P(None, "height")
        )(x)


class Net(nnx.Module):
    def __init__(self, layer, rngs):
        self.first = st.nn.Conv(1, 4, (3, 3), rngs=rngs)
        self.layer, self.flatten = layer, st.nn.Flatten()
        self.head = st.nn.Linear(8 * 4 * 4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.flatten(self.layer(nnx.relu(self.first(x)))))


def trained_on(mesh, layer):
    model = nnx.eval_shape(lambda: Net(layer, nnx.Rngs(0)))
    trainer = st.Trainer(model, optax.sgd(0.1), mesh=mesh, accumulate=2)
    images = jax.ShapeDtypeStruct((4, 8, 4, 1), jnp.float32)
    return trainer, trainer.prepare(images, jax.ShapeDtypeStruct((4,), jnp.int32))


def test_a_pipelined_step_passes_and_one_that_sends_by_hand_does_not(mesh):
    trainer, program = trained_on(mesh, jnp.sin)
    text = program.as_text()
    assert "collective-permute" in text  # the messages between stages
    kinds = {(branch.op, branch.at_most_once) for branch, _ in in_branches(text)}
    assert kinds == {("while", True), ("conditional", False)}  # halos; sums of gradients
    refuse_divergent(text, trainer.mesh)
    with pytest.raises(UserError, match=r"collective-permute .* in the loop .* whose length"):
        trained_on(mesh, Sending())
