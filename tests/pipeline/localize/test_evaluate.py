"""Functions in local form, on every device of a simulated mesh, against plain jax on one device.

Extents that blocks do not divide are filled up with NaN and nonsense: none of it may reach a result.
"""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass, field
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as some
from jax import lax
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain import compat, jaxprs
from shardtrain.pipeline.localize import rules
from shardtrain.pipeline.localize.evaluate import Block, block_shape, cut_of, evaluate
from shardtrain.pipeline.localize.rules import elementwise, lookups, reductions

SIZES = {"data": 2, "height": 2}
ALL = ("pipe", "data", "height")
AXES = {".": (), "d": ("data",), "h": ("height",), "B": ("data", "height"), "R": ("height", "data")}


@functools.cache
def mesh():
    return st.make_mesh("pipe=2,data=2,height=2")


@dataclass
class Case:
    """A function, its arguments (shapes are filled with numbers), and cuts of them to try.

    A cut is a word for each argument and a letter for each dimension: `.` whole, `d` by data, `h` by height,
    `B` by both, `R` by both, height slower; a scalar is `-`.
    """

    function: object
    args: list
    cuts: list
    local: bool = True  # nothing is gathered, but for the comparison
    warns: str = ""  # primitives without a rule
    grad: bool = True
    values: list = field(init=False)

    def __post_init__(self):
        self.values = [number(a, i) if isinstance(a, tuple) else a for i, a in enumerate(self.args)]


def number(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def joint(case):
    """Results and gradients of a weighted sum of them, as a list."""
    moved = [i for i, v in enumerate(case.values) if is_float(v)] if case.grad else []

    def weighted(some, values):
        full = list(values)
        for i, v in zip(moved, some, strict=True):
            full[i] = v
        outs = jax.tree.leaves(case.function(*full))
        total = sum(jnp.sum(y * number(y.shape, 7)) for y in outs if is_float(y))
        return jnp.asarray(total, float), outs

    def run(*values):
        some = [values[i] for i in moved]
        if not moved:
            return weighted(some, values)[1]
        grads, outs = jax.grad(weighted, has_aux=True)(some, values)
        return [*outs, *grads]

    return run


def parsed(text):
    return [tuple(AXES[letter] for letter in word.strip("-")) for word in text.split()]


def padded(value, cut):
    """Filled up to whole blocks, with what must not matter."""
    widths = [
        (0, b * math.prod(SIZES[a] for a in axes) - n)
        for b, n, axes in zip(block_shape(value.shape, cut, SIZES), value.shape, cut, strict=True)
    ]
    if not any(w for _, w in widths):
        return value
    junk = np.nan if is_float(value) else True if value.dtype == bool else 10**6 + 3
    return np.pad(value, widths, constant_values=junk)


def spec(cut):
    return P(*(axes or None for axes in cut))


def traced(case):
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in case.values]
    with jax.sharding.use_abstract_mesh(compat.with_manual(mesh(), ["pipe"])):
        return jax.make_jaxpr(joint(case))(*shapes)


def in_local_form(case, closed, cuts, values):
    """The blocks of the results from those of the arguments."""
    blocks = [Block(v, full.shape, c, SIZES) for v, full, c in zip(values, case.values, cuts, strict=True)]
    return evaluate(closed, blocks, SIZES)


def check(case):
    """Every device's results, for all cuts in one program, are those of one device without a mesh.

    Returns:
        How often something was gathered on the way, for each cut.
    """
    closed, gathers = traced(case), []
    all_cuts = [parsed(text) for text in case.cuts]
    flat = [padded(v, c) for cuts in all_cuts for v, c in zip(case.values, cuts, strict=True)]
    specs = tuple(spec(c) for cuts in all_cuts for c in cuts)

    def program(*flat):
        n, outs = len(case.values), []
        gathers.clear()
        for k, cuts in enumerate(all_cuts):
            with mock.patch.object(lax, "all_gather", wraps=lax.all_gather) as spy:
                found = in_local_form(case, closed, cuts, flat[k * n : (k + 1) * n])
            gathers.append(spy.call_count)
            for b in found:
                assert b.value.shape == block_shape(b.shape, b.cut, SIZES), (b.shape, b.cut, b.value.shape)
                axes = [a for c in b.cut for a in c]
                assert len(axes) == len(set(axes)), b.cut
                outs.append(b.whole_on(range(len(b.shape))).value[None])
        return outs

    f = jax.jit(
        jax.shard_map(program, mesh=mesh(), in_specs=specs, out_specs=P(ALL), check_vma=False),
    )
    found = f(*flat)
    expected = jax.jit(joint(case))(*case.values) * len(all_cuts)
    assert len(found) == len(expected)
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        text = case.cuts[i * len(all_cuts) // len(expected)]
        if jnp.issubdtype(theirs.dtype, jax.dtypes.extended):
            mine, theirs = jax.random.key_data(mine), jax.random.key_data(theirs)
        assert mine.dtype == theirs.dtype, text
        for device in np.asarray(mine):
            np.testing.assert_allclose(device, theirs, rtol=1e-12, atol=1e-12, err_msg=f"{text}, result {i}")
    return gathers


def verify(case, caplog):
    gathers = check(case)
    said = [r.getMessage() for r in caplog.records if r.name == "shardtrain.pipeline.localize.evaluate"]
    assert {text.split()[0] for text in said if "computed whole" in text} == set(case.warns.split())
    if case.local:
        assert gathers == [0] * len(case.cuts)
        assert len(said) == len(case.warns.split())


def ints(*shape, below=5):
    return np.random.default_rng(3).integers(0, below, shape).astype(np.int32)


# --- what models compute between our operators ------------------------------------------------------------

ELEMENTWISE = {
    "activations": Case(
        lambda x: (jax.nn.gelu(x), jax.nn.relu(x), jax.nn.softplus(x)), [(7, 6)], ["d.", "B.", "dh", "R."]
    ),
    "whole_meets_cut": Case(lambda x, b: jnp.tanh(x + b) * b, [(7, 6), (6,)], ["d. .", ".d ."]),
    "cut_otherwise": Case(
        lambda x, y: x * y + x, [(8, 6), (8, 6)], ["d. .d", "B. d.", "R. B.", "d. dh"], local=False
    ),
    "two_uses": Case(lambda x: jnp.sin(x) * x.T, [(6, 6)], ["d.", "dh", "B."], local=False),
    "extents_of_1": Case(
        lambda x, s: lax.mul(x, lax.exp(s)) - s, [(7, 6), (7, 1)], ["d. d.", "dh d.", "d. .."]
    ),
    "extent_1_filled": Case(
        lambda x, s: jnp.broadcast_to(s, (3, 6)) + x + s, [(3, 6), (1, 6)], [".. d.", "d. dh"], local=False
    ),
    "scalars": Case(
        lambda x, s: jnp.clip(x, -s * s, 0.5) + jnp.where(s > 0, x, 2 * x), [(7,), ()], ["d -", "B -"]
    ),
    "select": Case(lambda x, y: jnp.where(x > y, x, 0.0), [(7, 4), (7, 4)], ["d. d.", "dh d."]),
    "integers": Case(
        lambda i, x: (i // 3, i % 2 == 0, ~(i > 2), x * i), [ints(7), (7,)], ["d d", "B B", "d ."]
    ),
    "nothing": Case(lambda x: (jnp.sum(x, 1), x + 1), [(4, 0)], ["d.", ".."]),
    "casts": Case(
        lambda x: x.astype(jnp.float32).astype(float) + lax.bitcast_convert_type(x, jnp.uint32)[..., 0],
        [(7, 3)],
        ["d.", "dh"],
    ),
}
REDUCTIONS = {
    "sums": Case(
        lambda x: (x.sum(), x.sum(0), x.mean(1), x.var((0, 2))),
        [(7, 6, 3)],
        ["d..", "dh.", ".B.", "R.h"[:2] + "."],
    ),
    "products": Case(lambda x: (x.prod(), x.prod(0)), [(7, 6)], ["d.", "dh"], local=False),
    "extremes": Case(lambda x: (x.max(), x.min(0), (x * x).max(1)), [(7, 6)], ["d.", "dh", ".B"]),
    "of_negative": Case(lambda x: (-x * x - 1).max(0), [(7, 5)], ["d.", "dh", "B."]),
    "booleans": Case(
        lambda x: (jnp.any(x > 9), jnp.all(x < 9, 0), jnp.max(x > 9, 0), jnp.sum(x > 0, 0)),
        [(7, 6)],
        ["d.", "dh"],
        local=False,
    ),
    "integers": Case(
        lambda i: (
            i.max(),
            i.min(0),
            i.sum(),
            lax.reduce_and_p.bind(i | 4, axes=(0,)),
            lax.reduce_xor_p.bind(i, axes=(0,)),
        ),
        [ints(7, 6)],
        ["d.", "dh"],
        local=False,
    ),
    "places": Case(
        lambda x: (jnp.argmax(x, 0), jnp.argmin(x, 1), jnp.argmax(x)), [(7, 6)], ["d.", "dh"], local=False
    ),
    "accuracy": Case(lambda x, t: jnp.mean(jnp.argmax(x, -1) == t), [(7, 5), ints(7)], ["d. d", "B. B"]),
    "softmax": Case(
        lambda x: (jax.nn.log_softmax(x), jax.nn.softmax(x, 0), jax.nn.logsumexp(x)),
        [(7, 6)],
        ["dh", ".B"],
    ),
}


def attention(q, k, v):
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k)), v)


PRODUCTS = {
    "dense": Case(lambda x, w: x @ w, [(7, 6), (6, 4)], ["d. ..", "B. ..", "d. .h", ".. .."]),
    "summed_over": Case(lambda x, w: x @ w, [(5, 7), (7, 4)], [".d d.", ".. d.", "hd d.", ".B .."]),
    "rival_axes": Case(
        lambda x, w: x @ w, [(8, 6), (6, 8)], ["d. d.", "d. .d", "d. dh", "hd .d"], local=False
    ),
    "batched": Case(
        lambda q, k: jnp.einsum("bshd,bthd->bhst", q, k),
        [(7, 3, 2, 4), (7, 5, 2, 4)],
        ["d... d...", "B... B...", "d.h. d...", "dh.. d..."],
        local=False,
    ),
    "attention": Case(attention, [(6, 3, 2, 4)] * 3, ["d... d... d...", "d.h. d.h. d.h."]),
}
CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
LAYERS = {
    "conv": Case(
        lambda x, k: lax.conv_general_dilated(x, k, **CONV),
        [(7, 4, 4, 2), (3, 3, 2, 3)],
        ["d... ....", "B... ...."],
    ),
    "depthwise": Case(
        lambda x, k: lax.conv_general_dilated(x, k, feature_group_count=4, **CONV),
        [(7, 4, 4, 4), (3, 3, 1, 8)],
        ["d... ....", "B... ...."],
    ),
    "conv_of_cut_pixels": Case(
        lambda x, k: lax.conv_general_dilated(x, k, **CONV),
        [(4, 4, 5, 2), (3, 3, 2, 3)],
        ["dh.. ....", "d... ...h"],
        local=False,
    ),
    "pools": Case(
        lambda x: (nnx.max_pool(x, (2, 2), (2, 2)), nnx.avg_pool(x, (3, 3), (2, 2), "SAME")),
        [(7, 4, 4, 3)],
        ["d...", "B..."],
    ),
    "pool_by_steps": Case(
        lambda x: (nnx.max_pool(x, (1, 2), (2, 2)), nnx.avg_pool(x, (1, 1), (2, 2))),
        [(3, 6, 4, 2)],
        ["dh..", ".h.."],
        local=False,
    ),
    "norms": Case(
        lambda x, g: nnx.LayerNorm(3, rngs=nnx.Rngs(0), param_dtype=float)(x) * g,
        [(7, 4, 3), (3,)],
        ["d.. .", "dh. ."],
    ),
}
LOOKUPS = {
    "labels": Case(
        lambda x, t: optax.softmax_cross_entropy_with_integer_labels(x, t),
        [(7, 5), ints(7)],
        ["d. d", "B. B", "d. .", ".. d"],
    ),
    "labels_cut_less": Case(
        lambda x, t: optax.softmax_cross_entropy_with_integer_labels(x, t), [(8, 5), ints(8)], ["B. d"]
    ),
    "labels_of_cut_logits": Case(
        lambda x, t: optax.softmax_cross_entropy_with_integer_labels(x, t),
        [(6, 3, 5), ints(6, 3)],
        ["d.h d.", "..B ..", "d.h .."],
    ),
    "labels_of_logits_cut_otherwise": Case(
        lambda x, t: optax.softmax_cross_entropy_with_integer_labels(x, t),
        [(6, 3, 5), ints(6, 3)],
        ["dh. d."],
        local=False,
    ),
    "places_in_cut_dimensions": Case(
        lambda w, t, u: (
            jnp.take(w, t, 0, mode="clip"),
            jnp.take(w, t, 0, mode="fill", fill_value=3.0),
            jnp.take(w, u, 1, mode="wrap"),
            w[t, u],
            lax.convert_element_type(w * 9, int)[t],
        ),
        [(5, 6), ints(7, below=9) - 2, ints(7, below=6)],
        ["d. . .", "dh . .", "B. . .", ".R . .", "d. h h"],
        grad=False,
    ),
    "embedding": Case(lambda w, t: w[t], [(5, 6), ints(7, 3)], [".. d.", ".. dh", ".d h.", ".h .."]),
    "embedding_cut": Case(
        lambda w, t: jnp.take(w, t, axis=0) ** 2, [(5, 6), ints(7)], ["d. d", "d. h", ".d d"], local=False
    ),
    "out_of_bounds": Case(
        lambda w, t: jnp.take(w, t, axis=0, mode="fill", fill_value=3.0),
        [(5, 6), ints(7, below=9)],
        [".. d", ".d h"],
    ),
    "one_row": Case(lambda x: (x[2], x[-1] * x[0]), [(7, 6, 3)], [".d.", "..d", ".dh"]),
    "one_cut_row": Case(
        lambda x, i: (x[2], x[i], x[:, i]), [(7, 6), np.int32(3)], ["d. -", "dh -"], local=False
    ),
    "adds": Case(
        lambda x, t, u: x.at[t].add(u),
        [(5, 6), ints(7), (7, 6)],
        [".. d d.", ".d h hd", ".. B B.", ".d . .d"],
    ),
    "sets": Case(
        lambda x, u: (x.at[:, 2].set(u), x.at[:, 1:3].max(u[:, None]), x.at[1].mul(2.0)),
        [(7, 6), (7,)],
        ["d. d", ".. d"],
        local=False,
    ),
    "own_rows": Case(
        lambda x, t, u: (jnp.put_along_axis(x, t, u, axis=1, inplace=False), jnp.take_along_axis(x, t, 1)),
        [(7, 5), np.tile(np.int32([0, 2]), (7, 1)), (7, 2)],
        ["d. d. d.", "B. B. B.", "d. .. d."],
        local=False,
    ),
    "updates": Case(
        lambda x, u, i: lax.dynamic_slice(lax.dynamic_update_slice(x, u, (i, i, i)), (i, i, i), (2, 3, 7)),
        [(4, 6, 7), (1, 2, 7), np.int32(1)],
        ["..d ..d -", "..B ... -", "... ..d -"],
    ),
    "buffer": Case(
        lambda u, i: jnp.zeros((3, 7)).at[i].set(u), [(7,), np.int32(1)], ["d -", "B -"], local=False
    ),
}
ALONG = {
    "sorts": Case(
        lambda x: (jnp.sort(x, 1), jnp.cumsum(x, 1), jnp.argsort(x, 1), jnp.flip(x, 1), jnp.cumprod(x, 1)),
        [(7, 4)],
        ["d.", "B."],
    ),
    "sorts_across": Case(
        lambda x: (jnp.sort(x, 0), jnp.cumsum(x, 0), jnp.flip(x, 0), lax.cummax(x, 0)),
        [(7, 4)],
        ["d.", "dh"],
        local=False,
    ),
    "best": Case(lambda x: lax.top_k(x, 2), [(7, 5)], ["d.", "B."]),
    "joined": Case(
        lambda x, y: (
            jnp.concatenate([x, y], 1),
            jnp.split(y, 2, 1),
            jnp.stack([x, x + 1], 1),
            jnp.unstack(x, axis=1),
        ),
        [(7, 4), (7, 6)],
        ["d. d.", "B. B.", "d. .."],
    ),
    "joined_across": Case(
        lambda x, y: (jnp.concatenate([x, y]), jnp.tile(x, (2, 1)), jnp.repeat(y, 2, 0)),
        [(7, 4), (3, 4)],
        ["d. d.", "dh .h"],
        local=False,
    ),
    "flattened": Case(
        lambda x: x.reshape(x.shape[0], -1).reshape(-1, 3, 2, 4)[..., None],
        [(7, 6, 4)],
        ["d..", "B..", "R.."],
    ),
    "rearranged": Case(
        lambda x: jnp.einsum("bhcwd->bhwcd", x.reshape(7, 4, 2, 4, 2)), [(7, 8, 8)], ["d..", "dh.", "..B"]
    ),
    "merged": Case(lambda x: x.reshape(-1, 4), [(8, 3, 4)], ["d..", "B..", "d.h"]),
    "merged_inner": Case(lambda x: x.reshape(24, 4), [(4, 6, 4)], [".d.", "hd."], local=False),
    "cropped": Case(
        lambda x: (x[:7] * 2, jnp.pad(x[:7], ((0, 1), (0, 0)), constant_values=2.0).sum(1)),
        [(8, 3)],
        ["d.", "B.", ".."],
    ),
    "shifted": Case(
        lambda x: (x[1:], x[::2], jnp.pad(x, ((1, 2), (0, 1))), jnp.roll(x, 1, 0)),
        [(7, 6)],
        ["d.", "dh"],
        local=False,
    ),
    "squeezed": Case(
        lambda x, y: (x[:, 0], jnp.squeeze(y, 0)), [(7, 1, 3), (1, 4)], ["d.. ..", "dh. d."], local=False
    ),
}


def recurrent(kind):
    """A recurrent layer whose carry starts whole; its weights are arguments."""
    graph, state, rest = nnx.split(
        nnx.RNN(kind(3, 4, rngs=nnx.Rngs(0), param_dtype=float, dtype=float)), nnx.Param, ...
    )
    leaves, tree = jax.tree.flatten(state)

    def run(x, *leaves):
        zeros = jnp.zeros((7, 4))
        carry = zeros if kind is nnx.GRUCell else (zeros, zeros)
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)(x, initial_carry=carry)

    words = " ".join("." * v.ndim for v in leaves)
    return Case(run, [(7, 3, 3), *map(np.asarray, leaves)], [f"B.. {words}"])


def swap(x, y):
    return lax.scan(lambda c, _: ((c[1] * 2, jnp.sin(c[0])), c[0].sum()), (x, y), None, length=3)


def countdown(x):
    return lax.while_loop(lambda c: jnp.max(jnp.abs(c[0])) > 1e-2, lambda c: (c[0] / 2, c[1] + 1), (x, 0))


def grows(x):
    return lax.fori_loop(0, 3, lambda i, c: c + x * i, jnp.zeros_like(x))


def branches(x, i):
    return lax.switch(i, [lambda v: jnp.zeros((7, 4)), lambda v: v * 2, lambda v: v - v.mean(0)], x)


@jax.custom_vjp
def scaled(x):
    return x * 3


scaled.defvjp(lambda x: (x * 3, x), lambda x, g: (g * 3 + x * 0,))

CONTROL = {
    "lstm": recurrent(nnx.LSTMCell),
    "gru": recurrent(nnx.GRUCell),
    "rows": Case(lambda x: lax.scan(lambda c, r: (c + r, c * r), jnp.zeros(6), x), [(5, 6)], [".d", ".B"]),
    "rows_cut": Case(
        lambda x: lax.scan(lambda c, r: (c + r, c * r), jnp.zeros(6), x, reverse=True),
        [(5, 6)],
        ["d.", "dh"],
        local=False,
    ),
    "no_rows": Case(lambda x: lax.scan(lambda c, r: (c + 1, c), x, jnp.zeros((0, 6))), [(6,)], ["d"]),
    "swapped": Case(swap, [(7,), (7,)], ["d d", "B B", "d ."]),
    "while": Case(countdown, [(7, 3)], ["d.", "dh"], grad=False),
    "for": Case(grows, [(7, 3)], ["d.", "dh"]),
    "branches": Case(branches, [(7, 4), np.int32(2)], ["d. -", "B. -"]),
    "other_branch": Case(branches, [(7, 4), np.int32(0)], ["d. -", "dh -"]),
    "calls": Case(
        lambda x: jax.checkpoint(lambda v: scaled(jax.nn.silu(jax.jit(jnp.sin)(v))))(x),
        [(7, 4)],
        ["d.", "dh"],
    ),
    "constants": Case(
        lambda x: x * np.arange(7.0)[:, None] + jnp.asarray(number((7, 4))), [(7, 4)], ["d.", "dh"]
    ),
}


def dropout(key, index, x):
    keep = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, (4,)))(index)
    return jnp.where(keep, x / 0.5, 0)


def seeded(x, index):
    key = jax.random.wrap_key_data(jax.random.key_data(jax.random.split(jax.random.key(1), 7)))
    return x + jax.vmap(lambda k, i: jax.random.normal(jax.random.fold_in(k, i), (4,)))(key, index)


RANDOM = {
    "dropout": Case(
        lambda i, x: dropout(jax.random.key(0), i, x), [ints(7), (7, 4)], ["d d.", "B B.", ". d."]
    ),
    "a_key": Case(
        lambda k, x: x * jax.random.uniform(k, x.shape), [jax.random.key(0), (7, 4)], ["- d.", "- B."]
    ),
    "keys": Case(
        lambda k: (k, jax.vmap(jax.random.uniform)(k), jax.vmap(jax.random.split)(k), k[::-1]),
        [jax.random.split(jax.random.key(0), 8)],
        ["d", "B"],
        local=False,
    ),
    "seeds": Case(seeded, [(7, 4), ints(7)], ["d. d", "dh d"]),
}
FALLBACKS = {
    "fft": Case(lambda x: jnp.fft.rfft(x).real, [(7, 4)], ["d.", "dh"], local=False, warns="fft"),
    "cholesky": Case(
        lambda x: jnp.linalg.cholesky(x @ x.mT + 3 * jnp.eye(3)),
        [(5, 3, 3)],
        ["d.."],
        local=False,
        warns="cholesky",
    ),
    "whole": Case(lambda x: jnp.fft.rfft(x).real, [(7, 4)], [".."]),
}


def convs(x, k):
    y = x + st.ops.conv(x, k)
    return lax.scan(lambda c, _: (jnp.tanh(st.ops.conv(c, k)), c.mean((1, 2))), y, None, length=2)


ISLANDS = {
    "even": Case(convs, [(4, 8, 6, 2), (3, 3, 2, 2)], ["dh.. ....", ".... ....", "d... ...."], local=False),
    "uneven": Case(convs, [(5, 7, 6, 2), (3, 3, 2, 2)], ["dh.. ....", "d... ...."], local=False),
    "pools": Case(
        lambda x: st.ops.max_pool(jax.nn.relu(x), (2, 2), strides=(2, 2)),
        [(3, 8, 6, 2)],
        ["dh..", "...."],
        local=False,
    ),
}
GROUPS = {
    "islands": ISLANDS,
    "elementwise": ELEMENTWISE,
    "reductions": REDUCTIONS,
    "products": PRODUCTS,
    "layers": LAYERS,
    "lookups": LOOKUPS,
    "along": ALONG,
    "control": CONTROL,
    "random": RANDOM,
    "fallbacks": FALLBACKS,
}
CASES = {f"{group}-{name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_local_form_is_the_function(name, caplog):
    verify(CASES[name], caplog)


# --- shapes by chance --------------------------------------------------------------------------------------

LETTERS = [".", "d", "h", "B", "R"]


@some.composite
def arrays(draw, rank=(1, 3), most=9):
    """A shape, and a cut of it."""
    shape = tuple(draw(some.lists(some.integers(1, most), min_size=rank[0], max_size=rank[1])))
    return shape, draw(cuts_of(len(shape)))


@some.composite
def cuts_of(draw, rank):
    letters, left = [], {"d", "h"}
    for dim in draw(some.permutations(range(rank))):
        free = [c for c in LETTERS if used(c) <= left]
        letter = draw(some.sampled_from(free))
        left -= used(letter)
        letters.append((dim, letter))
    return "".join(letter for _, letter in sorted(letters))


def used(letter):
    return {axis[0] for axis in AXES[letter]}


def chance(test):
    return settings(max_examples=10, deadline=None, derandomize=True)(test)


@chance
@given(arrays(), some.data())
def test_blocks_move_between_any_two_cuts(array, data):
    shape, before = array
    after = data.draw(cuts_of(len(shape)))
    x = np.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    [old], [new] = parsed(before), parsed(after)

    def program(value):
        return Block(value, shape, old, SIZES).moved(new).filled(-1, range(len(shape))).value

    f = jax.shard_map(program, mesh=mesh(), in_specs=spec(old), out_specs=spec(new), check_vma=False)
    found = np.asarray(jax.jit(f)(padded(x, old)))
    expected = padded(x, new)
    np.testing.assert_array_equal(found, np.where(np.isnan(expected), -1, expected))


@some.composite
def reshapes(draw):
    """Two shapes of the same elements: factors in order, grouped twice."""
    factors = draw(some.lists(some.sampled_from([1, 2, 2, 3, 4, 7]), min_size=1, max_size=4))

    def grouped():
        ends = sorted(draw(some.sets(some.integers(1, len(factors) - 1)))) if len(factors) > 1 else []
        return tuple(math.prod(factors[a:b]) for a, b in zip([0, *ends], [*ends, len(factors)], strict=True))

    return grouped(), grouped()


@chance
@given(reshapes(), some.data())
def test_reshapes(shapes, data):
    cuts = data.draw(
        some.lists(cuts_of(len(shapes[0])), min_size=3, max_size=3, unique=True)
        if len(shapes[0]) > 1
        else some.just(LETTERS)
    )
    check(Case(lambda x: x.reshape(shapes[1]), [shapes[0]], cuts, grad=False))


@chance
@given(arrays(), some.data())
def test_transposes_and_broadcasts(array, data):
    shape, cut = array
    order = data.draw(some.permutations(range(len(shape))))
    more = tuple(data.draw(some.lists(some.integers(1, 5), max_size=1)))
    grown = (*more, *(data.draw(some.integers(1, 5)) if n == 1 else n for n in shape))
    check(Case(lambda x: (x.transpose(order), jnp.broadcast_to(x, grown)), [shape], [cut], grad=False))


@chance
@given(arrays(), some.data())
def test_slices_and_pads(array, data):
    shape, cut = array
    parts = []
    for n in shape:
        start = data.draw(some.sampled_from([0, 0, data.draw(some.integers(0, n - 1))]))
        parts.append(
            slice(start, data.draw(some.integers(start + 1, n)), data.draw(some.sampled_from([1, 1, 2])))
        )
    pads = [
        data.draw(
            some.sampled_from([(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 1), (0, -1, 0), (-1, 1, 0)])
        )
        for _ in shape
    ]
    check(Case(lambda x: (x[tuple(parts)].sum(0), lax.pad(x, 2.0, pads) * 2), [shape], [cut], grad=False))


@chance
@given(arrays(rank=(2, 3)), some.data())
def test_reductions(array, data):
    shape, cut = array
    dims = tuple(data.draw(some.sets(some.integers(0, len(shape) - 1), min_size=1)))
    check(Case(lambda x: (x.sum(dims), x.max(dims), jnp.cumsum(x, dims[0])), [shape], [cut], grad=False))


# --- made wrong on purpose ---------------------------------------------------------------------------------


def unsummed(equation, blocks):
    """As `reduce`, but each device keeps what it summed itself."""
    dims, x = equation.params["axes"], blocks[0]
    (out,) = reductions.reduce(equation, blocks)
    (value,) = jaxprs.rebind(equation, [x.filled(0, dims).value])
    return [Block(value, out.shape, out.cut, out.sizes)]


def unfilled(self, fill, dims):
    return self


def shifted(self, dim, new):
    moved = SLICED(self, dim, new)
    more = new[len(self.cut[dim]) :]
    return (
        Block(
            lax.ppermute(moved.value, more, [(0, 1), (1, 0)]),
            *[getattr(moved, k) for k in ("shape", "cut", "sizes")],
        )
        if len(more) == 1
        else moved
    )


def added_everywhere(equation, blocks):
    x, index, update = blocks
    axes = tuple(a for c in update.cut for a in c)
    out = jaxprs.rebind(equation, [jnp.ones_like(x.value), index.value, update.value])[0]
    return [Block(lax.psum(out, axes), x.shape, x.cut, x.sizes)]


def careless(equation, blocks):
    """As `elementwise`, but operands are taken as they come."""
    (out,) = elementwise.elementwise(equation, blocks)
    cut = max((b.cut for b in blocks), key=len)
    values = [
        b.value if b.cut == cut else lax.slice(b.value, [0] * b.value.ndim, blocks[0].value.shape)
        for b in blocks
    ]
    return [Block(jaxprs.rebind(equation, values)[0], out.shape, cut, out.sizes)]


def unjoined(equation, blocks):
    """As `gather`, but each device keeps what it read itself."""
    with mock.patch.object(lax, "psum", lambda value, axes: value):
        return lookups.gather(equation, blocks)


def of_own_blocks(equation, blocks):
    """As `argmax`, but the places are those in each device's block."""
    with mock.patch.object(reductions, "_place", lambda equation, x, mine, dim: mine):
        return reductions.reduce(equation, blocks)


SLICED = Block._sliced
MUTANTS = {
    "psum_forgotten": ("reduce_sum", unsummed, Case(lambda x: x.sum(0), [(8, 4)], ["d."])),
    "not_filled_in_sums": ("filled", unfilled, Case(lambda x: x.sum(0), [(7, 4)], ["d."])),
    "not_filled_in_products": ("filled", unfilled, Case(lambda x, w: x @ w, [(4, 7), (7, 4)], [".d d."])),
    "not_filled_in_pads": ("filled", unfilled, Case(lambda x: jnp.pad(x, (0, 1)), [(7,)], ["d"])),
    "the_wrong_block": ("_sliced", shifted, Case(lambda x, b: x + b, [(8, 4), (8, 4)], ["d. .."])),
    "added_to_many_times": (
        "scatter-add",
        added_everywhere,
        Case(lambda x, t, u: x.at[t].add(u), [(5, 4), ints(8), (8, 4)], [".. d d."], grad=False),
    ),
    "lookups_not_joined": (
        "gather",
        unjoined,
        Case(lambda x, t: jnp.take_along_axis(x, t, 1), [(3, 8), ints(3, 1)], [".d .."], grad=False),
    ),
    "places_in_blocks": ("argmax", of_own_blocks, Case(lambda x: jnp.argmax(x, 1), [(9, 8)], [".d"])),
    "blocks_that_do_not_meet": ("add", careless, Case(lambda x, y: x + y, [(8, 4), (8, 4)], ["d. .."])),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_noticed(name, monkeypatch):
    where, wrong, case = MUTANTS[name]
    check(case)
    if where in rules.RULES:
        monkeypatch.setitem(rules.RULES, where, wrong)
    else:
        monkeypatch.setattr(Block, where, wrong)
    with pytest.raises(AssertionError):
        check(case)


def test_a_warning_comes_once_and_says_where(caplog):
    case = Case(
        lambda x: lax.fori_loop(0, 2, lambda i, c: c + jnp.fft.rfft(c).real.sum(), x),
        [(7, 4)],
        ["d."],
        grad=False,
    )
    check(case)
    (record,) = caplog.records
    assert "fft (" in record.getMessage()
    assert "test_evaluate.py:" in record.getMessage()


GATHERS = {
    "rev": lambda x: jnp.flip(x, 1),
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "reshape": lambda x: x.reshape(-1),
    "dot_general": lambda x: x.T @ x,
    "scan": lambda x: lax.scan(lambda c, row: (c, row + 1), 0, x.T)[1],
}


@pytest.mark.parametrize("name", GATHERS)
def test_what_a_rule_gathers_is_said_once_with_its_place(name, caplog):
    """Where a dimension is cut by `height`, and only there."""
    case = Case(GATHERS[name], [(3, 8)], [".h"], local=False)
    check(case)
    check(dataclasses.replace(case, cuts=[".."]))
    (text,) = {r.getMessage() for r in caplog.records}
    assert len(caplog.records) == 1
    assert text.startswith(f"{name} (")
    assert re.search(r"test_evaluate.py:\d+\) gathers an operand of shape \(.*\) over height", text)


def test_blocks_that_are_only_cut_otherwise_are_not_called_gathered(caplog):
    check(Case(lambda x, y: x * y, [(8, 6), (8, 6)], ["d. .d", ".h h."], local=False))
    assert not caplog.records


def test_cuts_of_specs():
    assert cut_of(P("data", None, ("data", "height")), 4) == (("data",), (), ("data", "height"), ())
    assert cut_of(None, 2) == ((), ())
    assert block_shape((7, 5, 0), (("data",), ("data", "height"), ("height",)), SIZES) == (4, 2, 0)
