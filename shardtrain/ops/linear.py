"""Linear maps of channels whose kernel is cut by columns or by rows."""

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
    """`x @ kernel + bias` over the last dimension, on batch, pixels and channels that may be cut.

    This is `conv` with a window of one pixel.

    Args:
        x: input; dimensions between the batch and the channels are pixels.
        kernel: the matrix.
        bias: added to every output.
        layout: which mesh axes cut what; by name by default.
        channel_mode: `"gather"` cuts the kernel by columns (output channels) and gathers the input's
            channels, `"scatter"` cuts it by rows (input channels) and reduce-scatters the partial sums; by
            default whichever sends fewer bytes.
        precision: of the products, as in `lax.dot_general`.
        preferred_element_type: of the sums and the output, as in `lax.dot_general`.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: shapes that do not agree.

    Example:
        >>> st.ops.linear(jnp.ones((8, 16)), jnp.ones((16, 10))).shape
        (8, 10)

    References:
        Shoeybi et al., Megatron-LM, 2019, section 3 (columns and rows).
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
