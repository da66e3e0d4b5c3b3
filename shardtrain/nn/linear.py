"""Partitioned linear maps and embedding tables for Flax NNX."""

import math
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
from shardtrain.nn.base import Partitioned, in_layout, refuse, refuse_sharding
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
        refuse(self, "dot_general", (lax.dot_general,), "the layer brings its own")

    @in_layout
    def __call__(
        self, inputs: Num[Array, "*batch channels_in"], out_sharding: Any = None
    ) -> Num[Array, "*batch channels_out"]:
        """Maps the last dimension of inputs `(batch, *spatial, channels)`, or of one vector."""
        refuse_sharding(self, out_sharding=out_sharding)
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


class LinearGeneral(Contraction, nnx.LinearGeneral):
    """`nnx.LinearGeneral`: a linear map of several dimensions, which is cut as `Linear` is.

    Input and output features are each taken for one dimension, whose blocks are rows of its first one. Where
    that does not divide by the axes that cut channels, the kernel is stored whole.

    Args:
        args: positional arguments of `nnx.LinearGeneral`.
        kwargs: keyword arguments of `nnx.LinearGeneral`.

    Raises:
        UserError: at construction, for a `batch_axis`, or a `dot_general` of your own; when called, for
            another shape, or an `out_sharding`.

    Example:
        >>> heads = st.nn.LinearGeneral(16, (4, 8), rngs=nnx.Rngs(0))
        >>> heads(jnp.ones((2, 5, 16))).shape
        (2, 5, 4, 8)
    """

    in_features: tuple[int, ...]  # type: ignore[assignment]
    out_features: tuple[int, ...]  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self, "batch_axis", ({},), "each device's kernel is the same for all rows; use nn.Einsum")
        for name in ("dot_general", "dot_general_cls"):
            refuse(self, name, (None, lax.dot_general), "the layer brings its own")

    def kernel_shape_of_one(self) -> tuple[int, ...]:
        return (*self.in_features, *self.out_features)

    def channels(self) -> tuple[int, int]:
        return math.prod(self.in_features), math.prod(self.out_features)

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        by_outputs = self.channel_plan(mesh).kernel_dim == -1
        first = len(self.in_features) if by_outputs else 0
        specs = {"kernel": self.layout.parameter(self.kernel_shape_of_one(), first, mesh)}
        if self.use_bias:
            specs["bias"] = self.layout.parameter(self.out_features, 0, mesh)
        return specs

    def undivided(self, mesh: AnyMesh) -> Iterator[str]:
        plan = self.channel_plan(mesh)
        if not (axes := plan.cut_in or plan.cut_out):
            yield from super().undivided(mesh)
            return
        first = (self.out_features if plan.kernel_dim == -1 else self.in_features)[0]
        if first % size(mesh, axes):
            yield (
                f"the first dimension of the features of '{{layers}}', {first}, does not divide by "
                f"{'*'.join(axes)}={size(mesh, axes)}: each device keeps the whole kernel"
            )

    @in_layout
    def __call__(
        self, inputs: Num[Array, "*batch_and_features_in"], out_sharding: Any = None
    ) -> Num[Array, "*batch_and_features_out"]:
        """Maps the dimensions `axis` of the input to those of the output features, which come last."""
        refuse_sharding(self, out_sharding=out_sharding)
        contracted = sorted(axis % inputs.ndim for axis in self.axis)
        if tuple(inputs.shape[d] for d in contracted) != self.in_features:
            raise UserError(
                f"nn.LinearGeneral maps features {self.in_features} in the dimensions {self.axis}, which an "
                f"input of shape {inputs.shape} does not have there"
            )
        rest = [d for d in range(inputs.ndim) if d not in contracted]
        batch = tuple(inputs.shape[d] for d in rest)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        channels_in, channels_out = self.channels()
        y = ops.linear(
            x.transpose(*rest, *contracted).reshape(*(batch or (1,)), channels_in),
            kernel.reshape(channels_in, channels_out),
            None if bias is None else bias.reshape(channels_out),
            layout=self.layout,
            channel_mode=self.channel_mode(),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y.reshape(*batch, *self.out_features)


class Einsum(Partitioned, nnx.Einsum):
    """`nnx.Einsum` with a kernel that every device keeps whole.

    XLA divides the product over the axes that cut the input. Axes that cut channels divide neither kernel
    nor product, which the log says; `LinearGeneral` is cut by them.

    Args:
        args: positional arguments of `nnx.Einsum`.
        kwargs: keyword arguments of `nnx.Einsum`.

    Raises:
        UserError: when called, for an `out_sharding`.

    Example:
        >>> layer = st.nn.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 11, 2))).shape
        (16, 11, 8, 4)
    """

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        specs = {"kernel": self.layout.parameter(self.kernel_shape, None, mesh)}
        if self.bias_shape is not None:
            specs["bias"] = self.layout.parameter(self.bias_shape, None, mesh)
        return specs

    def undivided(self, mesh: AnyMesh) -> Iterator[str]:
        if axes := self.layout.cut("channels", mesh):
            yield (
                f"the kernel of '{{layers}}', an Einsum, is not cut by {'*'.join(axes)}="
                f"{size(mesh, axes)}: each device keeps it whole; LinearGeneral is cut"
            )

    @in_layout
    def __call__(
        self, inputs: Num[Array, "..."], einsum_str: str | None = None, out_sharding: Any = None
    ) -> Num[Array, "..."]:
        """The product of the input and the kernel that the equation says, plus the bias."""
        refuse_sharding(self, out_sharding=out_sharding)
        return super().__call__(inputs, einsum_str)


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
        self, inputs: Num[Array, "*batch_and_pixels"], out_sharding: Any = None
    ) -> Num[Array, "*batch_and_pixels features"]:
        """Looks up integers `(batch, *spatial)`, or one."""
        refuse_sharding(self, out_sharding=out_sharding)
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
        self, query: Num[Array, "*batch_and_pixels features"], out_sharding: Any = None
    ) -> Num[Array, "*batch_and_pixels rows"]:
        """Products of queries `(batch, *spatial, features)`, or of one, with all rows: logits.

        They are cut as the rows are.
        """
        refuse_sharding(self, out_sharding=out_sharding)
        query, table = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        y = ops.linear(jnp.atleast_2d(query), table.T, layout=self.layout, channel_mode="gather")
        return y[0] if query.ndim == 1 else y
