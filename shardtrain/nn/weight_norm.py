"""Weight normalization of layers whose kernels may be cut."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Num

from shardtrain.nn.base import name


class WeightNorm(nnx.WeightNorm):
    """`nnx.WeightNorm` with scales that are trained, and a kernel that keeps its own length.

    The layer computes with `scale * kernel / norm(kernel)`, one scale and one norm for each output feature.
    Where axes of the mesh cut what a norm sums over, XLA adds the sums of the devices. In nnx the scales are
    no parameters, and each call overwrites the kernel by the normalized one.

    Args:
        layer_instance: the layer, of `shardtrain.nn` or plain.
        kwargs: keyword arguments of `nnx.WeightNorm`.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> layer = st.nn.WeightNorm(st.nn.Linear(4, 3, rngs=rngs), rngs=rngs)
        >>> layer(jnp.ones((2, 4))).shape, layer.scales["kernel"].shape
        ((2, 3), (3,))

    References:
        Salimans and Kingma, Weight Normalization, NeurIPS 2016, equation 2.
    """

    def __init__(self, layer_instance: nnx.Module, **kwargs: Any) -> None:
        super().__init__(layer_instance, **kwargs)
        made: Any = self.scales or {}
        self.scales: Any = nnx.data(
            nnx.Dict({name(path): nnx.Param(scale.astype(self.param_dtype)) for path, scale in made.items()})
        )

    def _normalized(self, path: tuple, kernel: Array) -> Array:
        features = {axis % kernel.ndim for axis in _axes(self.feature_axes)}
        summed = tuple(axis for axis in range(kernel.ndim) if axis not in features)
        kernel, scale = self.promote_dtype(
            (kernel, self.scales[name(path)][...] if self.use_scale else None), dtype=self.dtype
        )
        length = jnp.sqrt((kernel * kernel).sum(summed, keepdims=True) + self.epsilon)
        if scale is not None:
            scale = scale.reshape([n if axis in features else 1 for axis, n in enumerate(kernel.shape)])
        return kernel / length if scale is None else kernel * (scale / length)

    def __call__(self, x: Num[Array, "..."], *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with its kernel normalized."""
        own = {
            path: variable
            for path, variable in nnx.iter_graph(self.layer_instance)
            if isinstance(variable, nnx.Param) and self.variable_filter(path, variable)
        }
        kept = {path: variable.get_value() for path, variable in own.items()}
        try:
            for path, variable in own.items():
                variable.set_value(self._normalized(path, kept[path]))
            return self.layer_instance(x, *args, **kwargs)
        finally:
            for path, variable in own.items():
                variable.set_value(kept[path])


def _axes(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
