"""Groups of a packed state are data: extra trees are packed, updated and saved as parameters are; sums are any tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from pipelined_models import Small, batches, close, trainer, wide

from shardtrain.train.pipelined.step import Pipelined
from shardtrain.train.step import Program

DECAY = 0.5


class Averaging(Program):
    """Updates an average of the weights and of the running statistics, and how often it was updated."""

    def finish(self, state, *args):
        after, reported = super().finish(state, *args)
        new = {**after.params, **after.model_state}
        old = state.extra["average"]
        average = {name: DECAY * old[name] + (1 - DECAY) * new[name] for name in old}
        extra = {"average": average, "clock": {"updates": state.extra["clock"]["updates"] + 1}}
        return dataclasses.replace(after, extra=extra), reported


class Counting(Program):
    """Reports sums of any shape and dtype: a matrix of counts, and the sum of the outputs by class."""

    def _sums(self, outputs, targets, real, rows, lies):
        sums = super()._sums(outputs, targets, real, rows, lies)
        weight = jnp.ones(rows) if real is None else real.astype(jnp.float32)
        coarse = jax.nn.one_hot(targets % 3, 3), jax.nn.one_hot(outputs.argmax(-1) % 3, 3)
        counts = jnp.einsum("na,nb,n->ab", *coarse, weight)
        user = {
            "confusion": counts,
            "rows": weight.astype(jnp.int32).sum(dtype=jnp.int32),
            "outputs": (outputs * weight[:, None]).sum(0),
        }
        return {**sums, "user": user}


def as_kind(one, kind):
    """Lets a trainer's step be that of another program."""
    fields = {f.name: getattr(one._program, f.name) for f in dataclasses.fields(one._program)}
    one._program = kind(**fields)
    return one


def extra_of(state):
    names = [*state.params, "norm.mean", "norm.var"]
    average = {name: {**state.params, **state.model_state}[name] for name in names}
    return {"average": average, "clock": {"updates": np.zeros((), np.int32)}}


def average_alone(one, steps):
    """What `Averaging` is after some steps, from states before and after each."""
    extra = extra_of(one.state)
    average = {name: np.array(v) for name, v in extra["average"].items()}
    for inputs, targets in batches()[:steps]:
        one.fit([(inputs, targets)], steps=int(one.state.step) + 1, progress=False)
        new = {**one.state.params, **one.state.model_state}
        average = {name: DECAY * v + (1 - DECAY) * np.array(new[name]) for name, v in average.items()}
    return average


@pytest.fixture(scope="module")
def averaged():
    """The packing, and the packed state after two steps, of a model cut in two stages."""
    one = as_kind(trainer("pipe=2,data=2"), Averaging)
    state = dataclasses.replace(one.state, extra=extra_of(one.state))
    specs = dataclasses.replace(one._specs, extra=jax.tree.map(lambda x: P(), state.extra))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    batch = one.place(*batches()[0])
    pipe = Pipelined(one._program, shapes, specs, one.mesh, batch, one._plan)
    packed = pipe.packing.pack(state)
    step = jax.jit(pipe.train_step(batch))
    for inputs, targets in batches()[:2]:
        packed, _ = step(packed, one.place(inputs, targets))
    return pipe, state, packed


def test_an_average_of_the_weights_is_updated_where_the_weights_are(averaged):
    pipe, _, packed = averaged
    named = pipe.packing.unpack(packed)
    assert int(named.extra["clock"]["updates"]) == 2
    close(named.extra["average"], average_alone(trainer("data=1"), 2))
    for name, value in named.params.items():
        if name in pipe.stage_of:
            assert named.extra["average"][name].sharding == value.sharding
    buffers, shared = packed.extra
    assert buffers.keys() >= {"float64"}
    assert len(shared) == 1 + sum(name not in pipe.stage_of for name in named.extra["average"])


def test_extra_trees_pack_and_unpack(averaged):
    pipe, state, _ = averaged
    packed = pipe.packing.pack(state)
    close(pipe.packing.unpack(packed), state, 0)
    assert jax.tree.structure(pipe.packing.pack(pipe.shapes)) == jax.tree.structure(packed)


def test_extra_trees_go_through_a_checkpoint(averaged):
    """In the form that every process has a part of."""
    pipe, _, packed = averaged
    everywhere = pipe.packing.unpack_onto_all_ranks(packed)
    close(everywhere, pipe.packing.unpack(packed), 0)
    close(pipe.packing.pack_from_all_ranks(everywhere), packed, 0)
    for shape, value in zip(
        jax.tree.leaves(pipe.packing.shapes_on_all_ranks.extra),
        jax.tree.leaves(everywhere.extra),
        strict=True,
    ):
        assert value.shape == shape.shape
        assert value.sharding.is_equivalent_to(shape.sharding, value.ndim)


@pytest.mark.parametrize("mesh", ["pipe=2,data=2", "pipe=2,channel=2"])
@pytest.mark.parametrize("rows", [16, 9])
def test_sums_of_any_shape_are_those_of_one_device(mesh, rows):
    """Also where a device computes just its block of them."""
    x, y = (part[:rows] for part in batches()[0])
    found = []
    for name in (mesh, "data=1"):
        one = as_kind(trainer(name, model=wide(Small(rate=0.0))), Counting)
        one.place(*batches()[0])
        batch = one.place(x, y)
        step = one.compiled_step(batch)
        state = jax.tree.map(jnp.copy, one.state)
        _, reported = step(state, batch)
        evaluated = one._compiled("evaluate", batch)(one.state, batch)[1]
        found.append((reported, evaluated))
    close(*found)
    (reported, evaluated), _ = found
    assert reported["user"]["confusion"].shape == (3, 3)
    assert evaluated["user"]["rows"].dtype == jnp.int32
    assert int(evaluated["user"]["rows"]) == rows == float(reported["user"]["confusion"].sum())


def test_sums_of_any_shape_over_replicas():
    ours, theirs = (
        as_kind(trainer(mesh, model=wide(Small(rate=0.0, norm=False))), Counting)
        for mesh in ("pipe=2,replica=2", "data=1")
    )
    batch, whole = (one.place(*batches()[0]) for one in (ours, theirs))
    sums = (
        ours.compiled_step(batch)(ours.state, batch)[1],
        theirs.compiled_step(whole)(theirs.state, whole)[1],
    )
    close(sums[0]["user"], sums[1]["user"])
