"""Padding, resizing and adaptive pooling on every mesh against `jnp.pad`, `jax.image.resize` and PyTorch's formula."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shardtrain import UserError, make_mesh, ops
from shardtrain.ops.window import Window

from .parity import ALL_MESHES, LAYOUTS, MESHES, PIPES, by_stage, examples, named, numbers, on_stages, parity
from .test_census import WORD, C, H, N, W, activations, facts, image, sent, total

# --- one device -------------------------------------------------------------------------------------------


def padded(x, pads, mode, value=0.0):
    """`jnp.pad`, then what negative numbers crop."""
    grow = [(0, 0), *((max(0, a), max(0, b)) for a, b in pads), (0, 0)]
    y = jnp.pad(x, grow, mode, **({"constant_values": value} if mode == "constant" else {}))
    crop = [slice(max(0, -a), y.shape[d] - max(0, -b)) for d, (a, b) in enumerate(pads, start=1)]
    return y[:, *crop]


def resized(x, extents, method):
    """The pixels' centres in exact fractions: `jax.image.resize` counts in float32."""
    for dim, m in enumerate(extents, start=1):
        n = x.shape[dim]
        if method == "nearest":
            x = jnp.take(x, jnp.array([(2 * o + 1) * n // (2 * m) for o in range(m)]), axis=dim)
        else:
            matrix = np.zeros((m, n))
            for o in range(m):
                twice = min(max((2 * o + 1) * n - m, 0), 2 * m * (n - 1))  # the place times 2m
                first, rest = divmod(twice, 2 * m)
                matrix[o, first] += 1 - rest / (2 * m)
                matrix[o, min(first + 1, n - 1)] += rest / (2 * m)
            x = jnp.moveaxis(jnp.tensordot(x, matrix, ((dim,), (1,))), -1, dim)
    return x


def adaptive(x, extents, reduce):
    """PyTorch's windows; means and maxima of boxes are those of their sides in turn."""
    for dim, m in enumerate(extents, start=1):
        n = x.shape[dim]
        shares = [(math.floor(i * n / m), math.ceil((i + 1) * n / m)) for i in range(m)]
        windows = [jax.lax.slice_in_dim(x, a, b, axis=dim) for a, b in shares]
        x = jnp.stack([reduce(window, dim) for window in windows], axis=dim)
    return x


def pair(kind, argument, layout=None):
    """The operator and its reference for one drawn case."""
    if kind == "pad":
        pads, mode, value = argument
        op = functools.partial(ops.pad, padding=pads, mode=mode, value=value, layout=layout)
        return op, lambda x: padded(x, pads, mode, value)
    if kind in ("nearest", "linear"):
        op = functools.partial(ops.resize, extents=argument, method=kind, layout=layout)
        return op, lambda x: resized(x, argument, kind)
    pool, reduce = (ops.adaptive_avg_pool, jnp.mean) if kind == "mean" else (ops.adaptive_max_pool, jnp.max)
    op = functools.partial(pool, extents=argument, layout=layout)
    return op, lambda x: adaptive(x, argument, reduce)


KINDS = "pad", "nearest", "linear", "mean", "maximum"


@st.composite
def resamplings(draw, meshes=MESHES, kinds=KINDS, ranks=(1, 2, 2, 2, 3)):
    rank, kind = draw(st.sampled_from(ranks)), draw(st.sampled_from(kinds))
    extents = [draw(st.integers(1, 13 if rank < 3 else 5)) for _ in range(rank)]
    if kind == "pad":
        mode = draw(st.sampled_from(("constant", "wrap", "reflect", "edge")))
        most = [{"wrap": n, "reflect": n - 1}.get(mode, n + 2) for n in extents]
        pads = [
            (draw(st.integers(1 - n, m)), draw(st.integers(0, m))) for n, m in zip(extents, most, strict=True)
        ]
        pads = [tuple(draw(st.permutations(pair))) for pair in pads]  # one side at most is cropped
        argument = tuple(pads), mode, draw(st.sampled_from((0.0, -2.5)))
    else:
        argument = tuple(draw(st.integers(1, 13 if rank < 3 else 5)) for _ in range(rank))
    shape = (draw(st.integers(1, 4)), *extents, draw(st.sampled_from((1, 2, 3, 4, 8))))
    return draw(st.sampled_from(meshes)), shape, kind, argument, draw(st.sampled_from(LAYOUTS))


def compare(drawn):
    mesh, shape, kind, argument, layout = drawn
    parity(*pair(kind, argument, layout), [numbers(*shape)], mesh)


@examples(6)
@given(resamplings())
def test_any_resampling_on_any_mesh(drawn):
    compare(drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(300)
@given(resamplings(ALL_MESHES))
def test_many_resamplings_on_every_mesh(drawn):
    compare(drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(60)
@given(resamplings(PIPES, ranks=(1, 2, 2)))
def test_many_on_stages_of_a_pipeline(drawn):
    mesh, shape, kind, argument, layout = drawn
    op, reference = pair(kind, argument, layout if "pipe" not in str(layout) else None)
    parity(on_stages(op), by_stage(reference), [numbers(2, *shape)], mesh)


def padding(*pads, mode="constant", value=0.0):
    return "pad", (pads, mode, value)


NOTORIOUS = {
    "padded on one side: rows move between shards": (
        "height=4,width=2",
        (2, 7, 5, 2),
        *padding((3, 0), (0, 4)),
    ),
    "a ring padded by all of itself": ("height=4", (2, 5, 3, 2), *padding((5, 5), (1, 0), mode="wrap")),
    "cropped to nothing on some shards": ("height=8", (2, 9, 3, 2), *padding((-3, -2), (0, 0))),
    "doubled, uneven on two axes": ("height=4,width=2", (2, 7, 5, 2), "linear", (14, 10)),
    "7 rows to 5, 5 columns to 8": ("height=2,width=4", (2, 7, 5, 2), "nearest", (5, 8)),
    "13 rows in 6 shares, 5 in 3": ("height=4,width=2", (2, 13, 5, 2), "mean", (6, 3)),
    "more outputs than inputs": ("height=8", (2, 3, 2, 2), "maximum", (7, 5)),
}
SELDOM = {
    "cropped and padded": ("height=4,width=2", (2, 9, 5, 2), *padding((-4, 3), (2, -3), value=-1.0)),
    "cropped and mirrored": ("height=4,width=2", (2, 9, 5, 2), *padding((-4, 3), (2, -3), mode="reflect")),
    "cropped and wrapped": ("height=8", (2, 9, 5, 2), *padding((9, -4), (2, -3), mode="wrap")),
    "cropped by more than there is, then padding": ("width=4", (2, 5, 2), *padding((-7, 4), value=3.0)),
    "border rows repeated beyond the extent": ("width=4", (2, 3, 2), *padding((6, 9), mode="edge")),
    "one row": ("height=4,width=2", (2, 1, 1, 2), *padding((2, 1), (1, 1), mode="edge")),
    "a single pixel grows": ("height=4,width=2", (2, 1, 1, 2), "linear", (6, 5)),
    "down to a single pixel": ("height=4,width=2", (2, 9, 7, 2), "linear", (1, 1)),
    "rows from the farthest shard": ("height=8", (2, 16, 3, 2), "nearest", (2, 3)),
    "3-D": ("depth=2,height=2,width=2", (2, 3, 4, 5, 2), "linear", (5, 3, 10)),
    "3-D shares": ("depth=2,height=2,channel=2", (2, 5, 3, 4, 2), "mean", (3, 2, 3)),
    "1-D": ("data=2,width=4", (3, 11, 2), "maximum", (4,)),
    "to one pixel": ("height=4,width=2", (2, 9, 7, 2), "mean", (1, 1)),
}


@pytest.mark.parametrize(("mesh", "shape", "kind", "argument"), named(NOTORIOUS, SELDOM))
def test_notorious(mesh, shape, kind, argument):
    parity(*pair(kind, argument), [numbers(*shape)], mesh)


@pytest.mark.parametrize("method", ["nearest", "linear"])
@pytest.mark.parametrize("extents", [(14, 10), (13, 3)])
def test_resize_is_that_of_jax(method, extents):
    x = jnp.asarray(numbers(2, 7, 5, 3))
    expected = jax.image.resize(x, (2, *extents, 3), method, antialias=False)
    np.testing.assert_allclose(ops.resize(x, extents, method=method), expected, atol=1e-12)


@pytest.mark.parametrize("mesh", ["width=4", pytest.param("data=2,height=2,width=2", marks=pytest.mark.slow)])
def test_equal_values(mesh):
    """Every window gives its gradient to one of its largest values, also where several are."""
    x = jnp.zeros((2, 7, 5, 3))
    with jax.set_mesh(make_mesh(mesh)):
        gradient = jax.grad(lambda x: ops.adaptive_max_pool(x, (7, 2)).sum())(x)
    expected = np.zeros((2, 7, 5, 3))
    expected[:, :, [0, 2]] = 1  # windows of columns 0 to 2 and 2 to 4
    np.testing.assert_array_equal(gradient, expected)


def test_without_a_mesh():
    for kind, argument in (padding((2, -1), (0, 3), mode="edge"), ("linear", (4, 9)), ("maximum", (3, 4))):
        op, reference = pair(kind, argument)
        x = jnp.asarray(numbers(2, 7, 5, 3))
        np.testing.assert_allclose(op(x), reference(x), atol=1e-12)


# --- what is sent -----------------------------------------------------------------------------------------

NOTHING = {
    "nearest, twice the rows": ("height=4,width=2", "nearest", (2 * H, 2 * W)),
    "shares of two rows": ("height=4,width=2", "mean", (H // 2, W // 2)),
    "largest of two rows": ("height=4,width=2", "maximum", (H // 2, W)),
    "columns that nothing cuts": ("height=4", "nearest", (H, 3 * W)),
    "no padding": ("height=4,width=2", *padding((0, 0), (0, 0), mode="wrap")),
}


@pytest.mark.parametrize(("text", "kind", "argument"), NOTHING.values(), ids=NOTHING)
def test_nothing_where_blocks_line_up(text, kind, argument):
    mesh = make_mesh(text)
    assert sent(pair(kind, argument)[0], mesh, [(N, H, W, C)], [activations(mesh)]) == []


@pytest.mark.parametrize("extents", [(H, W), pytest.param((H, 3 * W), marks=pytest.mark.slow)])
def test_rows_that_stay_as_they_are(extents):
    """Linear weights of (1, 0): the second row is not needed."""
    mesh = make_mesh("height=4")
    assert sent(pair("linear", extents)[0], mesh, [(N, H, W, C)], [activations(mesh)]) == []


def test_doubling_sends_one_row_each_way():
    mesh = make_mesh("data=2,height=4")
    n, _, w, c = image(mesh)
    moved = sent(pair("linear", (2 * H, W))[0], mesh, [(N, H, W, C)], [activations(mesh)])
    assert facts(moved) == {("collective-permute", ("height",), n * w * c * WORD): 4}  # and back


def test_padding_on_one_side_moves_rows():
    """4 rows of zeros in front: every shard but the last hands rows on, as `Window` says."""
    mesh = make_mesh("height=4")
    moved = sent(pair(*padding((4, 0), (0, 0)))[0], mesh, [(N, H, W, C)], [activations(mesh)], backward=False)
    window = Window(H, 1, 1, (4, 0), 4, ("height",))
    assert {row.kind for row in moved} == {"collective-permute"}
    assert total(moved) == sum(window.halo) * N * W * C * WORD


def test_a_ring_sends_its_ends():
    """A convolution around a ring: every shard sends its first row and its last, the ends as well."""
    mesh = make_mesh("height=4")
    op = functools.partial(ops.conv, padding="CIRCULAR")
    specs = [activations(mesh), P()]
    moved = sent(op, mesh, [(N, H, W, C), (3, 3, C, C)], specs, backward=False)
    assert facts(moved) == {("collective-permute", ("height",), N * W * C * WORD): 2}


# --- what is refused --------------------------------------------------------------------------------------

X = jnp.ones((2, 6, 5, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.pad(x, 1, mode="symmetric"), "pad: mode='symmetric'; there are 'constant', 'wrap'"),
        (lambda x: ops.pad(x, 6, mode="wrap"), "wrap padding of .* extent of 5, which has 5 to give"),
        (lambda x: ops.pad(x, 5, mode="reflect"), "reflect padding of .* extent of 5, which has 4 to give"),
        (lambda x: ops.pad(x, -3), "leaves nothing of extents"),
        (lambda x: ops.pad(x, ((1, 1),)), "2 spatial dimensions need 2 entries"),
        (lambda x: ops.resize(x, (4,)), r"extents=\(4,\) for 2 spatial"),
        (lambda x: ops.resize(x, (4, 0)), r"extents=\(4, 0\) for 2 spatial"),
        (lambda x: ops.adaptive_avg_pool(x, (4, 0)), r"extents=\(4, 0\) for 2 spatial"),
        (lambda x: ops.adaptive_max_pool(x, (4, 1, 1)), r"extents=\(4, 1, 1\) for 2 spatial"),
    ],
)
def test_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(X)
    with jax.set_mesh(make_mesh("height=2,channel=2")), pytest.raises(UserError, match=message):
        call(X)


def test_integers_are_refused():
    """Weights are fractions: on integers they would round to nothing."""
    x = jnp.arange(16).reshape(1, 4, 4, 1)
    for op in (lambda: ops.adaptive_avg_pool(x, (2, 2)), lambda: ops.resize(x, (8, 8), method="linear")):
        with pytest.raises(UserError, match="would be rounded to integers; give floating point"):
            op()
