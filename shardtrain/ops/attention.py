"""Attention of tokens that mesh axes may cut: each device keeps its queries, and gathers keys and values."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Axes, Layout, active_mesh, chosen, spatial_names, spec
from shardtrain.ops import island
from shardtrain.ops.norm import mask_cuts, with_all_dimensions


def attention(
    query: Float[Array, "batch *spatial heads features"],
    key: Float[Array, "batch *spatial_of_keys key_heads features"],
    value: Float[Array, "batch *spatial_of_keys key_heads features_out"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    kept: Float[Array, "..."] | None = None,
    *,
    is_causal: bool = False,
    layout: Layout | None = None,
    precision: lax.PrecisionLike = None,
) -> tuple[Float[Array, "batch *spatial heads features_out"], Float[Array, "batch *rows heads queries keys"]]:
    """Scaled dot-product attention along the last spatial dimension, the tokens, in the inputs' precision.

    Axes that cut the tokens cut the queries; keys and values are gathered over them, and their gradients are
    reduce-scattered. Axes that cut channels cut the heads where they divide. Nothing else is sent.

    Args:
        query: the queries; dimensions between the batch and the tokens are more of the batch.
        key: the keys. There may be fewer heads than those of the queries, which then share them.
        value: the values.
        bias: added to the products of queries and keys; it broadcasts against the weights.
        mask: False for keys that a query does not see, likewise. A query that sees none has the mean of all.
        kept: multiplies the weights of the mean, likewise; for dropout.
        is_causal: whether a query sees only the keys up to its own place.
        layout: which mesh axes cut what; by name by default.
        precision: of the products, as in `lax.dot_general`.

    Returns:
        For each query the weighted mean of the values, and the weights before `kept`, `(batch, ..., heads,
        queries, keys)`.

    Raises:
        UserError: shapes that do not agree.

    Example:
        >>> tokens = jnp.ones((2, 7, 4, 8))
        >>> y, weights = st.ops.attention(tokens, tokens, tokens)
        >>> y.shape, weights.shape
        ((2, 7, 4, 8), (2, 4, 7, 7))

    References:
        Vaswani et al., Attention Is All You Need, NeurIPS 2017, equation 1.
    """
    _check(query, key, value)
    rows = query.shape[:-3]
    shape = (*rows, query.shape[-2], query.shape[-3], key.shape[-3])
    scores = [
        None if x is None else _aligned(name, x, shape)
        for name, x in (("bias", bias), ("mask", mask), ("kept", kept))
    ]
    return _attention(
        query, key, value, *scores, is_causal=is_causal, layout=chosen(layout), precision=precision
    )


def _check(query: Array, key: Array, value: Array) -> None:
    if query.shape[-2] % key.shape[-2]:
        raise UserError(
            f"attention: {query.shape[-2]} heads of queries do not divide by {key.shape[-2]} heads of keys"
        )
    same = query.ndim == key.ndim == value.ndim >= 4 and key.shape[:-1] == value.shape[:-1]
    if not (same and query.shape[:-3] == key.shape[:-3] and query.shape[-1] == key.shape[-1]):
        raise UserError(
            f"attention: queries of shape {query.shape}, keys of {key.shape} and values of {value.shape} do "
            f"not agree; they are (batch, tokens, heads, features), keys and values of the same tokens"
        )


def _aligned(name: str, given: Array, shape: tuple[int, ...]) -> Array:
    """What broadcasts against the weights, with as many dimensions as they have."""
    aligned = with_all_dimensions(given, shape)
    if aligned is None:
        raise UserError(
            f"attention: a {name} of shape {given.shape} does not broadcast against the weights, which are "
            f"(batch, heads, queries, keys) = {shape}"
        )
    return aligned


@dataclass(frozen=True)
class _Plan:
    """One attention on one mesh: what is cut, and the computation of one device.

    Attributes:
        mesh: None for one device.
        rows: for the batch and each dimension that is more of it, the axes that cut it.
        tokens: axes that cut queries and keys.
        heads: axes that cut the heads of the queries.
        key_heads: axes that cut the heads of the keys: the same, or none where these do not divide.
        shape: of the weights, `(batch, ..., heads, queries, keys)`.
        group: how many heads of queries share one of keys.
        is_causal: whether a query sees only the keys up to its own place.
        precision: of the products.
    """

    mesh: AnyMesh | None
    rows: tuple[Axes, ...]
    tokens: Axes
    heads: Axes
    key_heads: Axes
    shape: tuple[int, ...]
    group: int
    is_causal: bool
    precision: lax.PrecisionLike

    @classmethod
    def of(cls, query: Array, key: Array, layout: Layout, **options: Any) -> "_Plan":
        mesh = active_mesh()
        *rows, tokens = (layout.cut(name, mesh) for name in ("batch", *spatial_names(query.ndim - 3)))
        heads = layout.channel_cut(query.shape[-2], mesh)
        key_heads = heads if layout.channel_cut(key.shape[-2], mesh) else ()
        shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
        group = query.shape[-2] // key.shape[-2]
        return cls(mesh, tuple(rows), tokens, heads, key_heads, shape, group, **options)

    @property
    def of_queries(self) -> list[Axes]:
        """The axes that cut each dimension of queries and outputs."""
        return [*self.rows, self.tokens, self.heads, ()]

    @property
    def of_keys(self) -> list[Axes]:
        """The axes that cut each dimension of keys and values."""
        return [*self.rows, self.tokens, self.key_heads, ()]

    @property
    def of_weights(self) -> list[Axes]:
        """The axes that cut each dimension of the weights."""
        return [*self.rows, self.heads, self.tokens, ()]

    def for_my_queries(self, x: Array) -> Array:
        """The keys or values of all tokens, for the heads of this device's queries."""
        if self.tokens:
            x = lax.all_gather(x, self.tokens, axis=x.ndim - 3, tiled=True)
            x = lax.slice_in_dim(x, 0, self.shape[-1], axis=x.ndim - 3)
        if self.group == 1:
            return x
        if self.heads == self.key_heads:
            return jnp.repeat(x, self.group, axis=-2)
        mine = self.shape[-3] // lax.axis_size(self.heads)
        first = lax.axis_index(self.heads) * mine
        return jnp.take(x, (first + jnp.arange(mine)) // self.group, axis=-2)

    def visible(self, queries: int, mask: Array | None) -> Array | None:
        """True for the keys that this device's queries see, None where they see all."""
        if not self.is_causal:
            return mask
        first = lax.axis_index(self.tokens) * queries if self.tokens else 0
        causal = first + jnp.arange(queries)[:, None] >= jnp.arange(self.shape[-1])
        return causal if mask is None else mask & causal

    def local(self, query: Array, key: Array, value: Array, *scores: Array | None) -> tuple[Array, Array]:
        """Outputs and weights of blocks without padding among the keys."""
        bias, mask, kept = scores
        query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
        products = jnp.einsum("...qhd,...khd->...hqk", query, key, precision=self.precision)
        products = products if bias is None else products + bias.astype(products.dtype)
        if (visible := self.visible(query.shape[-3], mask)) is not None:
            products = jnp.where(visible, products, jnp.finfo(products.dtype).min)
        weights = jax.nn.softmax(products)
        some = weights if kept is None else weights * kept.astype(weights.dtype)
        return jnp.einsum("...hqk,...khd->...qhd", some, value, precision=self.precision), weights


@functools.partial(jax.jit, static_argnames=("is_causal", "layout", "precision"))
def _attention(
    query: Array,
    key: Array,
    value: Array,
    *scores: Array | None,
    is_causal: bool,
    layout: Layout,
    precision: lax.PrecisionLike,
) -> tuple[Array, Array]:
    plan = _Plan.of(query, key, layout, is_causal=is_causal, precision=precision)
    mesh, extents = plan.mesh, [x.shape for x in (query, key, value)]
    cuts = [plan.of_queries, plan.of_keys, plan.of_keys]
    cuts_of_scores = [[] if x is None else mask_cuts(x, plan.of_weights) for x in scores]
    extents_out = (*query.shape[:-1], value.shape[-1])

    def local(*blocks: Any) -> tuple[Array, Array]:
        query, key, value = map(island.mask_padding, blocks[:3], extents, cuts, [mesh] * 3)
        key, value = plan.for_my_queries(key), plan.for_my_queries(value)
        y, weights = plan.local(query, key, value, *blocks[3:])
        y = island.mask_padding(y, extents_out, plan.of_queries, mesh)
        return y, island.mask_padding(weights, plan.shape, plan.of_weights, mesh)

    if mesh is None:
        return local(query, key, value, *scores)
    padded = [
        None if x is None else island.pad_to_blocks(x, axes, mesh)
        for x, axes in zip((query, key, value, *scores), cuts + cuts_of_scores, strict=True)
    ]
    in_specs = tuple(map(spec, cuts + cuts_of_scores))
    out_specs = (spec(plan.of_queries), spec(plan.of_weights))
    y, weights = island.run(local, mesh, in_specs, out_specs, *padded)
    return island.crop_to(y, extents_out), island.crop_to(weights, plan.shape)
