"""Groups of a packed state are data: extra trees are packed, updated and saved as parameters are; sums are any tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pipelined_models import Small, batches, close, trainer, wide

import shardtrain as st
from shardtrain.train.extra import on_devices


class Updates(st.Extra):
    """How many updates there were, on every device."""

    placement = "whole"

    def init(self, params):
        return {"updates": jnp.zeros((), jnp.int32)}

    def update(self, tree, state):
        return {"updates": tree["updates"] + 1}


@pytest.fixture(scope="module")
def averaged():
    """A model in two stages that has seen two batches, with an average of its weights."""
    one = trainer("pipe=2,data=2", optax.adam(0.01), extra={"ema": st.EMA(0.5), "clock": Updates()})
    one.fit(batches()[:2], steps=2, progress=False)
    return one


def test_an_average_of_a_weight_is_stored_with_the_weight(averaged):
    packing, state = averaged.pipeline.packing, on_devices(averaged.state)
    named = packing.unpack(state)
    assert int(named.extra["clock"]["updates"]) == 2
    for name, value in named.params.items():
        assert named.extra["ema"][name].sharding == value.sharding
        assert (np.asarray(named.extra["ema"][name]) != np.asarray(value)).any() or name.startswith("idle")
    _, shared = state.extra
    unused = [name for name in named.params if name not in averaged.pipeline.stage_of]
    assert len(shared) == 1 + len(unused) == 3


def test_extra_trees_pack_and_unpack(averaged):
    packing, state = averaged.pipeline.packing, on_devices(averaged.state)
    named = packing.unpack(state)
    close(packing.pack(named), state, 0)
    assert jax.tree.structure(packing.pack(packing.shapes)) == jax.tree.structure(state)


def test_extra_trees_go_through_the_form_of_checkpoints(averaged):
    """In which every process has a part of each array."""
    packing, state = averaged.pipeline.packing, on_devices(averaged.state)
    everywhere = packing.unpack_onto_all_ranks(state)
    close(everywhere, packing.unpack(state), 0)
    close(packing.pack_from_all_ranks(everywhere), state, 0)
    shapes, values = map(jax.tree.leaves, (packing.shapes_on_all_ranks.extra, everywhere.extra))
    for shape, value in zip(shapes, values, strict=True):
        assert value.shape == shape.shape
        assert value.sharding.is_equivalent_to(shape.sharding, value.ndim)


def user_sums(outputs, targets, weights):
    """A matrix of counts, a whole number, and the sum of the outputs by class."""
    real = weights > 0
    pairs = jax.nn.one_hot(targets % 3, 3), jax.nn.one_hot(outputs.argmax(-1) % 3, 3)
    return {
        "confusion": jnp.einsum("na,nb,n->ab", *pairs, weights),
        "rows": real.sum(dtype=jnp.int32),
        "outputs": jnp.where(real[:, None], outputs, 0).sum(0),
    }


USER = {"user": st.metrics.Metric(user_sums, lambda total: float(total["rows"]))}


def with_sums(mesh, **kwargs):
    one = trainer(mesh, model=wide(Small(rate=0.0, **kwargs)), metrics=USER)
    one.prepare(*batches()[0])
    return one


def reported(one, batch):
    state = jax.tree.map(jnp.copy, on_devices(one.state))
    return one.compiled_step(batch)(state, batch)[1]


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        ("pipe=2,channel=2", 9),
        pytest.param("pipe=2,data=2", 9, marks=pytest.mark.slow),
        pytest.param("pipe=2,channel=2", 16, marks=pytest.mark.slow),
        pytest.param("pipe=2,data=2", 16, marks=pytest.mark.slow),
    ],
)
def test_sums_of_any_shape_are_those_of_one_device(mesh, rows):
    """Also where a device computes just its block of them."""
    x, y = (part[:rows] for part in batches()[0])
    found = []
    for one in (with_sums(mesh), with_sums("data=1")):
        batch = one.place(x, y)
        evaluated = one._compiled("evaluate", batch)(on_devices(one.state), batch)[1]
        found.append((reported(one, batch), evaluated))
    close(*found)
    for sums in found[0]:
        user = sums["metrics"]["user"]
        assert user["confusion"].shape == (3, 3)
        assert user["rows"].dtype == jnp.int32
        assert int(user["rows"]) == rows == float(user["confusion"].sum())


def test_sums_of_any_shape_over_replicas():
    """Both have the same weights at first, and each has half of the examples."""
    ours, theirs = with_sums("pipe=2,replica=2", norm=False), with_sums("data=1", norm=False)
    mine, whole = (reported(one, one.place(*batches()[0]))["metrics"] for one in (ours, theirs))
    close(mine, whole)
