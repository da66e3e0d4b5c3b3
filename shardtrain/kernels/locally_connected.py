"""Locally connected layer on one device: what an island computes on its own block."""

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
    """One matrix product for every output pixel, all of them in one batched product.

    The windows are laid side by side by strided slices, pixels before batch, so that forward and both
    gradients are batched products as they stand: no gather, no scatter. The backward pass lays them out
    again instead of keeping them, which would take `prod(window)` times the input.
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
