"""Partitioned normalization layers for Flax NNX, with its arguments and parameter names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from shardtrain import ops
from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, spec
from shardtrain.nn.base import Partitioned, in_layout
from shardtrain.nn.examples import current_examples


class _Affine(Partitioned):
    """Base class of normalizations with a scale and a bias for every channel."""

    num_features: int
    scale: nnx.Param[Array] | None
    bias: nnx.Param[Array] | None

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        names = [name for name in ("scale", "bias") if getattr(self, name) is not None]
        return {name: self.layout.parameter((self.num_features,), 0, mesh) for name in names}

    def channels(self) -> tuple[int, ...]:
        return (self.num_features,)

    def affine(self) -> tuple[Array | None, Array | None]:
        """Scale and bias, each None if the layer has none."""
        scale, bias = self.scale, self.bias
        return None if scale is None else scale[...], None if bias is None else bias[...]


class BatchNorm(_Affine, nnx.BatchNorm):
    """`nnx.BatchNorm` with the statistics of the whole batch on every mesh.

    Rows that only pad a ragged batch are left out of the statistics. Under gradient accumulation and in
    pipelines every microbatch is normalized by its own statistics, as is usual. The running statistics are
    updated with each microbatch or, with the trainer's `statistics="batch"`, once with those of the whole
    batch.

    Args:
        args: positional arguments of `nnx.BatchNorm`.
        kwargs: keyword arguments of `nnx.BatchNorm`.

    Raises:
        UserError: at construction, for an `axis` that is not the last, or an `axis_name`.

    Example:
        >>> norm, x = st.nn.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((8, 4, 4, 3))
        >>> with jax.set_mesh(st.make_mesh("data=4,height=2")):
        ...     norm(x, use_running_average=False).shape
        (8, 4, 4, 3)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.axis != -1:
            raise UserError(f"nn.BatchNorm: axis={self.axis}; arrays are channels last here, so axis=-1")
        if self.axis_name is not None:
            raise UserError("nn.BatchNorm: leave axis_name out; statistics are over the whole batch already")

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        running = spec(
            [self.layout.channel_cut(self.num_features, mesh)]
        )  # not parameters, so never cut by `parameters`
        return super().parameter_specs(mesh) | {"mean": running, "var": running}

    @in_layout
    def __call__(
        self,
        x: Float[Array, "batch *spatial channels"],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalizes inputs `(batch, *spatial, channels)`, and updates the running statistics.

        Args:
            x: the input.
            use_running_average: whether to normalize by the running statistics; overrides the constructor's.
            mask: `(batch,)`, True for examples that count; those of the enclosing `examples` by default.
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
        rows = current_examples(x.shape[0])
        real = rows.real if mask is None else mask
        y, mean, var = ops.batch_norm(x, scale, bias, epsilon=self.epsilon, examples=real, layout=self.layout)
        if rows.summing:
            count = x.shape[0] if real is None else real.sum()
            for statistic, new in ((self.mean, mean), (self.var, var + mean**2)):
                weighted = jnp.where(count > 0, new * (count / rows.times), 0)
                statistic[...] = (statistic[...] + weighted).astype(statistic[...].dtype)
            return y
        for statistic, new in ((self.mean, mean), (self.var, var)):
            old = statistic[...]
            moved = (self.momentum * old + (1 - self.momentum) * new).astype(old.dtype)
            # A microbatch of a ragged batch may have no real example, and then changes nothing.
            statistic[...] = moved if real is None else jnp.where(real.any(), moved, old)
        return y


class GroupNorm(_Affine, nnx.GroupNorm):
    """`nnx.GroupNorm` on batch, pixels and channels that may be cut; see `shardtrain.ops.group_norm`.

    Args:
        num_features: channels.
        args: further positional arguments of `nnx.GroupNorm`.
        kwargs: keyword arguments of `nnx.GroupNorm`.

    Raises:
        UserError: at construction, for `reduction_axes` or an `axis_name`.

    Example:
        >>> norm = st.nn.GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0))
        >>> norm(jnp.ones((8, 4, 4, 6))).shape
        (8, 4, 4, 6)
    """

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.num_features = num_features
        if self.reduction_axes is not None or self.axis_name is not None:
            raise UserError("nn.GroupNorm: reduction_axes and axis_name have no place here; leave them out")

    @in_layout
    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *spatial channels"]:
        scale, bias = self.affine()
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return ops.group_norm(x, self.num_groups, scale, bias, epsilon=self.epsilon, layout=self.layout)


class LayerNorm(_Affine, nnx.LayerNorm):
    """`nnx.LayerNorm` over the channels, which may be cut; see `shardtrain.ops.layer_norm`.

    Args:
        num_features: channels.
        args: further positional arguments of `nnx.LayerNorm`.
        kwargs: keyword arguments of `nnx.LayerNorm`.

    Raises:
        UserError: at construction, for other axes than the last, or an `axis_name`.

    Example:
        >>> st.nn.LayerNorm(16, rngs=nnx.Rngs(0))(jnp.ones((8, 16))).shape
        (8, 16)
    """

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.num_features = num_features
        if (self.reduction_axes, self.feature_axes, self.axis_name) != (-1, -1, None):
            raise UserError("nn.LayerNorm: it normalizes the last axis; leave the *_axes and axis_name out")

    @in_layout
    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *spatial channels"]:
        scale, bias = self.affine()
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return ops.layer_norm(x, scale, bias, epsilon=self.epsilon, layout=self.layout)


class InstanceNorm(_Affine, nnx.InstanceNorm):
    """`nnx.InstanceNorm` on batch, pixels and channels that may be cut; see `shardtrain.ops.instance_norm`.

    Args:
        num_features: channels.
        args: further positional arguments of `nnx.InstanceNorm`.
        kwargs: keyword arguments of `nnx.InstanceNorm`.

    Raises:
        UserError: at construction, for `feature_axes` other than the last, or an `axis_name`.

    Example:
        >>> st.nn.InstanceNorm(6, rngs=nnx.Rngs(0))(jnp.ones((8, 4, 4, 6))).shape
        (8, 4, 4, 6)
    """

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        if self.feature_axes != -1 or self.axis_name is not None:
            raise UserError("nn.InstanceNorm: it normalizes the pixels of each channel; leave the axes out")

    @in_layout
    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *spatial channels"]:
        scale, bias = self.affine()
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        return ops.instance_norm(x, scale, bias, epsilon=self.epsilon, layout=self.layout)
