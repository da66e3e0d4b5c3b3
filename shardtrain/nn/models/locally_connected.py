"""A network of locally connected layers."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.nn.conv import LocallyConnected
from shardtrain.nn.linear import Linear
from shardtrain.nn.pool import Flatten


class LocalNet(nnx.Module):
    """Locally connected layers, the first of stride 2, and one linear layer.

    It is the network of DistBelief in small. Nearly all parameters belong to pixels, so cutting pixels cuts
    the parameters too, and their gradients are not summed over the axes that cut pixels.

    Args:
        classes: outputs.
        image: height, width and channels of the input.
        features: of each locally connected layer.
        kernel_size: of their windows.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Example:
        >>> st.models.LocalNet(classes=10, image=(8, 8, 1), rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 1))).shape
        (2, 10)

    References:
        Dean et al., Large Scale Distributed Deep Networks, NIPS 2012; Taigman et al., DeepFace, CVPR 2014.
    """

    def __init__(
        self,
        classes: int = 10,
        image: Sequence[int] = (28, 28, 1),
        *,
        features: Sequence[int] = (16, 16),
        kernel_size: int = 3,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if not isinstance(image, Sequence) or len(image) != 3:
            raise UserError(f"LocalNet: image={image}; give (height, width, channels), such as (28, 28, 1)")
        *extents, channels = image
        layers = []
        for i, width in enumerate(features):
            layer = LocallyConnected(channels, width, extents, kernel_size, 1 if i else 2, **kinds)
            layers.append(layer)
            extents, channels = list(layer.image_out), width
        self.layers = nnx.List(layers)
        self.flatten = Flatten()
        pixels = 1
        for extent in extents:
            pixels *= extent
        self.head = Linear(pixels * channels, classes, **kinds)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.flatten(x))
