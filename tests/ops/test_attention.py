"""Attention of cut tokens and heads against the formula on one device."""

import functools
import inspect
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, make_mesh, ops
from shardtrain.errors import UserError
from shardtrain.ops import island
from shardtrain.ops.attention import _Plan

from .parity import (
    ALL_MESHES,
    LAYOUTS,
    MESHES,
    examples,
    named,
    numbers,
    on_stages,
    parity,
    reference_attention,
)
from .test_census import WORD, facts, sent


def attention_parity(mesh, rows, tokens, heads, extra=(), causal=False, layout=None):
    """Values, weights and the gradients of queries, keys, values, the bias and what is kept."""
    (queries, keys), (heads, shared) = tokens, heads
    shape = (*rows, heads, queries, keys)
    args = [
        numbers(*rows, queries, heads, 3),
        numbers(*rows, keys, shared, 3),
        numbers(*rows, keys, shared, 2),
    ]
    masks = {}
    for name, kept in extra:
        given = [n if keep else 1 for n, keep in zip(shape, kept, strict=True)]
        if name == "mask":
            masks["mask"] = jnp.asarray(numbers(*given, seed=3) < 0.8).at[..., 0].set(True)
        else:
            args.append(numbers(*given, seed=4))
            masks[name] = None

    def call(f, query, key, value, *scores):
        given = dict(zip((name for name, x in masks.items() if x is None), scores, strict=True))
        return f(query, key, value, **masks | given, is_causal=causal)

    op = functools.partial(ops.attention, layout=layout)
    parity(functools.partial(call, op), functools.partial(call, reference_attention), args, mesh)


CASES = {
    "rows": st.sampled_from(((2,), (3,), (4, 3))),
    "tokens": st.sampled_from(((1, 1), (5, 5), (8, 8), (9, 9), (3, 7))),
    "heads": st.sampled_from(((4, 4), (8, 2), (8, 8), (3, 1), (6, 3))),
    "causal": st.booleans(),
    "layout": st.sampled_from(LAYOUTS),
}


@examples(4)
@given(mesh=st.sampled_from(MESHES), **CASES)
def test_any_attention_on_any_mesh(mesh, rows, tokens, heads, causal, layout):
    attention_parity(mesh, rows, tokens, heads, causal=causal, layout=layout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(150)
@given(mesh=st.sampled_from(ALL_MESHES), **CASES)
def test_many_attentions_on_every_mesh(mesh, rows, tokens, heads, causal, layout):
    attention_parity(mesh, rows, tokens, heads, causal=causal, layout=layout)


OFTEN = {
    "17 tokens and a class token's mask": (
        "data=2,width=2,channel=2",
        (3,),
        (17, 17),
        (4, 4),
        [("mask", (True, False, False, True)), ("bias", (False, True, True, True))],
    ),
    "3 tokens on 8 devices, heads shared": ("width=8", (2,), (3, 11), (4, 2), (), False),
}
SELDOM = {
    "one head of keys for heads that are cut": ("width=2,channel=4", (2,), (7, 7), (8, 1), (), True),
    "images: each row of pixels attends": (
        "height=2,width=2,channel=2",
        (2, 3),
        (5, 5),
        (4, 4),
        [("mask", (True, True, False, False, True)), ("kept", (True, True, True, True, True))],
    ),
    "tokens over two axes": (
        "height=2,width=2,channel=2",
        (2,),
        (9, 9),
        (2, 2),
        [("kept", (False, True, True, True))],
        True,
        Layout(height=(), width=("height", "width")),
    ),
    "heads that do not divide": ("data=2,channel=4", (2,), (5, 5), (6, 6)),
}


@pytest.mark.parametrize(
    "case", named({k: (v,) for k, v in OFTEN.items()}, {k: (v,) for k, v in SELDOM.items()})
)
def test_notorious(case):
    attention_parity(*case)


def test_inside_a_stage():
    args = [numbers(2, 2, n, 4, 3) for n in (7, 5, 5)]
    parity(
        on_stages(lambda *args: ops.attention(*args)[0]),
        jax.vmap(lambda *args: reference_attention(*args)[0]),
        args,
        "pipe=2,data=2,width=2",
    )


# --- what is sent -----------------------------------------------------------------------------------------


def test_keys_and_values_are_gathered_and_their_gradients_scattered():
    """Of 16 tokens each device has 4: 3/4 of keys and values come, 3/4 of their gradients go; heads stay."""
    mesh = make_mesh("width=4,channel=2")
    shapes, home = [(2, 16, 6, 8)] * 3, P(None, "width", "channel", None)
    moved = sent(lambda *args: ops.attention(*args)[0], mesh, shapes, [home] * 3, out=home)
    part = 2 * 16 * 3 * 8 * WORD
    assert facts(moved) == Counter(
        {
            ("all-gather", ("width",), part // 4): 2,
            ("reduce-scatter", ("width",), part): 2,
        }
    )


def test_uncut_tokens_send_nothing():
    mesh = make_mesh("data=2,channel=4")
    home = P("data", None, "channel", None)
    assert sent(lambda *args: ops.attention(*args)[0], mesh, [(4, 9, 8, 5)] * 3, [home] * 3, out=home) == []


# --- wrong on purpose -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_caches():
    jax.clear_caches()
    yield
    jax.clear_caches()


def own_tokens_alone(self, x):
    return jnp.concatenate([x] * lax.axis_size(self.tokens), -3)[..., : self.shape[-1], :, :]


def causal_of_a_block(self, queries, mask):
    return jnp.arange(queries)[:, None] >= jnp.arange(self.shape[-1])


def heads_from_the_first(self, x):
    x = lax.all_gather(x, self.tokens, axis=x.ndim - 3, tiled=True)
    return jnp.take(x, jnp.arange(self.shape[-3] // lax.axis_size(self.heads)) // self.group, axis=-2)


MUTANTS = {
    "a device sees its own tokens": ("for_my_queries", own_tokens_alone, ("width=2", (2,), (4, 4), (2, 2))),
    "a causal mask of local places": (
        "visible",
        causal_of_a_block,
        ("width=2", (2,), (4, 4), (2, 2), (), True),
    ),
    "the first device's heads": (
        "for_my_queries",
        heads_from_the_first,
        ("width=2,channel=4", (2,), (4, 4), (8, 2)),
    ),
}


@pytest.mark.parametrize(("method", "wrong", "case"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_noticed(method, wrong, case, monkeypatch, fresh_caches):
    monkeypatch.setattr(_Plan, method, wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        attention_parity(*case)


def test_padding_among_the_keys_is_noticed(monkeypatch, fresh_caches):
    """Keys past the last token are left out by cropping what was gathered."""
    monkeypatch.setattr(lax, "slice_in_dim", lambda x, first, last, axis: x)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        attention_parity("width=2", (2,), (5, 5), (2, 2))


def test_the_padding_of_blocks_may_hold_anything(monkeypatch, fresh_caches):
    """XLA stores an uneven array with padding of its own; nothing of it reaches a value or a gradient."""

    def pad_with_nan(x, extents):
        widths = [(0, extent - have) for extent, have in zip(extents, x.shape, strict=True)]
        return jnp.pad(x, widths, constant_values=jnp.nan)

    monkeypatch.setattr(island, "pad_to", pad_with_nan)
    attention_parity("data=2,width=2", (3,), (5, 5), (2, 2))
    jax.clear_caches()
    monkeypatch.setattr(island, "mask_padding", lambda x, *_: x)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        attention_parity("data=2,width=2", (3,), (5, 5), (2, 2))


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "scores", "message"),
    [
        ([(2, 5, 6, 3), (2, 5, 4, 3), (2, 5, 4, 3)], {}, "6 heads of queries do not divide by 4 heads of keys"),
        ([(2, 5, 4, 3), (2, 5, 4, 2), (2, 5, 4, 3)], {}, r"keys of \(2, 5, 4, 2\) .* do not agree"),
        ([(2, 5, 4, 3), (3, 5, 4, 3), (3, 5, 4, 3)], {}, "do not agree; they are"),
        ([(2, 5, 4, 3), (2, 6, 4, 3), (2, 5, 4, 3)], {}, "keys and values of the same tokens"),
        ([(2, 5, 4, 3)] * 3, {"mask": jnp.ones((2, 5, 5), bool)}, r"a mask of shape \(2, 5, 5\) does not broadcast"),
        ([(2, 5, 4, 3)] * 3, {"bias": jnp.ones((1, 2, 4, 5, 5))}, "a bias of shape"),
    ],
)  # fmt: skip
def test_refused(shapes, scores, message):
    with pytest.raises(UserError, match=message):
        inspect.unwrap(ops.attention)(*(jnp.ones(shape) for shape in shapes), **scores)
