"""Arrays of many shapes in flat buffers: where they are stored, and that nothing is longer for it."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as hs

import shardtrain as st
from shardtrain.pipeline.runtime.flat_buffers import (
    Pack,
    SlotPlaces,
    add,
    buffer_names,
    dtype_of,
    slot_places,
)
from shardtrain.pipeline.runtime.resident_arrays import ResidentArrays

SHAPES = hs.builds(
    jax.ShapeDtypeStruct,
    hs.lists(hs.integers(0, 3), max_size=2).map(tuple),
    hs.sampled_from(["float32", "float64", "int8"]),
)
ROWS = hs.lists(hs.lists(SHAPES, max_size=6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(ROWS)
def test_what_all_rows_have_alike_is_alone_in_its_buffer_and_no_row_grows(rows):
    packs = [Pack(row, names) for row, names in zip(rows, buffer_names(rows), strict=True)]
    alone = [Counter(p.buffer for p in pack.places if " " in p.buffer) for pack in packs]
    assert all(found == alone[0] and set(found.values()) <= {1} for found in alone)
    for buffer in alone[0]:
        assert len({pack.lengths[buffer] for pack in packs}) == 1
    kinds = [Counter((str(s.dtype), s.size) for s in row) for row in rows]
    common = kinds[0]
    for row in kinds:
        common &= row
    assert sum(alone[0].values()) == common.total()
    for pack, row in zip(packs, rows, strict=True):
        assert all(p.dtype == s.dtype for p, s in zip(pack.places, row, strict=True))
        size = sum(n * dtype_of(b).itemsize for b, n in pack.lengths.items())
        assert size == sum(s.size * s.dtype.itemsize for s in row)


@settings(deadline=None, max_examples=50)
@given(ROWS, hs.data())
def test_a_sum_of_each_stage_gets_its_own_and_leaves_the_others(rows, data):
    ranks = data.draw(hs.lists(hs.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    where = SlotPlaces.of([Pack(row) for row in rows], [1] * len(rows), ranks)
    stage = data.draw(hs.integers(0, len(rows) - 1))
    places = where.slot(stage, 0)
    values = [jnp.full(s.shape, i + 1, s.dtype) for i, s in enumerate(rows[stage])]
    old = {b: jnp.arange(n).astype(dtype_of(b)) for b, n in where.lengths.items()}
    expected = {b: np.array(v) for b, v in old.items()}
    for place, value in zip(places, values, strict=True):
        expected[place.buffer][place.start : place.start + place.size] += np.ravel(value)
    for buffer, sums in add(old, places, values).items():
        np.testing.assert_array_equal(sums, expected[buffer])


def test_buffers_of_their_own_are_not_taken_where_they_are_much_longer():
    one, nine = jax.ShapeDtypeStruct((10,), np.float32), jax.ShapeDtypeStruct((90,), np.float32)
    assert slot_places([[one, nine], [one, nine]], [2, 1], [0, 1]).lengths == {
        "float32 10 0": 20,
        "float32 90 0": 180,
    }
    assert slot_places([[one], [one, nine]], [9, 1], [0, 1]).lengths == {"float32": 100}


def test_what_two_axes_cut_comes_back_from_its_devices():
    mesh = st.make_mesh("pipe=2,data=2,channel=2")
    arrays = [np.arange(24.0).reshape(3, 8), np.arange(8.0)]
    resident = ResidentArrays(
        arrays, [0, 1], [((), ("data", "channel")), (("channel", "data"),)], (0, 1), mesh
    )
    for value, back in zip(arrays, resident.unpack(*resident.pack(arrays)), strict=True):
        np.testing.assert_array_equal(back, value)
