"""Multi-head attention whose projections, tokens and heads are partitioned."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as promote_together
from jax import Array, lax
from jaxtyping import Num

from shardtrain.errors import UserError
from shardtrain.layout import Layout
from shardtrain.nn.base import Partitioned, refuse, refuse_sharding
from shardtrain.nn.draws import key_of_batch
from shardtrain.nn.examples import current_examples
from shardtrain.nn.linear import LinearGeneral
from shardtrain.nn.norm import LayerNorm
from shardtrain.ops.attention import attention


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
    *,
    layout: Layout | None = None,
) -> Num[Array, "*batch queries heads values"]:
    """`nnx.dot_product_attention`, in the inputs' precision, with the same dropout on every mesh.

    Batch, queries and heads stay where they are cut; keys and values are gathered, see
    `shardtrain.ops.attention`.

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
        layout: which mesh axes cut what; by name by default.

    Returns:
        For each query the weighted mean of the values.

    Raises:
        UserError: shapes that do not agree, such as heads of queries that do not divide by those of keys.

    Example:
        >>> from shardtrain.nn.attention import dot_product_attention
        >>> query, key = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8))
        >>> dot_product_attention(query, key, key).shape
        (2, 5, 4, 8)

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    kept = None
    if dropout_rng is not None and not deterministic and dropout_rate > 0:
        shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
        kept = _kept(shape, dropout_rng, 1 - dropout_rate, broadcast_dropout) / (1 - dropout_rate)
    scores = (bias, None if mask is None else mask.astype(bool), kept)
    inputs: tuple[Any, ...] = (query, key, value, *scores)
    if alone := query.ndim == 3:  # one example, without a dimension of the batch
        inputs = tuple(None if x is None else x[None] for x in inputs)
    y, weights = attention(*inputs, is_causal=is_causal, layout=layout, precision=precision)
    if module is not None:
        module.sow(nnx.Intermediate, "attention_weights", weights[0] if alone else weights)
    return y[0] if alone else y


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


class DotProductAttention(Partitioned, nnx.Module):
    """`dot_product_attention` as a layer without parameters, which has a layout."""

    def __call__(
        self, query: Num[Array, "*batch queries heads features"], *args: Any, **kwargs: Any
    ) -> Num[Array, "*batch queries heads values"]:
        """Attends as `dot_product_attention`, with its arguments."""
        # Not `in_layout`, which would redistribute a mask as if it were an activation.
        with jax.named_scope(self.path or type(self).__name__):
            return dot_product_attention(query, *args, layout=self.layout, **kwargs)


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`nnx.MultiHeadAttention` whose projections and heads are cut by the axes that cut channels.

    Axes that cut the tokens, as they cut the pixels of a signal, cut the queries; keys and values are
    gathered over them, see `shardtrain.ops.attention`.

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
        super().__init__(*args, **({"attention_fn": DotProductAttention()} | kwargs))
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
        positions = kwargs.get("input_positions")
        if positions is not None and isinstance(self.attention_fn, DotProductAttention):
            raise UserError(
                f"nn.MultiHeadAttention: input_positions={positions!r}, which dot-product attention does not "
                f"take; leave input_positions out, or give an attention_fn that takes them"
            )
        return super().__call__(inputs_q, *args, **kwargs)
