"""Partitioned layers without parameters: pooling, resizing, concatenation, flattening, dropout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Num

from shardtrain import ops
from shardtrain.errors import UserError
from shardtrain.layout import active_mesh
from shardtrain.nn.base import Partitioned, in_layout
from shardtrain.nn.draws import key_of_batch
from shardtrain.nn.examples import current_examples
from shardtrain.ops.arguments import Padding, numbers_of, tuple_of
from shardtrain.ops.resample import method_of


class _Pool(Partitioned, nnx.Module):
    """Base class of pooling by a window."""

    def __init__(
        self,
        window_shape: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        padding: Padding = "VALID",
    ) -> None:
        self.window_shape = numbers_of(window_shape, "window_shape")
        self.strides = numbers_of(1 if strides is None else strides, "strides")
        self.padding = padding if isinstance(padding, str | int) else tuple(padding)


class MaxPool(_Pool):
    """`nnx.max_pool` as a layer; see `shardtrain.ops.max_pool`.

    Args:
        window_shape: rows of the window, one number for all spatial dimensions or one for each, which then
            says how many dimensions are spatial.
        strides: rows from one window to the next, likewise; 1 by default.
        padding: `"SAME"`, `"VALID"`, a number, or `(before, after)` pairs.

    Example:
        >>> st.nn.MaxPool((2, 2), strides=(2, 2))(jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 4, 3)
    """

    @in_layout
    def __call__(
        self, x: Num[Array, "*batch_and_pixels channels"]
    ) -> Num[Array, "*batch_and_pixels_out channels"]:
        return ops.max_pool(x, self.window_shape, self.strides, self.padding, layout=self.layout)


class MinPool(_Pool):
    """`nnx.min_pool` as a layer; see `shardtrain.ops.min_pool`.

    Args:
        window_shape: rows of the window, one number for all spatial dimensions or one for each, which then
            says how many dimensions are spatial.
        strides: rows from one window to the next, likewise; 1 by default.
        padding: `"SAME"`, `"VALID"`, a number, or `(before, after)` pairs.

    Example:
        >>> st.nn.MinPool((2, 2), strides=(2, 2))(jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 4, 3)
    """

    @in_layout
    def __call__(
        self, x: Num[Array, "*batch_and_pixels channels"]
    ) -> Num[Array, "*batch_and_pixels_out channels"]:
        return ops.min_pool(x, self.window_shape, self.strides, self.padding, layout=self.layout)


class AvgPool(_Pool):
    """`nnx.avg_pool` as a layer; see `shardtrain.ops.avg_pool`.

    Args:
        window_shape: rows of the window, one number for all spatial dimensions or one for each, which then
            says how many dimensions are spatial.
        strides: rows from one window to the next, likewise; 1 by default.
        padding: `"SAME"`, `"VALID"`, a number, or `(before, after)` pairs.
        count_include_pad: whether padding counts in the mean, as zeros.

    Example:
        >>> st.nn.AvgPool((3, 3), strides=(2, 2), padding="SAME")(jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 4, 3)
    """

    def __init__(
        self,
        window_shape: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        padding: Padding = "VALID",
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(window_shape, strides, padding)
        self.count_include_pad = count_include_pad

    @in_layout
    def __call__(
        self, x: Float[Array, "*batch_and_pixels channels"]
    ) -> Float[Array, "*batch_and_pixels_out channels"]:
        return ops.avg_pool(
            x, self.window_shape, self.strides, self.padding, self.count_include_pad, layout=self.layout
        )


class GlobalAvgPool(Partitioned, nnx.Module):
    """The mean over all pixels as a layer; see `shardtrain.ops.global_avg_pool`.

    Example:
        >>> st.nn.GlobalAvgPool()(jnp.ones((2, 8, 8, 3))).shape
        (2, 3)
    """

    @in_layout
    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch channels"]:
        return ops.global_avg_pool(x, layout=self.layout)


class _Adaptive(Partitioned, nnx.Module):
    """Base class of adaptive pooling."""

    def __init__(self, extents: int | Sequence[int]) -> None:
        self.extents = numbers_of(extents, "extents")


class AdaptiveAvgPool(_Adaptive):
    """Average pooling to a given size; see `shardtrain.ops.adaptive_avg_pool`.

    Args:
        extents: rows of the output, one number for all spatial dimensions or one for each.

    Example:
        >>> st.nn.AdaptiveAvgPool((6, 6))(jnp.ones((2, 13, 8, 3))).shape
        (2, 6, 6, 3)
    """

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"]
    ) -> Float[Array, "batch *spatial_out channels"]:
        return ops.adaptive_avg_pool(x, self.extents, layout=self.layout)


class AdaptiveMaxPool(_Adaptive):
    """Max pooling to a given size; see `shardtrain.ops.adaptive_max_pool`.

    Args:
        extents: rows of the output, one number for all spatial dimensions or one for each; 1 is a global
            maximum.

    Example:
        >>> st.nn.AdaptiveMaxPool(1)(jnp.ones((2, 13, 8, 3))).shape
        (2, 1, 1, 3)
    """

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"]
    ) -> Float[Array, "batch *spatial_out channels"]:
        return ops.adaptive_max_pool(x, self.extents, layout=self.layout)


class Flatten(Partitioned, nnx.Module):
    """All pixels and channels of an example as one vector; see `shardtrain.ops.flatten`.

    Example:
        >>> st.nn.Flatten()(jnp.ones((2, 4, 4, 3))).shape
        (2, 48)
    """

    @in_layout
    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch features"]:
        return ops.flatten(x, layout=self.layout)


class Concat(Partitioned, nnx.Module):
    """Concatenates activations along their channels; see `shardtrain.ops.concat`.

    Example:
        >>> st.nn.Concat()(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4, 5))).shape
        (2, 4, 4, 8)
    """

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial _"], *others: Float[Array, "batch *spatial _"]
    ) -> Float[Array, "batch *spatial channels"]:
        return ops.concat((x, *others), layout=self.layout)


class Crop(Partitioned, nnx.Module):
    """The first `extents` pixels of every spatial dimension; see `shardtrain.ops.pad`.

    Example:
        >>> st.nn.Crop()(jnp.ones((2, 8, 8, 3)), (7, 8)).shape
        (2, 7, 8, 3)
    """

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"], extents: Sequence[int]
    ) -> Float[Array, "batch *spatial_out channels"]:
        wanted = tuple_of(extents, x.ndim - 2, "extents")
        if any(n < m for n, m in zip(x.shape[1:-1], wanted, strict=True)):
            raise UserError(f"nn.Crop: {wanted} pixels of {x.shape[1:-1]}; ask for no more than there are")
        if x.shape[1:-1] == wanted:
            return x
        crops = [(0, m - n) for n, m in zip(x.shape[1:-1], wanted, strict=True)]
        return ops.pad(x, crops, layout=self.layout)


class Upsample(Partitioned, nnx.Module):
    """Resizes every spatial dimension to `factor` times its extent; see `shardtrain.ops.resize`.

    Args:
        factor: one number for all spatial dimensions or one for each.
        method: `"nearest"` or `"linear"`.

    Raises:
        UserError: at construction, for an unknown method or factors below 1.

    Example:
        >>> st.nn.Upsample(2, "linear")(jnp.ones((2, 7, 8, 3))).shape
        (2, 14, 16, 3)
    """

    def __init__(self, factor: int | Sequence[int], method: str = "nearest") -> None:
        self.factor = numbers_of(factor, "factor")
        method_of(method)
        self.method = method

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"]
    ) -> Float[Array, "batch *spatial_out channels"]:
        factors = tuple_of(self.factor, x.ndim - 2, "factor")
        extents = [n * f for n, f in zip(x.shape[1:-1], factors, strict=True)]
        return ops.resize(x, extents, method=self.method, layout=self.layout)


class Dropout(Partitioned, nnx.Dropout):
    """`nnx.Dropout` with the same mask on every mesh.

    The mask of an example depends on the key and on the index of the example in the batch, so it depends
    neither on the mesh nor on how the batch is split into microbatches.

    Args:
        args: positional arguments of `nnx.Dropout`.
        kwargs: keyword arguments of `nnx.Dropout`.

    Raises:
        UserError: when called, without random keys, or without `deterministic` being set.

    Example:
        >>> st.nn.Dropout(0.5, rngs=nnx.Rngs(0))(jnp.ones((8, 16)), deterministic=False).shape
        (8, 16)
    """

    @in_layout
    def __call__(
        self,
        inputs: Float[Array, "*shape"],
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Float[Array, "*shape"]:
        off = self.deterministic if deterministic is None else deterministic
        if off is None:
            raise UserError("nn.Dropout: say deterministic=True or False, or call model.train() or .eval()")
        if off or self.rate == 0.0:
            return inputs
        if self.rate == 1.0:
            return jnp.zeros_like(inputs)
        source = self.rngs if rngs is None else rngs
        if source is None:
            raise UserError("nn.Dropout: give rngs, to the constructor or to the call")
        source = source[self.rng_collection] if isinstance(source, nnx.Rngs) else source
        key = key_of_batch(source if isinstance(source, jax.Array) else source())
        broadcast = {d % inputs.ndim for d in self.broadcast_dims}
        shape = [1 if d in broadcast else n for d, n in enumerate(inputs.shape)]
        index = current_examples(inputs.shape[0]).index[: shape[0]]
        draw = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.rate, shape[1:]))
        mesh = active_mesh()
        mask = draw(index)
        if mesh is not None and inputs.ndim > 1 and not self.broadcast_dims:
            # The bits are the same on every mesh; each device draws only those of its own block.
            mask = lax.with_sharding_constraint(mask, self.layout.activation(inputs.shape, mesh))
        return jnp.where(mask, inputs / (1 - self.rate), 0).astype(inputs.dtype)
