"""Closed-form bytes of real compiled programs on 4x2 devices, and of GPU text that no CPU produces."""

import dataclasses
import io
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from shardtrain.errors import UserError
from shardtrain.plan.census import Collective, census, summary, table

X = jax.ShapeDtypeStruct((16, 8), jnp.float32)
S = 4 * 4 * 4  # bytes of the f32[4,4] that one of 4x2 devices holds of X
CUT = P("data", "channel")
RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "channel"))


def mapped(mesh, f, out=CUT):
    """`f` on one device's f32[4,4] of X, compiled."""
    return (
        jax.jit(jax.shard_map(f, mesh=mesh, in_specs=CUT, out_specs=out, check_vma=False)).lower(X).compile()
    )


def partitioned(mesh, f, cut, *args):
    """`f` cut by XLA's own partitioner, the result on every device, compiled."""
    cut = tuple(NamedSharding(mesh, spec) for spec in cut)
    return jax.jit(f, in_shardings=cut, out_shardings=NamedSharding(mesh, P())).lower(*args).compile()


def facts(collectives):
    return [(c.kind, c.shape, c.group, c.axes, c.count, c.payload, c.bytes) for c in collectives]


# what one device sends, by hand: n devices in the ring, S bytes in the operand
BY_HAND = {
    "psum over channel": (
        lambda x: lax.psum(x, "channel"),
        P("data"),
        ("all-reduce", "f32[4,4]", 2, ("channel",), 1, S, 2 * S // 2),
    ),
    "psum over data": (
        lambda x: lax.psum(x, "data"),
        P(None, "channel"),
        ("all-reduce", "f32[4,4]", 4, ("data",), 1, S, 2 * 3 * S // 4),
    ),
    "psum over both": (
        lambda x: lax.psum(x, ("data", "channel")),
        P(),
        ("all-reduce", "f32[4,4]", 8, ("data", "channel"), 1, S, 2 * 7 * S // 8),
    ),
    "all_gather": (
        lambda x: lax.all_gather(x, "data", tiled=True),
        P(None, "channel"),
        ("all-gather", "f32[16,4]", 4, ("data",), 1, S, 3 * S),
    ),
    "psum_scatter": (
        lambda x: lax.psum_scatter(x, "data", tiled=True),
        CUT,
        ("reduce-scatter", "f32[1,4]", 4, ("data",), 1, S, 3 * S // 4),
    ),
    "ppermute around": (
        lambda x: lax.ppermute(x, "data", RING),
        CUT,
        ("collective-permute", "f32[4,4]", 8, ("data",), 1, S, S),
    ),
    # one row of 4 floats; the last of each 4 devices sends nothing: 3 pairs, for both channel halves
    "halo row": (
        lambda x: lax.ppermute(x[-1:], "data", RING[:3]),
        CUT,
        ("collective-permute", "f32[1,4]", 6, ("data",), 1, 16, 16),
    ),
    # XLA on CPUs cuts the operand into 4 pieces, a tuple: still one exchange of S bytes
    "all_to_all": (
        lambda x: lax.all_to_all(x, "data", 0, 1, tiled=True),
        P(None, ("channel", "data")),
        ("all-to-all", "4*f32[1,4]", 4, ("data",), 1, S, 3 * S // 4),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_collective_by_hand(mesh, name):
    f, out, want = BY_HAND[name]
    assert facts(census(mapped(mesh, f, out), mesh)) == [want]


def test_without_a_mesh_axes_are_none(mesh):
    (found,) = census(mapped(mesh, lambda x: lax.psum(x, "data"), P(None, "channel")))
    assert found.axes is None
    assert found.bytes == 2 * 3 * S // 4
    assert found.source.endswith("psum")


def test_scan_multiplies(mesh):
    def inner(x, length):
        return lax.scan(lambda c, _: (jnp.sin(lax.psum(c, "data")), None), x, None, length=length)[0]

    def nested(x):
        return lax.scan(lambda c, _: (inner(c, 4), None), x, None, length=3)[0]

    # exact: a body counted once would give 96 bytes, an outer loop forgotten 4 runs
    one = 2 * 3 * S // 4
    found = census(mapped(mesh, lambda x: inner(x, 5)), mesh)
    assert facts(found) == [("all-reduce", "f32[4,4]", 4, ("data",), 5, S, 5 * one)]
    assert facts(census(mapped(mesh, nested), mesh)) == [
        ("all-reduce", "f32[4,4]", 4, ("data",), 12, S, 12 * one)
    ]


def until(x):
    """A loop whose trips XLA cannot know, with a collective in its body and one in its condition."""
    return lax.while_loop(lambda y: lax.pmax(y.sum(), "data") < 3, lambda y: lax.psum(y, "channel") + 1, x)


def test_unknown_trips_count_once_and_warn(mesh, caplog):
    found = census(mapped(mesh, until), mesh)
    assert sorted((c.axes, c.count, c.payload) for c in found) == [(("channel",), 1, S), (("data",), 1, 4)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "unknown length" in caplog.text


def test_a_loop_of_one_turn_or_none_counts_as_one(mesh, caplog):
    def once(x, last=False):
        def turn(now):
            y = lax.psum(now[1], "channel")
            return jnp.bool_(False) if last else y[0, 0] < 3, y

        return lax.while_loop(lambda now: now[0], turn, (x[0, 0] > 0, x))[1]

    found = census(mapped(mesh, lambda x: once(x, last=True)), mesh)
    assert [(c.axes, c.count) for c in found] == [(("channel",), 1)]
    assert not caplog.records
    census(mapped(mesh, once), mesh)  # what its body finds is not known
    assert "unknown length" in caplog.text


def test_a_loop_asks_its_condition_once_more(mesh, caplog):
    text = mapped(mesh, until).as_text()
    (loop,) = (line for line in text.splitlines() if " while(" in line)
    text = text.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"4"}}')
    assert sorted((c.axes, c.count) for c in census(text, mesh)) == [(("channel",), 4), (("data",), 5)]
    assert not caplog.records


def test_all_branches_count(mesh):
    def f(x):
        gather = lambda y: lax.all_gather(y[:1], "data", tiled=True)  # noqa: E731
        return lax.cond(x[0, 0] > 0, lambda y: lax.psum(y, "channel"), gather, x)

    found = census(mapped(mesh, f), mesh)
    assert sorted((c.kind, c.axes, c.count, c.bytes) for c in found) == [
        ("all-gather", ("data",), 1, 3 * 16),
        ("all-reduce", ("channel",), 1, 2 * S // 2),
    ]


def test_nothing_sent(mesh):
    assert census(mapped(mesh, jnp.sin), mesh) == []
    # XLA keeps a sum over groups of one device; it moves nothing
    flat = Mesh(mesh.devices.reshape(8, 1), mesh.axis_names)
    compiled = mapped(flat, lambda x: lax.psum(x, "channel"))
    assert "all-reduce" in compiled.as_text()
    assert census(compiled, flat) == []
    # nor does a permute to oneself, which XLA keeps too
    assert census(mapped(mesh, lambda x: lax.ppermute(x, "data", [(i, i) for i in range(4)])), mesh) == []


def test_two_arrays_in_one_instruction_are_two_rows(mesh):
    compiled = mapped(mesh, lambda x: lax.psum((x, x[:2] + 1), "channel"), P("data"))
    assert " = (f32[4,4]{1,0}, f32[2,4]{1,0}) all-reduce(" in compiled.as_text()
    assert [(c.shape, c.bytes) for c in census(compiled, mesh)] == [("f32[4,4]", S), ("f32[2,4]", S // 2)]


def test_gradient_sum_has_the_bytes_of_the_parameters(mesh):
    shapes = {"a": (8, 16), "b": (16, 4)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["a"]) @ params["b"])

    batch = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    found = census(partitioned(mesh, jax.grad(loss), (P(), P("data")), params, batch), mesh)
    assert {(c.kind, c.group, c.axes, c.count) for c in found} == {("all-reduce", 4, ("data",), 1)}
    # XLA sums both in one instruction, and the transposed gradients f32[16,8], f32[4,16]: only sizes are ours
    assert sorted(c.payload for c in found) == [16 * 4 * 4, 8 * 16 * 4]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axes", [("b",), ("c",), ("c", "a"), ("b", "c", "a")])
def test_groups_that_xla_writes_as_axes_of_its_own_mesh(axes, reverse):
    # replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(2,0,1)) {'axis_1'} and the like;
    # they number places in the mesh, so the order of the devices does not matter
    order = np.array(jax.devices()[:8])[:: -1 if reverse else 1]
    mesh = Mesh(order.reshape(2, 2, 2), ("a", "b", "c"))
    compiled = partitioned(mesh, lambda x: x.sum(0), (P(axes),), X)
    assert "replica_groups=mesh[" in compiled.as_text()
    found = census(compiled, mesh)
    n = 2 ** len(axes)
    assert facts(found) == [
        ("all-reduce", "f32[8]", n, tuple(sorted(axes)), 1, 8 * 4, 2 * (n - 1) * 8 * 4 // n)
    ]


def test_wrong_mesh_is_refused(mesh):
    small = Mesh(mesh.devices[:2], mesh.axis_names)
    with pytest.raises(UserError, match="the mesh has 4 devices, the program 8"):
        census(mapped(mesh, lambda x: lax.psum(x, "data"), P(None, "channel")), small)


def hlo(lines, before=""):
    return f"""HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}
{before}
ENTRY %main (p: f32[32,8], q: bf16[5], r: f32[]) -> f32[32,8] {{
  %p = f32[32,8]{{1,0}} parameter(0)
  %q = bf16[5]{{0}} parameter(1)
  %r = f32[] parameter(2)
{lines}
  ROOT %out = f32[32,8]{{1,0}} copy(%p)
}}
"""


LIST = "replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true"
PAIRS = "replica_groups=[4,2]<=[8], use_global_device_ids=true"
ALL = 32 * 8 * 4  # bytes of p

# shapes and attributes as XLA's GPU compiler prints them
GPU = {
    "all-reduce-start": (
        """
  %ar = (f32[32,8]{1,0}, /*index=1*/bf16[5]{0}) all-reduce-start(%p, %q), channel_id=1, """
        """replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add, """
        """metadata={op_name="jit(step)/psum"}, """
        """backend_config={"collective_backend_config":{"is_sync":false}}
  %ard = (f32[32,8]{1,0}, bf16[5]{0}) all-reduce-done(%ar)""",
        "",
        [
            ("all-reduce", "f32[32,8]", 4, ("data",), 1, ALL, 2 * 3 * ALL // 4),
            ("all-reduce", "bf16[5]", 4, ("data",), 1, 10, 15),
        ],
    ),
    "all-reduce-start, printed as by jax 0.12": (
        """
  %ar = ((f32[32,8]{1,0}, bf16[5]{0}), (f32[32,8]{1,0}, bf16[5]{0})) all-reduce-start(%p, %q), """
        """channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add, """
        """output_to_operand_aliasing={{1,0}: (0, {}), {1,1}: (1, {})}
  %ard = (f32[32,8]{1,0}, bf16[5]{0}) all-reduce-done(%ar)
  %one = ((f32[32,8]{1,0}), f32[32,8]{1,0}) all-reduce-start(%p), channel_id=11, """
        """replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add, """
        """output_to_operand_aliasing={{1}: (0, {})}
  %oned = f32[32,8]{1,0} all-reduce-done(%one)""",
        "",
        [
            ("all-reduce", "f32[32,8]", 4, ("data",), 1, ALL, 2 * 3 * ALL // 4),
            ("all-reduce", "bf16[5]", 4, ("data",), 1, 10, 15),
            ("all-reduce", "f32[32,8]", 4, ("data",), 1, ALL, 2 * 3 * ALL // 4),
        ],
    ),
    "all-gather-start": (
        f"""
  %ag = (f32[32,8]{{1,0}}, f32[64,8]{{1,0}}) all-gather-start(%p), channel_id=2, dimensions={{0}}, {PAIRS}
  %agd = f32[64,8]{{1,0}} all-gather-done(%ag)""",
        "",
        [("all-gather", "f32[64,8]", 2, ("channel",), 1, ALL, ALL)],
    ),
    "all-gather-start of two arrays, over all devices": (
        """
  %ag = ((f32[32,8]{1,0}, bf16[5]{0}), (f32[256,8]{1,0}, bf16[40]{0})) all-gather-start(%p, %q), """
        """channel_id=3, replica_groups={}, dimensions={0}, use_global_device_ids=true
  %agd = (f32[256,8]{1,0}, bf16[40]{0}) all-gather-done(%ag)""",
        "",
        [
            ("all-gather", "f32[256,8]", 8, ("data", "channel"), 1, ALL, 7 * ALL),
            ("all-gather", "bf16[40]", 8, ("data", "channel"), 1, 10, 70),
        ],
    ),
    "collective-permute-start": (
        """
  %cp = (f32[32,8]{1,0}, f32[32,8]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=4, """
        """source_target_pairs={{0,0},{2,4},{4,2}}
  %cpd = f32[32,8]{1,0} collective-permute-done(%cp)""",
        "",
        [("collective-permute", "f32[32,8]", 2, ("data",), 1, ALL, ALL)],
    ),
    # async-done names the wrapped computation a second time, and a name in the metadata is no call
    "async-start around a reduce-scatter": (
        """
  %rs = ((f32[32,8]{1,0}), f32[8,8]{1,0}) async-start(%p), calls=%wrapped
  %rsd = f32[8,8]{1,0} async-done(%rs), calls=%wrapped
  %named = f32[32,8]{1,0} copy(%p), metadata={op_name="a(calls=%wrapped)"}""",
        f"""
%wrapped (w: f32[32,8]) -> f32[8,8] {{
  %w = f32[32,8]{{1,0}} parameter(0)
  ROOT %rsw = f32[8,8]{{1,0}} reduce-scatter(%w), channel_id=5, {LIST}, dimensions={{0}}, to_apply=%add
}}
""",
        [("reduce-scatter", "f32[8,8]", 4, ("data",), 1, ALL, 3 * ALL // 4)],
    ),
    "the same, printed short": (
        f"""
  %rs = ((f32[32,8]{{1,0}}), f32[8,8]{{1,0}}) reduce-scatter-start(%p), channel_id=6, {LIST}, """
        """dimensions={0}, to_apply=%add
  %rsd = f32[8,8]{1,0} reduce-scatter-done(%rs)""",
        "",
        [("reduce-scatter", "f32[8,8]", 4, ("data",), 1, ALL, 3 * ALL // 4)],
    ),
    "all-to-all of one array": (
        """
  %aa = f32[32,8] all-to-all(%p), channel_id=7, dimensions={0}, replica_groups=[2,4]<=[2,2,2]T(2,0,1)""",
        "",
        [("all-to-all", "f32[32,8]", 4, ("data",), 1, ALL, 3 * ALL // 4)],
    ),
    # device_ids are 0,2,1,3 and 4,6,5,7; in the last factor of these fours 0 meets 2, 1 meets 3: data
    "part of an axis": (
        """
  %ar = f32[32,8]{1,0} all-reduce(%p), channel_id=8, to_apply=%add, use_global_device_ids=true, """
        """replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(0,2,1)) {'axis_1':(2)2}""",
        "",
        [("all-reduce", "f32[32,8]", 2, ("data",), 1, ALL, ALL)],
    ),
    # and in the first factor 0 meets 1: channel; with x also 4 and 5
    "part of an axis and another, devices listed": (
        """
  %ar = f32[32,8]{1,0} all-reduce(%p), channel_id=9, to_apply=%add, use_global_device_ids=true, """
        """replica_groups=mesh['x'=2,'y'=4], device_ids=(0,2,1,3,4,6,5,7) {'y':(1)2,'x'}""",
        "",
        [("all-reduce", "f32[32,8]", 4, ("data", "channel"), 1, ALL, 2 * 3 * ALL // 4)],
    ),
    # 3 calls over groups of 3: 3 * 2*2/3*4 = 16 bytes, rounded once; rounded each time they would be 18
    "called from several places": (
        """
  %c0 = f32[] call(%r), to_apply=%command_buffer
  %c1 = f32[] call(%c0), to_apply=%command_buffer
  %c2 = f32[] call(%c1), to_apply=%command_buffer""",
        """
%command_buffer (w: f32[]) -> f32[] {
  %w = f32[] parameter(0)
  ROOT %arw = f32[] all-reduce(%w), channel_id=10, replica_groups={{0,2,4},{1,3,5}}, """
        """use_global_device_ids=true, to_apply=%add
}
""",
        [("all-reduce", "f32[]", 3, ("data",), 3, 4, 16)],
    ),
}


@pytest.mark.parametrize("name", GPU)
def test_gpu_text(mesh, name):
    lines, before, want = GPU[name]
    assert facts(census(hlo(lines, before), mesh)) == want


@pytest.mark.parametrize(
    ("array", "size"),
    [("pred[3]", 3), ("s4[5]", 3), ("f8e4m3fn[2,3]", 6), ("f16[3]", 6), ("s64[]", 8), ("c128[2]", 32)],
)
def test_sizes(array, size):
    text = hlo(f"  %a = {array} collective-permute(%p), source_target_pairs={{{{0,1}}}}")
    assert [(c.shape, c.payload) for c in census(text)] == [(array, size)]


def test_a_part_of_a_byte_counts_as_one():
    (found,) = census(hlo("  %a = f32[] all-reduce(%r), replica_groups={{0,1,2}}, to_apply=%add"))
    assert found.bytes == 6  # 2*2/3*4 = 5.33


def test_unknown_groups_are_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        census(hlo("  %a = f32[32,8]{1,0} all-reduce(%p), replica_groups=new<8>, to_apply=%add"))


def test_source_is_the_end_of_the_name_or_the_line():
    line = "  %a = f32[32,8]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add, metadata={"
    for metadata, want in [
        ('op_name="jit(f)/jvp(Net)/Block_0/Conv_1/psum" stack_frame_id=3', "Block_0/Conv_1/psum"),
        ('source_file="/home/me/net.py" source_line=12', "net.py:12"),
        ("", ""),
    ]:
        assert [c.source for c in census(hlo(line + metadata + "}"))] == [want]


ROWS = [
    Collective("all-reduce", "f32[64]", 4, ("data",), 1, 256, 384, ""),
    Collective("all-reduce", "f32[8]", 4, ("data",), 2, 32, 96, ""),
    Collective("all-reduce", "f32[8]", 2, ("channel",), 1, 32, 32, ""),
    Collective("collective-permute", "f32[1,4]", 6, None, 3, 16, 2 * 1024**2, ""),
]


def test_summary_merges_and_is_json():
    want = [
        {"kind": "collective-permute", "axes": None, "count": 3, "bytes": 2 * 1024**2},
        {"kind": "all-reduce", "axes": ["data"], "count": 3, "bytes": 480},
        {"kind": "all-reduce", "axes": ["channel"], "count": 1, "bytes": 32},
    ]
    assert json.loads(json.dumps(summary(ROWS))) == want
    assert summary(reversed(ROWS)) == want
    assert summary([]) == []


def test_table_fits_and_adds_up():
    wide = dataclasses.replace(
        ROWS[0], axes=("data", "depth", "height", "width"), shape="bf16[32,128,128,64,256]"
    )
    out = io.StringIO()
    Console(file=out, width=100).print(table([*ROWS, ROWS[0], wide]))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in out.getvalue()
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if "│" in line]
    assert Counter(cell[0] for cell in cells)["all-reduce"] == 4  # the two equal ones share a line
    assert ["all-reduce", "data", "2", "f32[64]", "256 B", "768 B"] in cells
    assert ["collective-permute", "?", "3", "f32[1,4]", "16 B", "2 MiB"] in cells
    assert cells[-1] == ["total", "", "9", "", "", "2.001 MiB"]  # 2 MiB + 1280 B
