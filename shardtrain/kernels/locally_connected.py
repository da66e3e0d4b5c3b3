"""Locally connected layers on one device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float


def locally_connected(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*spatial_out taps channels_out"],
    *,
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """A convolution without padding whose filters differ between output pixels, as one batched product.

    Strided slices copy the windows of the input side by side, with pixels before the batch, so that the
    output and both gradients are batched matrix products without gathers or scatters. The backward pass
    copies the windows again, since saving them would take `prod(window)` times the size of the input.

    Args:
        x: input.
        kernel: filters of every output pixel, channels slowest, as in `lax.conv_general_dilated_local`.
        window: rows of the filters in each spatial dimension.
        strides: of the window.
        dilation: of the filters.
        precision: of the products.
        preferred_element_type: of the sums and the output.

    Example:
        >>> from shardtrain.kernels.locally_connected import locally_connected
        >>> x, kernel = jnp.ones((2, 7, 4)), jnp.ones((5, 4 * 3, 6))
        >>> locally_connected(x, kernel, window=(3,), strides=(1,), dilation=(1,)).shape
        (2, 5, 6)
    """
    rank = len(window)
    pixels = tuple(range(rank))
    extents = kernel.shape[:rank]

    @jax.checkpoint
    def product(x: Array, kernel: Array) -> Array:
        columns = []
        for tap in np.ndindex(*window):
            start = [i * d for i, d in zip(tap, dilation, strict=True)]
            stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, extents, strides, strict=True)]
            part = lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))
            columns.append(jnp.moveaxis(part, 0, rank))
        patches = jnp.stack(columns, axis=-1).reshape(*extents, x.shape[0], kernel.shape[-2])
        contract = (((rank + 1,), (rank,)), (pixels, pixels))
        y = lax.dot_general(
            patches, kernel, contract, precision=precision, preferred_element_type=preferred_element_type
        )
        return jnp.moveaxis(y, rank, 0)

    return product(x, kernel)
