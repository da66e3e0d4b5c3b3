"""Transposed convolution, with the padding conventions of Flax and of PyTorch."""

from collections.abc import Sequence

from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.kernels import conv as kernels
from shardtrain.layout import Layout, chosen
from shardtrain.ops.arguments import Padding, check_repeats, mode_of, pads_of, pairs_of, tuple_of
from shardtrain.ops.channels import ChannelMode
from shardtrain.ops.conv import ConvSettings, check, convolve


def conv_transpose(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window _ _"],
    bias: Float[Array, " channels_out"] | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    transpose_kernel: bool = False,
    layout: Layout | None = None,
    channel_mode: ChannelMode | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Transposed convolution in 1, 2 or 3 dimensions: a convolution of the input with zeros inserted.

    `strides - 1` zeros are inserted between two rows. On a mesh it runs as `conv` does; devices exchange
    halo rows of the small input, not of the large output.

    Args:
        x: input; the leading dimension is the batch.
        kernel: filters in Flax's layout, `(*window, channels_in / groups, channels_out)`.
        bias: added to every output pixel.
        strides: rows of output for one row of input.
        padding: `"SAME"`, `"VALID"` or `"CIRCULAR"` as in `flax.nnx.ConvTranspose`, `"CAUSAL"` (1-D), or
            rows to add around the dilated input; `torch_padding` gives those for PyTorch's convention.
        dilation: of the kernel.
        groups: feature groups, see `conv`.
        transpose_kernel: whether the kernel is that of the convolution which this one transposes: mirrored,
            and of shape `(*window, channels_out / groups, channels_in)`. PyTorch's weights are such kernels.
        layout: which mesh axes cut what; by name by default.
        channel_mode: see `conv`.
        precision: see `conv`.
        preferred_element_type: see `conv`.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: as `conv`.

    Example:
        >>> x, kernel = jnp.ones((2, 7, 8, 4)), jnp.ones((2, 2, 4, 6))
        >>> st.ops.conv_transpose(x, kernel, strides=2, padding="VALID").shape
        (2, 14, 16, 6)
        >>> weight = jnp.ones((4, 6, 3, 3))  # torch.nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1)
        >>> kernel = weight.transpose(2, 3, 1, 0)
        >>> pads = st.ops.torch_padding((3, 3), 1, output_padding=1)
        >>> st.ops.conv_transpose(x, kernel, strides=2, padding=pads, transpose_kernel=True).shape
        (2, 14, 16, 6)

    References:
        Dumoulin and Visin, A Guide to Convolution Arithmetic for Deep Learning, 2016, section 4.
    """
    rank = kernel.ndim - 2
    if transpose_kernel and rank >= 0:
        if groups < 1 or kernel.shape[-1] % groups:
            raise UserError(
                f"conv_transpose: {kernel.shape[-1]} input channels do not divide into groups={groups}"
            )
        kernel = kernels.transposed(kernel, groups)
    check("conv_transpose", x, kernel, bias, groups)
    strides = tuple_of(strides, rank, "strides")
    dilation = tuple_of(dilation, rank, "dilation")
    sizes = kernels.window_sizes(kernel.shape[:-2], dilation)
    pads = transposed_pads(padding, sizes, strides, transpose_kernel)
    mode = mode_of(padding)
    check_repeats(mode, [n * s for n, s in zip(x.shape[1:-1], strides, strict=True)], pads)
    settings = ConvSettings(
        (1,) * rank,
        dilation,
        strides,
        tuple(pads),
        mode,
        groups,
        chosen(layout),
        channel_mode,
        precision,
        preferred_element_type,
    )
    return convolve(x, kernel, bias, settings=settings)


def torch_padding(
    window: Sequence[int],
    padding: int | Sequence[int] = 0,
    *,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> list[tuple[int, int]]:
    """The `padding` of `conv_transpose` for the arguments of PyTorch's transposed convolutions.

    PyTorch's `padding` crops the output of the full transposed convolution at both ends, and its
    `output_padding` adds rows at the end. For an input of `n` rows the output has
    `(n - 1) * stride - 2 * padding + dilation * (window - 1) + output_padding + 1` rows.

    Args:
        window: rows of the window, one per spatial dimension.
        padding: PyTorch's `padding`, one number or one per spatial dimension.
        output_padding: PyTorch's `output_padding`, likewise.
        dilation: of the kernel, likewise.

    Returns:
        `(before, after)` for each spatial dimension.

    Raises:
        UserError: another number of values than the window has dimensions, or a window of a single number.

    Example:
        >>> st.ops.torch_padding((4, 4), 1, output_padding=1)
        [(2, 3), (2, 3)]
    """
    if not isinstance(window, Sequence):
        raise UserError(f"torch_padding: window={window!r}; give one number per spatial dimension")
    rank = len(window)
    spans = kernels.window_sizes(window, tuple_of(dilation, rank, "dilation"))
    crops, extra = (pairs_of(value, rank) for value in (padding, output_padding))
    return [(k - 1 - p, k - 1 - p + q) for k, (p, _), (_, q) in zip(spans, crops, extra, strict=True)]


def transposed_pads(
    padding: Padding, sizes: Sequence[int], strides: Sequence[int], transpose_kernel: bool = False
) -> list[tuple[int, int]]:
    """Rows of padding around the dilated input of a transposed convolution, as Flax reads `padding`."""
    name = padding.upper() if isinstance(padding, str) else None
    if name == "REFLECT":
        raise UserError("conv_transpose: padding='REFLECT' is not defined; use 'SAME', 'VALID' or 'CIRCULAR'")
    if name in ("SAME", "VALID"):
        return [_transposed_pad(name, k, s) for k, s in zip(sizes, strides, strict=True)]
    if name == "CIRCULAR":
        found = []
        for k, s in zip(sizes, strides, strict=True):
            spare = max(0, k - s)  # even windows lean to the left, or to the right if transposed
            low = k - 1 - (-(-spare // 2) if transpose_kernel else spare // 2)
            found.append((low, s - 2 + k - low))
        return found
    return pads_of(padding, sizes, sizes, strides)


def _transposed_pad(name: str, k: int, s: int) -> tuple[int, int]:
    """As `jax.lax.conv_transpose` pads for `"SAME"` (output `s` times the input) and `"VALID"`."""
    if name == "VALID":
        return k - 1, s - 1 + max(k - s, 0)
    low = k - 1 if s > k - 1 else -(-(k + s - 2) // 2)
    return low, k + s - 2 - low
