"""The arithmetic of cut windows, shard by shard in plain integers: no arrays, no devices."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardtrain import UserError
from shardtrain.ops.arguments import pads_of, tuple_of
from shardtrain.ops.window import Window, reroute

# Drawn as plain numbers: beartype, at work inside shardtrain, asks `random`, which strategies must not.
WINDOWS = st.tuples(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 5),
    st.tuples(st.integers(-3, 14), st.integers(-3, 14)),
    st.integers(1, 9),
).filter(lambda w: w[0] + sum(w[3]) >= w[1])


def wanted(w, shard):
    """Input rows that the real outputs of `shard` read, -1 for padding, output by output."""
    outputs = range(shard * w.block_out, min((shard + 1) * w.block_out, w.extent_out))
    rows = [[o * w.stride - w.pad[0] + k for k in range(w.size)] for o in outputs]
    return [[r if 0 <= r < w.extent else -1 for r in window] for window in rows]


def gathered(w, shard):
    """Input rows a shard holds after an exchange as `Window` describes it, -1 for padding."""
    low, high = w.halo
    before, after = w.fill
    assert min(low, high, before, after) >= 0
    for rows, hops in ((low, w.hops(low)), (high, w.hops(high))):
        assert sum(hops) == rows
        assert all(0 < count <= w.block_in for count in hops)
        assert all(count == w.block_in for count in hops[:-1])
    first = shard * w.block_in
    held = [-1] * before + list(range(first - low, first + w.block_in + high)) + [-1] * after
    start = w.offsets[shard]
    assert start >= 0
    assert start + w.need <= len(held)
    return [r if 0 <= r < w.extent else -1 for r in held[start : start + w.need]]


NOTORIOUS = (
    (7, 3, 1, (1, 1), 2),
    (2, 3, 1, (1, 1), 4),
    (8, 11, 1, (5, 5), 8),
    (9, 3, 4, (0, 0), 8),
    (13, 5, 3, (0, 7), 4),
    (9, 3, 1, (-2, 1), 4),
    (6, 3, 1, (5, 9), 4),
    (5, 1, 4, (0, 0), 3),
)


def every_window(check):
    def on_numbers(numbers):
        check(Window(*numbers))

    for numbers in NOTORIOUS:
        on_numbers = example(numbers)(on_numbers)
    return settings(max_examples=400, deadline=None, derandomize=True, database=None)(
        given(WINDOWS)(on_numbers)
    )


def rows_arrive(w):
    """Every shard gets precisely the rows that its outputs are computed from."""
    for shard in range(w.shards):
        want = wanted(w, shard)
        if want:  # a shard without outputs computes what nobody reads
            have = gathered(w, shard)
            assert [have[i * w.stride : i * w.stride + w.size] for i in range(len(want))] == want


def halos_are_minimal(w):
    """No shard is sent more rows than the neediest shard reads of its neighbours."""
    low = high = 0
    for shard in range(w.shards):
        read = {r for window in wanted(w, shard) for r in window if r >= 0}
        own = range(shard * w.block_in, (shard + 1) * w.block_in)
        if read:
            low = max(low, own.start - min(read))
            high = max(high, max(read) + 1 - own.stop)
    assert w.halo[0] >= low
    assert w.halo[1] >= high
    if max(w.pad) < w.size:  # else a window of nothing but padding may carry rows along that it does not read
        assert w.halo == (low, high)


def blocks_hold_all_rows(w):
    assert w.block_out * w.shards >= w.extent_out
    assert w.block_in * w.shards >= w.extent
    padded = range(-w.pad[0], w.extent + w.pad[1])
    assert w.extent_out == len([r for r in padded[:: w.stride] if r + w.size <= padded.stop])


test_every_shard_gets_the_rows_it_needs = every_window(rows_arrive)
test_halos_are_minimal = every_window(halos_are_minimal)
test_blocks_hold_all_rows = every_window(blocks_hold_all_rows)


@pytest.mark.parametrize("name", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_named_padding(name, stride):
    for extent in range(5, 12):
        pads = pads_of(name, (extent,), (4,), (stride,))
        out = Window(extent, 4, stride, pads[0]).extent_out
        assert out == (-(-extent // stride) if name == "SAME" else (extent - 4) // stride + 1)
        if name == "SAME":
            assert 0 <= pads[0][1] - pads[0][0] <= 1


def test_forms_of_padding():
    assert pads_of(2, (5, 5), (3, 3), (1, 1)) == [(2, 2), (2, 2)]
    assert pads_of([1, (0, 2)], (5, 5), (3, 3), (1, 1)) == [(1, 1), (0, 2)]
    assert pads_of("causal", (5,), (3,), (1,)) == [(2, 0)]
    for padding, extents, message in (
        ("SYMMETRIC", (5,), "padding='SYMMETRIC'"),
        ("CIRCULAR", (1, 5), "wrap padding of"),
        ("REFLECT", (1,), "reflect padding of .* extent of 1, which has 0 to give"),
        ("CAUSAL", (5, 5), "padding='CAUSAL'"),
        ([1, 1], (5,), "1 spatial dimensions need 1 entries"),
    ):
        with pytest.raises(UserError, match=message):
            pads_of(padding, extents, (5,) * len(extents), (1,) * len(extents))


def test_one_value_for_every_dimension():
    assert tuple_of(None, 2, "strides") == (1, 1)
    assert tuple_of(3, 2, "strides") == (3, 3)
    assert tuple_of((1, 2), 2, "strides") == (1, 2)
    for value in (0, -1, (1, 0), (1, 2, 3)):
        with pytest.raises(UserError, match="for 2 spatial dimensions; give one positive number or 2"):
            tuple_of(value, 2, "strides")


def test_numbers_of_other_kinds():
    assert tuple_of(np.int64(2), 2, "strides") == (2, 2)
    for value in (2.0, (1.0, 2), "two"):
        with pytest.raises(UserError, match="is not made of whole numbers"):
            tuple_of(value, 2, "strides")


def rerouted(rounds, table, shards, block):
    """The global rows that every shard ends up with, by playing the rounds on row numbers."""
    blocks = np.arange(shards * block).reshape(shards, block)
    have = [list(own) for own in blocks]
    for rows, starts, senders in rounds:
        sent = [list(blocks[i][start : start + rows]) for i, start in enumerate(starts)]
        assert all(len(part) == rows for part in sent)
        receivers = [sender for i, sender in enumerate(senders) if sender != i]
        assert len(receivers) == len(set(receivers))  # a permute: nobody sends twice
        for i, sender in enumerate(senders):
            have[i] += sent[sender]
    return [[have[i][place] for place in places] for i, places in enumerate(table)]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_every_shard_receives_the_rows_that_it_wants(data):
    shards, block = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    count = data.draw(st.integers(1, 8))
    rows = st.integers(0, shards * block - 1)
    wanted = [data.draw(st.lists(rows, min_size=count, max_size=count)) for _ in range(shards)]
    rounds, table = reroute([[divmod(row, block) for row in one] for one in wanted], block)
    assert rerouted(rounds, table, shards, block) == wanted


def test_both_sides_of_a_ring_take_one_round_each():
    """A ring of 4 shards of 3 rows, a window of 2 rows before and 1 row after its block."""
    wanted = [[divmod(row % 12, 3) for row in range(3 * i - 2, 3 * i + 4)] for i in range(4)]
    rounds, table = reroute(wanted, 3)
    assert [part.rows for part in rounds] == [2, 1]
    assert [part.senders for part in rounds] == [(3, 0, 1, 2), (1, 2, 3, 0)]
    assert (table == table[0]).all()
