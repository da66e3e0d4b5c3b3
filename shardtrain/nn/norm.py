"""Partitioned normalization layers for Flax NNX, with its arguments and parameter names."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from shardtrain import ops
from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, spec
from shardtrain.nn.base import Partitioned, in_layout, refuse
from shardtrain.nn.examples import current_examples
from shardtrain.ops.norm import checked_mask

_LAST = (-1, (-1,), [-1])


class _Affine(Partitioned):
    """Base class of normalizations with a scale and a bias for every channel."""

    num_features: int
    scale: nnx.Param[Array] | None
    bias: nnx.Param[Array] | None
    dtype: DTypeLike | None
    promote_dtype: Callable[..., Any]
    epsilon: float
    use_fast_variance: bool

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        names = [name for name in ("scale", "bias") if getattr(self, name, None) is not None]
        return {name: self.layout.parameter((self.num_features,), 0, mesh) for name in names}

    def channels(self) -> tuple[int, ...]:
        return (self.num_features,)

    def affine(self) -> tuple[Array | None, Array | None]:
        """Scale and bias, each None if the layer has none."""
        scale, bias = self.scale, self.bias
        return None if scale is None else scale[...], None if bias is None else bias[...]

    def by_example(self, operator: Callable[..., Array], x: Array, mask: Array | None) -> Array:
        """An operator that normalizes each example by itself, with this layer's parameters and arguments."""
        x, scale, bias = self.promote_dtype((x, *self.affine()), dtype=self.dtype)
        return operator(
            x,
            scale=scale,
            bias=bias,
            epsilon=self.epsilon,
            mask=self.mask_of(x, mask),
            use_fast_variance=self.use_fast_variance,
            layout=self.layout,
        )

    def refuse_named_axes(self) -> None:
        """Refuses the arguments by which `nnx` sums over devices."""
        for name in ("axis_name", "axis_index_groups"):
            refuse(self, name, (None,), "statistics are over all devices of the mesh already")

    def mask_of(self, x: Array, mask: Array | None) -> Array | None:
        """A mask for statistics of each example; rows that only pad a ragged batch are no part of it.

        They are normalized by all that they hold, since statistics of nothing at all would be NaN.
        """
        mask = checked_mask(f"nn.{type(self).__name__}", x, mask)
        if mask is None:
            return None
        real = current_examples(x.shape[0]).real
        return mask if real is None else mask | ~real.reshape(-1, *[1] * (x.ndim - 1))


class BatchNorm(_Affine, nnx.BatchNorm):
    """`nnx.BatchNorm` with the statistics of the whole batch on every mesh.

    Rows that only pad a ragged batch are left out of the statistics. Under gradient accumulation and in
    pipelines every microbatch is normalized by its own statistics, as is usual. The running statistics are
    updated with each microbatch or, with the trainer's `statistics="batch"`, once with those of the whole
    batch. They are in float32 and used so, whatever `dtype` and `promote_dtype` are, and unlike in `nnx` they
    do not widen outputs of a narrower type.

    Args:
        args: positional arguments of `nnx.BatchNorm`.
        kwargs: keyword arguments of `nnx.BatchNorm`.

    Raises:
        UserError: at construction, for an `axis` that is not the last, an `axis_name` or its groups; when
            called, for a mask that does not broadcast against the input.

    Example:
        >>> norm, x = st.nn.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((8, 4, 4, 3))
        >>> with jax.set_mesh(st.make_mesh("data=4,height=2")):
        ...     norm(x, use_running_average=False).shape
        (8, 4, 4, 3)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self, "axis", _LAST, "arrays are channels last here")
        self.refuse_named_axes()

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
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalizes inputs `(batch, *spatial, channels)`, and updates the running statistics.

        Args:
            x: the input.
            use_running_average: whether to normalize by the running statistics; overrides the constructor's.
            mask: True for values that count in the statistics; it broadcasts against `x`, so that one of
                each example is `(batch, 1, 1, 1)`. Of them only those of real examples count, see `examples`.
        """
        running = self.use_running_average if use_running_average is None else use_running_average
        if running is None:
            raise UserError(
                "nn.BatchNorm: say use_running_average=True or False, or call model.train() or .eval()"
            )
        mean, var = (statistic[...].astype(x.dtype) for statistic in (self.mean, self.var))
        x, _, _, scale, bias = self.promote_dtype((x, mean, var, *self.affine()), dtype=self.dtype)
        if running:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            inverse = lax.rsqrt(self.var[...].astype(wide) + self.epsilon)
            y = (x.astype(wide) - self.mean[...]) * (inverse if scale is None else inverse * scale)
            return (y if bias is None else y + bias).astype(x.dtype)
        rows = current_examples(x.shape[0])
        real, mask = rows.real, checked_mask("nn.BatchNorm", x, mask)
        if rows.summing:
            self._refuse_summing(mask)
        y, mean, var = ops.batch_norm(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            examples=real,
            mask=mask,
            use_fast_variance=self.use_fast_variance,
            layout=self.layout,
        )
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

    def _refuse_summing(self, mask: Array | None) -> None:
        """Refuses what sums of values and squares over microbatches of examples cannot be made from."""
        for name, given in (
            ("mask", mask is not None),
            ("use_fast_variance=False", not self.use_fast_variance),
        ):
            if given:
                raise UserError(
                    f"nn.BatchNorm: {name}, but with statistics='batch' the trainer sums values and squares, "
                    f"and counts examples; use statistics='microbatch', or leave {name} out"
                )


class GroupNorm(_Affine, nnx.GroupNorm):
    """`nnx.GroupNorm` on batch, pixels and channels that may be cut; see `shardtrain.ops.group_norm`.

    Args:
        num_features: channels.
        args: further positional arguments of `nnx.GroupNorm`.
        kwargs: keyword arguments of `nnx.GroupNorm`.

    Raises:
        UserError: at construction, for `reduction_axes`, an `axis_name` or its groups; when called, for
            a mask that does not broadcast against the input.

    Example:
        >>> norm = st.nn.GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0))
        >>> norm(jnp.ones((8, 4, 4, 6))).shape
        (8, 4, 4, 6)
    """

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.num_features = num_features
        refuse(self, "reduction_axes", (None,), "it normalizes a group's channels over all pixels")
        self.refuse_named_axes()

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"], *, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalizes inputs `(batch, *spatial, channels)`; `mask` says which values the statistics are of."""
        return self.by_example(partial(ops.group_norm, groups=self.num_groups), x, mask)


class LayerNorm(_Affine, nnx.LayerNorm):
    """`nnx.LayerNorm` over the channels, which may be cut; see `shardtrain.ops.layer_norm`.

    Args:
        num_features: channels.
        args: further positional arguments of `nnx.LayerNorm`.
        kwargs: keyword arguments of `nnx.LayerNorm`.

    Raises:
        UserError: at construction, for other axes than the last, an `axis_name` or its groups; when
            called, for a mask that does not broadcast against the input.

    Example:
        >>> st.nn.LayerNorm(16, rngs=nnx.Rngs(0))(jnp.ones((8, 16))).shape
        (8, 16)
    """

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.num_features = num_features
        for name in ("reduction_axes", "feature_axes"):
            refuse(self, name, _LAST, "it normalizes the last axis")
        self.refuse_named_axes()

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"], *, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalizes inputs `(batch, *spatial, channels)`; `mask` says which values the statistics are of."""
        return self.by_example(ops.layer_norm, x, mask)


class InstanceNorm(_Affine, nnx.InstanceNorm):
    """`nnx.InstanceNorm` on batch, pixels and channels that may be cut; see `shardtrain.ops.instance_norm`.

    Args:
        num_features: channels.
        args: further positional arguments of `nnx.InstanceNorm`.
        kwargs: keyword arguments of `nnx.InstanceNorm`.

    Raises:
        UserError: at construction, for `feature_axes` other than the last, an `axis_name` or its groups;
            when called, for a mask that does not broadcast against the input.

    Example:
        >>> st.nn.InstanceNorm(6, rngs=nnx.Rngs(0))(jnp.ones((8, 4, 4, 6))).shape
        (8, 4, 4, 6)
    """

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        refuse(self, "feature_axes", _LAST, "it normalizes the pixels of each channel")
        self.refuse_named_axes()

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"], *, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalizes inputs `(batch, *spatial, channels)`; `mask` says which values the statistics are of."""
        return self.by_example(ops.instance_norm, x, mask)


class RMSNorm(_Affine, nnx.RMSNorm):
    """`nnx.RMSNorm` over the channels, which may be cut; see `shardtrain.ops.rms_norm`.

    Args:
        args: positional arguments of `nnx.RMSNorm`.
        kwargs: keyword arguments of `nnx.RMSNorm`.

    Raises:
        UserError: at construction, for other axes than the last, an `axis_name` or its groups; when called,
            for a mask that does not broadcast against the input.

    Example:
        >>> st.nn.RMSNorm(16, rngs=nnx.Rngs(0))(jnp.ones((8, 16))).shape
        (8, 16)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("reduction_axes", "feature_axes"):
            refuse(self, name, _LAST, "it normalizes the last axis")
        self.refuse_named_axes()

    @in_layout
    def __call__(
        self, x: Float[Array, "batch *spatial channels"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "batch *spatial channels"]:
        """Normalizes inputs `(batch, *spatial, channels)`; `mask` says which values the mean is of."""
        scale = None if self.scale is None else self.scale[...]
        x, scale = self.promote_dtype((x, scale), dtype=self.dtype)
        return ops.rms_norm(x, scale, epsilon=self.epsilon, mask=self.mask_of(x, mask), layout=self.layout)
