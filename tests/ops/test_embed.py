"""Embeddings, tables cut by rows, on every mesh against `jnp.take` on one device."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, make_mesh, ops

from .parity import ALL_MESHES, LAYOUTS, MESHES, examples, named, numbers, parity
from .test_census import WORD, facts, sent


def indices_of(shape, rows, seed=0):
    """As many from the front as, negative, from the end; some of them twice."""
    return np.random.default_rng([seed, *shape]).integers(-rows, rows, shape)


def table_parity(mesh, shape, rows, features, layout=None):
    indices = indices_of(shape, rows)
    op = functools.partial(ops.embed, jnp.asarray(indices), layout=layout)
    parity(op, lambda table: jnp.take(table, indices, axis=0), [numbers(rows, features)], mesh)


TABLES = {
    "shape": st.sampled_from(((4,), (3, 5), (8, 16), (2, 3, 5), (3, 2, 3, 2))),
    "rows": st.sampled_from((1, 2, 3, 7, 8, 16, 31)),
    "features": st.sampled_from((1, 2, 3, 8, 16)),
    "layout": st.sampled_from(LAYOUTS),
}


@examples(5)
@given(mesh=st.sampled_from(MESHES), **TABLES)
def test_any_table_on_any_mesh(mesh, shape, rows, features, layout):
    table_parity(mesh, shape, rows, features, layout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(150)
@given(mesh=st.sampled_from(ALL_MESHES), **TABLES)
def test_many_tables_on_every_mesh(mesh, shape, rows, features, layout):
    table_parity(mesh, shape, rows, features, layout)


NOTORIOUS = {
    "7 rows on 8 devices": ("channel=8", (4, 3), 7, 8),
    "features that cannot be cut": ("data=2,height=2,channel=2", (3, 5), 7, 3),
    "parameters spread over the features": (
        "data=2,width=2,channel=2",
        (3, 5),
        9,
        8,
        Layout(parameters=("data", "width")),
    ),
}
SELDOM = {
    "no axis for channels": ("data=2,width=4", (3, 5), 9, 4),
    "one row on 8 devices": ("channel=8", (4,), 1, 8),
    "images of indices": ("height=2,width=2,channel=2", (3, 5, 3), 6, 4),
}


@pytest.mark.parametrize(
    "case", named({k: (v,) for k, v in NOTORIOUS.items()}, {k: (v,) for k, v in SELDOM.items()})
)
def test_notorious(case):
    table_parity(*case)


@pytest.mark.parametrize(
    "mesh", ["data=2,channel=4", pytest.param("width=2,channel=2", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("features", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_indices_outside_the_table(mesh, features):
    """NaN as from `jnp.take`, also where the padding of the table would have a row; and no gradient."""
    indices = jnp.array([[0, 6, 7, 8], [-1, -7, -8, 99], [-99, 3, 3, 5]])
    table = jnp.asarray(numbers(7, features))

    def both(f):
        values, pull = jax.vjp(f, table)
        return values, pull(jnp.ones_like(values))[0]

    expected = both(lambda table: jnp.take(table, indices, axis=0))
    assert np.isnan(expected[0]).any(-1).sum() == 5
    with jax.set_mesh(make_mesh(mesh)):
        found = jax.jit(lambda: both(functools.partial(ops.embed, indices)))()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_mesh():
    table, indices = jnp.asarray(numbers(5, 3)), jnp.array([[0, -1, 4], [9, -6, 2]])
    np.testing.assert_array_equal(ops.embed(indices, table), jnp.take(table, indices, axis=0))


# --- what is sent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [8, pytest.param(6, marks=pytest.mark.slow)])
def test_rows_stay_where_they_are(features):
    """The sums of the shards' finds travel; of the gradient only what a device's own rows get."""
    mesh = make_mesh("data=2,channel=4")
    rows, shape = 16, (4, 6)
    layout = Layout()
    home = layout.parameter((rows, features), 0, mesh)
    assert home == P("channel", None)
    where = P("data", None, "channel" if features % 4 == 0 else None)
    op = functools.partial(ops.embed, jnp.asarray(indices_of(shape, rows)), layout=layout)
    moved = sent(op, mesh, [(rows, features)], [home], out=where)
    found = math.prod(shape) // 2 * features * WORD
    gradient = "all-reduce", ("data",), rows // 4 * features * WORD
    if features % 4 == 0:
        there, back = ("reduce-scatter", ("channel",), found), ("all-gather", ("channel",), found // 4)
        assert facts(moved) == Counter({there: 1, back: 1, gradient: 1})
    else:
        assert facts(moved) == Counter({("all-reduce", ("channel",), found): 1, gradient: 1})


@pytest.mark.parametrize(
    ("dtype", "rows"), [("uint8", 256), ("int8", 300), ("uint8", 1000), ("int16", 40000)]
)
@pytest.mark.parametrize("mesh", ["data=1", "data=2,channel=4"])
def test_indices_of_few_bytes(dtype, rows, mesh):
    """Against a plain lookup, of numbers that the table has more of than the type."""
    info = np.iinfo(dtype)
    indices = np.array([[0, 1, info.max // 2, info.max], [info.min, -1 if info.min else 3, 2, 5]], dtype)
    table = numbers(rows, 4)
    with jax.set_mesh(make_mesh(mesh)):
        found = ops.embed(jnp.asarray(indices), jnp.asarray(table))
    np.testing.assert_array_equal(found, table[indices.astype(int)])


def test_a_spread_table_is_gathered_and_its_gradient_scattered():
    """As for any parameter: 3/4 of it to and fro, and no sum of the whole."""
    mesh, layout = make_mesh("data=4,channel=2"), Layout(parameters=("data",))
    indices = jnp.asarray(np.arange(32).reshape(8, 4) % 16)

    def lookup(table):
        return ops.embed(indices, table, layout=layout)

    shapes, specs = [(16, 8)], [P("channel", "data")]
    rows = sent(lookup, mesh, shapes, specs, out=P("data", None, "channel"))
    table = 16 * 8 * WORD
    got = {(r.kind, r.payload) for r in rows if r.axes == ("data",)}
    assert got == {("all-gather", table // 8), ("reduce-scatter", table // 2)}
    parity(lookup, lambda table: table[indices], [numbers(16, 8)], mesh)
