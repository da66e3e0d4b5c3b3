"""Flax NNX layers over partitioned operators: the arguments, parameter names and initial values of `nnx`.

Each subclasses its `nnx` namesake, so weights, checkpoints and code move over unchanged; only the call goes
through `shardtrain.ops`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from shardtrain import ops
from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Layout, active_mesh, spatial_names, spec
from shardtrain.nn.context import current_examples
from shardtrain.ops.conv import ChannelMode
from shardtrain.ops.pool import Padding
from shardtrain.ops.window import tuple_of


class Partitioned:
    """What the layers of this room have in common.

    Attributes:
        layout: which mesh axes cut what in this layer; set by `partition.assign` from a layout table.
    """

    layout: Layout = Layout()

    def kept(self, mesh: AnyMesh | None) -> dict[str, P]:
        """How each parameter lies on `mesh` at rest, by attribute name."""
        return {}

    def features(self) -> tuple[int, ...]:
        """Numbers of channels that the channel axis cuts in this layer, where they divide."""
        return ()

    def spatial(self) -> tuple[str, ...] | None:
        """Names of the spatial dimensions, None for a layer that takes any number of them."""
        return None


class _Contraction(Partitioned):
    """Convolution and linear: a kernel from channels to channels."""

    in_features: int
    out_features: int
    feature_group_count: int = 1
    use_bias: bool
    kernel: nnx.Param[Array]

    def pixels(self) -> tuple[int, int]:
        """Input pixels for every output pixel, as the choice of what to move counts them."""
        return 1, 1

    def channel_plan(self, mesh: AnyMesh | None) -> ops.ChannelPlan:
        """What moves on the channel axis in this layer.

        Decided from the layer alone, padding aside, so that the kernel can be placed before a batch is
        seen.
        """
        channels = self.in_features, self.out_features
        return ops.channel_plan(self.layout, mesh, channels, self.pixels(), self.feature_group_count)

    def channel_mode(self) -> ChannelMode:
        return self.channel_plan(active_mesh()).mode

    def kept(self, mesh: AnyMesh | None) -> dict[str, P]:
        shape = self.kernel.shape
        cut = -1 if self.channel_plan(mesh).mode == "gather" else -2
        kept = {"kernel": self.layout.parameter(shape, cut, mesh)}
        return kept | ({"bias": self.layout.parameter(shape[-1:], 0, mesh)} if self.use_bias else {})

    def features(self) -> tuple[int, ...]:
        return (self.in_features, self.out_features)


class Conv(_Contraction, nnx.Conv):
    """`nnx.Conv`, cut on batch, space and channels; see `shardtrain.ops.conv`.

    Raises:
        UserError: at construction, for arguments of `nnx.Conv` that are not partitioned: `input_dilation`,
            `conv_general_dilated`, `CIRCULAR` and `REFLECT` padding.

    Example:
        >>> conv = Conv(3, 16, (3, 3), rngs=nnx.Rngs(0))
        >>> conv(jnp.ones((2, 8, 8, 3))).shape
        (2, 8, 8, 16)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tuple_of(self.strides, len(self.kernel_size), "strides")  # refuses here what the call would
        tuple_of(self.kernel_dilation, len(self.kernel_size), "kernel_dilation")
        if max(tuple_of(self.input_dilation, len(self.kernel_size), "input_dilation")) > 1:
            raise UserError("nn.Conv: input_dilation is not partitioned; use nnx.ConvTranspose on one device")
        if isinstance(self.padding, str) and self.padding.upper() not in ("SAME", "VALID", "CAUSAL"):
            raise UserError(
                f"nn.Conv: padding={self.padding!r} is not partitioned; use 'SAME', 'VALID' or numbers"
            )
        if self.conv_general_dilated is not lax.conv_general_dilated:
            raise UserError("nn.Conv: it brings its own conv_general_dilated; use nnx.Conv for another one")

    def pixels(self) -> tuple[int, int]:
        strides = tuple_of(self.strides, len(self.kernel_size), "strides")
        return math.prod(s for s, k in zip(strides, self.kernel_size, strict=True) if k > 1), 1

    def spatial(self) -> tuple[str, ...] | None:
        return spatial_names(len(self.kernel_size))

    def __call__(self, inputs: Array) -> Array:
        """Convolves `(*batch, *spatial, channels)`; several batch dimensions, or none, as in Flax."""
        rank = len(self.kernel_size)
        leading = inputs.shape[: inputs.ndim - rank - 1]
        x = inputs if len(leading) == 1 else inputs.reshape(-1, *inputs.shape[len(leading) :])
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        y = ops.conv(
            x,
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
            layout=self.layout,
            channel_mode=self.channel_mode(),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y if len(leading) == 1 else y.reshape(*leading, *y.shape[1:])


class Linear(_Contraction, nnx.Linear):
    """`nnx.Linear`, its kernel cut by columns or by rows; see `shardtrain.ops.linear`.

    Example:
        >>> Linear(16, 10, rngs=nnx.Rngs(0))(jnp.ones((8, 16))).shape
        (8, 10)
    """

    def __call__(self, inputs: Array) -> Array:
        """Maps the last dimension of `(batch, *spatial, channels)`, or of one vector."""
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


class _Affine(Partitioned):
    """The normalizations: a scale and a bias for every channel."""

    num_features: int
    scale: nnx.Param[Array] | None
    bias: nnx.Param[Array] | None

    def kept(self, mesh: AnyMesh | None) -> dict[str, P]:
        names = [name for name in ("scale", "bias") if getattr(self, name) is not None]
        return {name: self.layout.parameter((self.num_features,), 0, mesh) for name in names}

    def features(self) -> tuple[int, ...]:
        return (self.num_features,)

    def affine(self) -> tuple[Array | None, Array | None]:
        scale, bias = self.scale, self.bias
        return None if scale is None else scale[...], None if bias is None else bias[...]


class BatchNorm(_Affine, nnx.BatchNorm):
    """`nnx.BatchNorm` with the statistics of the whole batch on every mesh, real examples only.

    Under gradient accumulation the statistics are those of a microbatch, as everywhere in the field.

    Raises:
        UserError: at construction, for an `axis` that is not the last, or an `axis_name`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.axis != -1:
            raise UserError(f"nn.BatchNorm: axis={self.axis}; arrays are channels last here, so axis=-1")
        if self.axis_name is not None:
            raise UserError("nn.BatchNorm: leave axis_name out; statistics are over the whole batch already")

    def kept(self, mesh: AnyMesh | None) -> dict[str, P]:
        running = spec([self.layout.channel_cut(self.num_features, mesh)])  # state, so never spread
        return super().kept(mesh) | {"mean": running, "var": running}

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalizes `(batch, *spatial, channels)`.

        Args:
            x: the input.
            use_running_average: as in Flax; overrides the constructor's.
            mask: `(batch,)`, which examples count; the trainer's by default.
        """
        running = self.use_running_average if use_running_average is None else use_running_average
        if running is None:
            raise UserError(
                "nn.BatchNorm: say use_running_average=True or False, or call model.train() or .eval()"
            )
        scale, bias = self.affine()
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        if running:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            inverse = lax.rsqrt(self.var[...].astype(wide) + self.epsilon)
            y = (x.astype(wide) - self.mean[...]) * (inverse if scale is None else inverse * scale)
            return (y if bias is None else y + bias).astype(x.dtype)
        real = current_examples(x.shape[0]).real if mask is None else mask
        y, mean, var = ops.batch_norm(x, scale, bias, epsilon=self.epsilon, examples=real, layout=self.layout)
        for statistic, new in ((self.mean, mean), (self.var, var)):
            old = statistic[...]
            moved = (self.momentum * old + (1 - self.momentum) * new).astype(old.dtype)
            # A microbatch of a ragged batch may hold no example at all, and then says nothing.
            statistic[...] = moved if real is None else jnp.where(real.any(), moved, old)
        return y


class GroupNorm(_Affine, nnx.GroupNorm):
    """`nnx.GroupNorm`: each example by itself, so cut batches need nothing, cut pixels one small sum."""

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.num_features = num_features
        if self.reduction_axes is not None or self.axis_name is not None:
            raise UserError("nn.GroupNorm: reduction_axes and axis_name have no place here; leave them out")

    def __call__(self, x: Array) -> Array:
        scale, bias = self.affine()
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return ops.group_norm(x, self.num_groups, scale, bias, epsilon=self.epsilon)


class LayerNorm(_Affine, nnx.LayerNorm):
    """`nnx.LayerNorm` over the channels."""

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.num_features = num_features
        if (self.reduction_axes, self.feature_axes, self.axis_name) != (-1, -1, None):
            raise UserError("nn.LayerNorm: it normalizes the last axis; leave the *_axes and axis_name out")

    def __call__(self, x: Array) -> Array:
        scale, bias = self.affine()
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return ops.layer_norm(x, scale, bias, epsilon=self.epsilon)


class Dropout(Partitioned, nnx.Dropout):
    """`nnx.Dropout` whose mask is drawn example by example.

    The mask depends on the key and on each example's place in the batch: not on the mesh, and not on how a
    batch is split into microbatches.
    """

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | Array | None = None
    ) -> Array:
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
        key = source if isinstance(source, jax.Array) else source()
        shape = [1 if d in self.broadcast_dims else n for d, n in enumerate(inputs.shape)]
        index = current_examples(inputs.shape[0]).index[: shape[0]]
        draw = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.rate, shape[1:]))
        mesh = active_mesh()
        mask = draw(index)
        if mesh is not None and inputs.ndim > 1 and not self.broadcast_dims:
            # One bit pattern on every mesh; each device draws only its part of it.
            mask = lax.with_sharding_constraint(mask, self.layout.activation(inputs.shape, mesh))
        return jnp.where(mask, inputs / (1 - self.rate), 0).astype(inputs.dtype)


class MaxPool(Partitioned, nnx.Module):
    """`nnx.max_pool` as a layer; see `shardtrain.ops.max_pool`.

    Example:
        >>> MaxPool((2, 2), strides=(2, 2))(jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 4, 3)
    """

    def __init__(
        self, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
    ) -> None:
        self.window_shape = tuple(window_shape)
        self.strides = tuple_of(strides, len(self.window_shape), "strides")
        self.padding = padding if isinstance(padding, str | int) else tuple(padding)

    def __call__(self, x: Array) -> Array:
        return ops.max_pool(
            x, self.window_shape, strides=self.strides, padding=self.padding, layout=self.layout
        )


class AvgPool(Partitioned, nnx.Module):
    """`nnx.avg_pool` as a layer; see `shardtrain.ops.avg_pool`."""

    def __init__(
        self,
        window_shape: Sequence[int],
        strides: Sequence[int] | None = None,
        padding: Padding = "VALID",
        count_include_pad: bool = True,
    ) -> None:
        self.window_shape = tuple(window_shape)
        self.strides = tuple_of(strides, len(self.window_shape), "strides")
        self.padding = padding if isinstance(padding, str | int) else tuple(padding)
        self.count_include_pad = count_include_pad

    def __call__(self, x: Array) -> Array:
        return ops.avg_pool(
            x,
            self.window_shape,
            strides=self.strides,
            padding=self.padding,
            count_include_pad=self.count_include_pad,
            layout=self.layout,
        )
