"""Flattening and concatenation on every mesh, and what they send."""

import functools
import math

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shardtrain import make_mesh, ops
from shardtrain.mesh import parse

from .parity import ALL_MESHES, LAYOUTS, MESHES, examples, numbers, parity
from .test_census import WORD, cut, facts, sent, total


@st.composite
def joined(draw, meshes=MESHES):
    """A mesh, arrays of the same pixels, and a layout."""
    mesh = draw(st.sampled_from(meshes))
    shards = parse(mesh).get("channel", 1)
    rank = draw(st.sampled_from((0, 1, 2, 2, 3)))
    shape = [draw(st.integers(1, 5)), *(draw(st.integers(1, 9 if rank < 3 else 4)) for _ in range(rank))]
    channels = draw(
        st.lists(st.sampled_from((1, 2, 3, shards, 2 * shards, 3 * shards)), min_size=1, max_size=4)
    )
    return mesh, [(*shape, c) for c in channels], draw(st.sampled_from(LAYOUTS))


def concat_parity(mesh, shapes, layout):
    def op(*arrays):
        return jnp.sin(ops.concat(arrays, layout=layout))

    def reference(*arrays):
        return jnp.sin(jnp.concatenate(arrays, axis=-1))

    parity(op, reference, [numbers(*shape, seed=i) for i, shape in enumerate(shapes)], mesh)


def flatten_parity(mesh, shape, layout):
    op = functools.partial(ops.flatten, layout=layout)
    parity(op, lambda x: x.reshape(x.shape[0], math.prod(x.shape[1:])), [numbers(*shape)], mesh)


@examples(8)
@given(joined())
def test_any_arrays_joined(drawn):
    concat_parity(*drawn)


@examples(6)
@given(joined())
def test_any_array_flattened(drawn):
    mesh, shapes, layout = drawn
    flatten_parity(mesh, shapes[0], layout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(150)
@given(joined(ALL_MESHES))
def test_many_arrays_on_every_mesh(drawn):
    mesh, shapes, layout = drawn
    concat_parity(mesh, shapes, layout)
    flatten_parity(mesh, shapes[0], layout)


def test_no_examples():
    flatten_parity("data=2,height=2", (0, 8, 6, 4), None)


@pytest.mark.parametrize(
    ("channels", "kind", "values"),
    [
        ((4, 12), "collective-permute", None),
        ((6, 2), None, 0),  # neither is cut: the result is, which sends nothing
        ((4, 2), "all-gather", 3 * 1),  # the one that is cut is made whole
    ],
)
def test_what_joining_sends(channels, kind, values):
    """Forward: what `concat` says, and no pixel."""
    mesh, (n, h, w) = make_mesh("height=2,channel=4"), (2, 8, 4)
    shapes = [(n, h, w, c) for c in channels]
    where = cut(mesh, "data", "height", "width", "channel")
    specs = [where if c % 4 == 0 else P(None, "height") for c in channels]
    out = where if sum(channels) % 4 == 0 else P(None, "height")
    rows = sent(lambda *arrays: ops.concat(arrays), mesh, shapes, specs, out=out, backward=False)
    assert {row.kind for row in rows} == ({kind} if kind else set())
    assert all("height" not in axes for _, axes, _ in facts(rows))
    if values is not None:
        assert total(rows) == values * n * (h // 2) * w * WORD
