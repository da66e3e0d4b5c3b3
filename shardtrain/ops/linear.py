"""Linear maps of channels, their kernel cut by columns or by rows."""

from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.layout import Layout
from shardtrain.ops.channels import ChannelMode
from shardtrain.ops.conv import conv


def linear(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "channels_in channels_out"],
    bias: Float[Array, " channels_out"] | None = None,
    *,
    layout: Layout | None = None,
    channel_mode: ChannelMode | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial channels_out"]:
    """`x @ kernel + bias` over the last dimension, cut as a convolution with a window of one pixel.

    `channel_mode="gather"` cuts the kernel by columns (outputs), `"scatter"` by rows (inputs); by default
    whichever moves fewer bytes.

    Raises:
        UserError: shapes that do not agree.

    Example:
        >>> linear(jnp.ones((8, 16)), jnp.ones((16, 10))).shape
        (8, 10)
    """
    if x.ndim < 2 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise UserError(
            f"linear: an input of shape {x.shape} and a kernel of {kernel.shape} do not agree; they are "
            f"(batch, *spatial, channels_in) and (channels_in, channels_out)"
        )
    if bias is not None and bias.shape != kernel.shape[-1:]:
        raise UserError(f"linear: a bias of shape {bias.shape} for {kernel.shape[-1]} output channels")
    kernel = kernel.reshape((1,) * (x.ndim - 2) + kernel.shape)
    return conv(
        x,
        kernel,
        bias,
        padding="VALID",
        layout=layout,
        channel_mode=channel_mode,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
