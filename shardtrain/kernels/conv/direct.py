"""Direct convolution on one device, channels last."""

from collections.abc import Sequence

from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float


def direct(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    *,
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
    input_dilation: Sequence[int] | None = None,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """`lax.conv_general_dilated`, or a matrix product for windows of one pixel.

    Args:
        x: input.
        kernel: filters.
        strides: of the window.
        dilation: of the filters.
        padding: rows before and after every spatial dimension; negative numbers crop.
        input_dilation: of the input, none by default.
        groups: feature groups.
        precision: of the products.
        preferred_element_type: of the sums and the output.
    """
    rank = x.ndim - 2
    dilated = input_dilation is not None and max(input_dilation, default=1) > 1
    if groups == 1 and not dilated and not any(map(any, padding)) and all(k == 1 for k in kernel.shape[:-2]):
        x = lax.slice(x, (0,) * x.ndim, x.shape, (1, *strides, 1))
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        matrix = kernel.reshape(kernel.shape[-2:])
        return lax.dot_general(
            x, matrix, contract, precision=precision, preferred_element_type=preferred_element_type
        )
    letters = "DHW"[3 - rank :]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=input_dilation,
        rhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
