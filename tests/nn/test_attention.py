"""Multi-head attention against nnx on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ops.parity import reference_attention

from shardtrain import Layout, make_mesh, nn
from shardtrain.errors import UserError
from shardtrain.nn.attention import dot_product_attention

from .test_layers import x64

MASK = jnp.tril(jnp.ones((6, 6), bool))[None, None]


def plain_attention(query, key, value, mask=None, is_causal=False, **_):
    """The formula; nnx's own function has digits of float32 only."""
    return reference_attention(query, key, value, mask=mask, is_causal=is_causal)[0]


def outcome(layer, inputs, call):
    def loss(layer, inputs):
        y = layer(*inputs, **call)
        return jnp.sin(y).sum(), y

    (grad_layer, grad_inputs), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, inputs)
    return y, grad_inputs, nnx.to_pure_dict(grad_layer)


CASES = {
    "self": ({}, 1, {}),
    "self, normalized": ({"normalize_qk": True, "qkv_features": 16}, 1, {"mask": MASK}),
    "cross": ({"qkv_features": 16, "out_features": 6}, 2, {"mask": MASK[..., :5]}),
    "shared heads": ({"num_kv_heads": 2}, 1, {"is_causal": True}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c == "cross" else pytest.mark.slow) for c in CASES]
)
@pytest.mark.parametrize(
    "spec",
    [
        "height=2,channel=2",
        pytest.param("data=2,width=2,channel=2", marks=pytest.mark.slow),
        pytest.param("data=2,height=2", marks=pytest.mark.slow),
        pytest.param("width=4", marks=pytest.mark.slow),
    ],
)
def test_parity_with_nnx(case, spec):
    options, inputs, call = CASES[case]
    options = {"num_heads": 4, "in_features": 8, "decode": False, "param_dtype": jnp.float64} | options
    x = [jax.random.normal(jax.random.key(i), (4, n, 8), jnp.float64) for i, n in enumerate((6, 5))][:inputs]
    reference = x64(nnx.MultiHeadAttention(**options, attention_fn=plain_attention, rngs=nnx.Rngs(0)))
    layer = x64(nn.MultiHeadAttention(**options, rngs=nnx.Rngs(0)))
    expected = nnx.jit(lambda layer, x: outcome(layer, x, call))(reference, x)
    mesh = make_mesh(spec)
    nn.assign(nnx.Sequential(layer, nn.Conv(1, 1, (1, 1), rngs=nnx.Rngs(0))), mesh, Layout(), {})
    with jax.set_mesh(mesh):
        found = nnx.jit(lambda layer, x: outcome(layer, x, call))(layer, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, expected)


def test_heads_are_cut():
    layer = nn.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0))
    specs = nn.partition.parameter_spec(layer, make_mesh("channel=4"), Layout())
    assert specs["query", "kernel"][1] == "channel"
    assert "channel" in specs["out", "kernel"]


def test_float64_stays_float64():
    """Where nnx sums in float32 whatever the inputs are, the formula's digits are there."""
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 5, 4, 8), jnp.float64) for i in range(3))
    found = dot_product_attention(query, key, value)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, plain_attention(query, key, value), rtol=1e-12)


def test_dropout_is_that_of_nnx_or_drawn_by_example():
    """The same for all examples: nnx's. One for each: by the index of the example, on every mesh."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    options = {"num_heads": 4, "in_features": 8, "decode": False, "dropout_rate": 0.5, "deterministic": False}
    ours, theirs = (library.MultiHeadAttention(**options, rngs=nnx.Rngs(0)) for library in (nn, nnx))
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    layer = nn.MultiHeadAttention(**options, broadcast_dropout=False, rngs=nnx.Rngs(0))
    whole = layer(x, rngs=nnx.Rngs(dropout=1))
    with nn.examples(jnp.array([1, 3])):
        odd = layer(x[1::2], rngs=nnx.Rngs(dropout=1))
    np.testing.assert_allclose(odd, whole[1::2], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_decoding_keeps_the_keys_of_nnx():
    x = jax.random.normal(jax.random.key(0), (2, 4, 8), jnp.float32)
    ours, theirs = (library.MultiHeadAttention(4, 8, rngs=nnx.Rngs(0)) for library in (nn, nnx))
    for layer in (ours, theirs):
        layer.init_cache(x.shape)
    for place in range(4):
        step = x[:, place : place + 1]
        np.testing.assert_allclose(ours(step, decode=True), theirs(step, decode=True), rtol=1e-4, atol=1e-5)


def test_refused():
    with pytest.raises(UserError, match="6 heads of queries do not divide by 4 heads of keys"):
        dot_product_attention(jnp.ones((2, 5, 6, 3)), jnp.ones((2, 5, 4, 3)), jnp.ones((2, 5, 4, 3)))
