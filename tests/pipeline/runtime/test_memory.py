"""What the compiled step needs as microbatches of one size grow in number: as much as the schedule holds."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.plan.pipelined import copies, memory

ROWS = 4  # of a microbatch


class Net(nnx.Module):
    """Four layers whose activations are much larger than their weights."""

    def __init__(self, rngs):
        kinds = {"rngs": rngs, "param_dtype": jnp.float32}
        self.layers = nnx.List([st.nn.Conv(1 if not i else 8, 8, (3, 3), **kinds) for i in range(4)])
        self.mean, self.head = st.nn.GlobalAvgPool(), st.nn.Linear(8, 2, **kinds)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(self.mean(x))


def compiled(schedule, microbatches):
    """The step, its stages, and what it needs on a device but for the batch and the state."""
    trainer = st.Trainer(
        nnx.eval_shape(lambda: Net(nnx.Rngs(0))),
        optax.sgd(0.1),
        mesh=st.make_mesh("pipe=2,data=1", devices=jax.devices()[:2]),
        accumulate=microbatches,
        pipeline=st.Pipeline(schedule),
    )
    rows = ROWS * microbatches
    images = jax.ShapeDtypeStruct((rows, 32, 32, 1), jnp.float32)
    program = trainer.prepare(images, jax.ShapeDtypeStruct((rows,), jnp.int32))
    return program, trainer.pipeline


def kept(pipeline):
    """Bytes that the costliest rank keeps for one microbatch until its backward ends."""
    rows = [(*p.saved, *p.lasting) for p in pipeline.programs]
    return max(sum(s.size * s.dtype.itemsize for s in row) for row in rows)


@pytest.mark.slow
def test_1f1b_needs_no_more_for_more_microbatches_and_gpipe_does():
    need = {m: memory(compiled("1f1b", m)[0]).temporary for m in (8, 32)}
    assert need[32] < 1.01 * need[8]
    all_kept = {}
    for m in (8, 16):
        program, pipeline = compiled("gpipe", m)
        all_kept[m] = memory(program).temporary
    assert (all_kept[16] - all_kept[8]) / 8 == pytest.approx(kept(pipeline), rel=0.01)
    assert all_kept[16] > 3 * need[32]


@pytest.mark.parametrize("schedule", ["gpipe", "zb-v"])
def test_a_tick_copies_nothing_but_flags(schedule):
    """XLA copies what a conditional takes and returns; so what is kept is written in loops of one turn."""
    found = copies(compiled(schedule, 8)[0].as_text())
    assert found.carried > 1e6
    assert found.loop + found.branch < 16


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "gpipe"])
def test_all_counts(schedule):
    programs = {m: compiled(schedule, m) for m in (4, 8, 16, 32)}
    need = {m: memory(program).temporary for m, (program, _) in programs.items()}
    for m in (4, 8, 16):
        slope = (need[2 * m] - need[m]) / m
        expected = kept(programs[m][1]) if schedule == "gpipe" else 0
        assert slope == pytest.approx(expected, rel=0.01, abs=0.01 * need[m] / m)
