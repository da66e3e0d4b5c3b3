"""Multi-head attention whose projections are partitioned and whose heads XLA divides."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as promote_together
from jax import Array, lax
from jaxtyping import Num

from shardtrain.errors import UserError
from shardtrain.nn.base import refuse, refuse_sharding
from shardtrain.nn.draws import key_of_batch
from shardtrain.nn.examples import current_examples
from shardtrain.nn.linear import LinearGeneral
from shardtrain.nn.norm import LayerNorm


def dot_product_attention(
    query: Num[Array, "*batch queries heads features"],
    key: Num[Array, "*batch keys key_heads features"],
    value: Num[Array, "*batch keys key_heads values"],
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: lax.PrecisionLike = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = promote_together,
    is_causal: bool = False,
) -> Num[Array, "*batch queries heads values"]:
    """`nnx.dot_product_attention`, in the inputs' precision, with the same dropout on every mesh.

    XLA divides it over the axes that cut the batch and the heads; where the keys are cut, they are gathered.

    Args:
        query: the queries.
        key: the keys; several heads of queries may share one head of keys.
        value: the values.
        bias: added to the products of queries and keys, `(*batch, heads, queries, keys)` or what broadcasts.
        mask: False for keys that a query does not see, likewise.
        broadcast_dropout: whether all examples and heads have the same dropout.
        dropout_rng: the random key of the dropout.
        dropout_rate: which part of the weights is dropped.
        deterministic: whether nothing is dropped.
        dtype: of the computation; by default that of the inputs.
        precision: of the products.
        module: which sows the weights, if given.
        promote_dtype: gives the inputs their common type.
        is_causal: whether a query sees only the keys up to its own place.

    Returns:
        For each query the weighted mean of the values.

    Raises:
        UserError: heads of queries that do not divide by those of keys.

    Example:
        >>> from shardtrain.nn.attention import dot_product_attention
        >>> query, key = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8))
        >>> dot_product_attention(query, key, key).shape
        (2, 5, 4, 8)

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    heads, shared = query.shape[-2], key.shape[-2]
    if heads % shared:
        raise UserError(f"attention: {heads} heads of queries do not divide by {shared} heads of keys")
    key, value = (jnp.repeat(x, heads // shared, axis=-2) if heads > shared else x for x in (key, value))
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    products = jnp.einsum("...qhd,...khd->...hqk", query, key, precision=precision)
    products = products if bias is None else products + bias
    if is_causal:
        causal = jnp.tril(jnp.ones(products.shape[-2:], bool))
        mask = causal if mask is None else mask.astype(bool) & causal
    if mask is not None:
        products = jnp.where(mask, products, jnp.finfo(products.dtype).min)
    weights = jax.nn.softmax(products)
    if module is not None:
        module.sow(nnx.Intermediate, "attention_weights", weights)
    if dropout_rng is not None and not deterministic and dropout_rate > 0:
        kept = _kept(weights.shape, dropout_rng, 1 - dropout_rate, broadcast_dropout)
        weights = weights * kept.astype(weights.dtype) / jnp.asarray(1 - dropout_rate, weights.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)


def _kept(shape: tuple[int, ...], key: Array, probability: float, broadcast: bool) -> Array:
    """Which weights are kept: the same of all examples and heads, or drawn by the index of the example."""
    key = key_of_batch(key)
    if broadcast:
        return jax.random.bernoulli(key, probability, (1,) * (len(shape) - 2) + shape[-2:])
    index = current_examples(shape[0]).index
    draw = lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), probability, shape[1:])  # noqa: E731
    return jax.vmap(draw)(index)


def _partitioned(kind: type, plain: nnx.Module) -> nnx.Module:
    """A layer of the subclass `kind`, with the variables and arguments of a plain one."""
    layer: nnx.Module = object.__new__(kind)
    vars(layer).update(vars(plain))
    return layer


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`nnx.MultiHeadAttention` with projections that are cut by heads over the axes that cut channels.

    Args:
        args: positional arguments of `nnx.MultiHeadAttention`.
        kwargs: keyword arguments of `nnx.MultiHeadAttention`. An `attention_fn` of your own gets global
            arrays, which XLA divides.

    Raises:
        UserError: at construction, for a `dot_general` of your own; when called, for an `out_sharding` or a
            `qkv_sharding`.

    Example:
        >>> layer = st.nn.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 16)), is_causal=True).shape
        (2, 5, 16)

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"attention_fn": dot_product_attention} | kwargs))
        for name in ("qkv_dot_general", "out_dot_general", "qkv_dot_general_cls", "out_dot_general_cls"):
            refuse(self, name, (None, lax.dot_general), "the layer brings its own")
        for name in ("query", "key", "value", "out"):
            setattr(self, name, _partitioned(LinearGeneral, getattr(self, name)))
        for name in ("query_ln", "key_ln"):
            if (plain := getattr(self, name)) is not None:
                setattr(self, name, _partitioned(LayerNorm, plain))

    def __call__(  # type: ignore[override]
        self, inputs_q: Num[Array, "*batch queries features"], *args: Any, **kwargs: Any
    ) -> Num[Array, "*batch queries features_out"]:
        """Attends as `nnx.MultiHeadAttention`, with its arguments."""
        refuse_sharding(self, **{name: kwargs.get(name) for name in ("out_sharding", "qkv_sharding")})
        return super().__call__(inputs_q, *args, **kwargs)
