"""Partitioned linear maps and embedding tables for Flax NNX."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Num

from shardtrain import ops
from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh
from shardtrain.mesh import size
from shardtrain.nn.base import Partitioned, in_layout
from shardtrain.nn.contraction import Contraction


class Linear(Contraction, nnx.Linear):
    """`nnx.Linear` with a kernel that may be cut by columns or by rows; see `shardtrain.ops.linear`.

    Args:
        args: positional arguments of `nnx.Linear`.
        kwargs: keyword arguments of `nnx.Linear`.

    Raises:
        UserError: at construction, for a `dot_general` of your own; when called, for an `out_sharding`.

    Example:
        >>> st.nn.Linear(16, 10, rngs=nnx.Rngs(0))(jnp.ones((8, 16))).shape
        (8, 10)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refuse("dot_general", (lax.dot_general,), "the layer brings its own")

    @in_layout
    def __call__(
        self, inputs: Num[Array, "*batch channels_in"], out_sharding: None = None
    ) -> Num[Array, "*batch channels_out"]:
        """Maps the last dimension of inputs `(batch, *spatial, channels)`, or of one vector."""
        self.refuse_sharding(out_sharding=out_sharding)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        y = ops.linear(
            x[None] if x.ndim == 1 else x,
            kernel,
            bias,
            layout=self.layout,
            channel_mode=self.channel_mode(),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y[0] if x.ndim == 1 else y


class Embed(Partitioned, nnx.Embed):
    """`nnx.Embed` with a table whose rows may be cut over the channel axis; see `shardtrain.ops.embed`.

    Args:
        args: positional arguments of `nnx.Embed`.
        kwargs: keyword arguments of `nnx.Embed`.

    Raises:
        UserError: when called, for inputs that are not integers, or an `out_sharding`.

    Example:
        >>> st.nn.Embed(100, 16, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
        (1, 3, 16)
    """

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        return {"embedding": self.layout.parameter((self.num_embeddings, self.features), 0, mesh)}

    def undivided(self, mesh: AnyMesh) -> Iterator[str]:
        axes, rows = self.layout.cut("channels", mesh), self.num_embeddings
        if axes and rows % size(mesh, axes):
            yield (
                f"the {rows} rows of '{{layers}}' do not divide by {'*'.join(axes)}={size(mesh, axes)}: each "
                f"device keeps all of them"
            )

    def channels(self) -> tuple[int, ...]:
        return (self.num_embeddings,)

    @in_layout
    def __call__(
        self, inputs: Num[Array, "*batch_and_pixels"], out_sharding: None = None
    ) -> Num[Array, "*batch_and_pixels features"]:
        """Looks up integers `(batch, *spatial)`, or one."""
        self.refuse_sharding(out_sharding=out_sharding)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise UserError(f"nn.Embed looks up integers, not {inputs.dtype}")
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        if self.num_embeddings == 1:  # whose only row nnx gives for every index
            inputs = jnp.zeros_like(inputs)
        return ops.embed(jnp.atleast_1d(inputs), table, layout=self.layout).reshape(
            *inputs.shape, self.features
        )

    @in_layout
    def attend(
        self, query: Num[Array, "*batch_and_pixels features"], out_sharding: None = None
    ) -> Num[Array, "*batch_and_pixels rows"]:
        """Products of queries `(batch, *spatial, features)`, or of one, with all rows: logits.

        They are cut as the rows are.
        """
        self.refuse_sharding(out_sharding=out_sharding)
        query, table = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        y = ops.linear(jnp.atleast_2d(query), table.T, layout=self.layout, channel_mode="gather")
        return y[0] if query.ndim == 1 else y
