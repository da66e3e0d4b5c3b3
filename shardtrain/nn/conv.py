"""Partitioned convolutional and locally connected layers for Flax NNX."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Num

from shardtrain import ops
from shardtrain.errors import UserError
from shardtrain.kernels.conv import refused
from shardtrain.layout import AnyMesh, spatial_names
from shardtrain.mesh import size
from shardtrain.nn.base import in_layout, refuse, refuse_sharding
from shardtrain.nn.contraction import Contraction, lecun_normal
from shardtrain.ops.arguments import MODES, Padding, listed, tuple_of
from shardtrain.ops.locally_connected import local_windows
from shardtrain.ops.transpose import transposed_pads


class _Convolution(Contraction):
    """Base class of convolution and transposed convolution."""

    kernel_size: tuple[int, ...]
    mask: Array | None
    bias: nnx.Param[Array] | None
    dtype: DTypeLike | None
    promote_dtype: Callable[..., Any]

    def spatial(self) -> tuple[str, ...] | None:
        return spatial_names(len(self.kernel_size))

    def check_mask(self) -> None:
        """Refuses a mask of another shape than the kernel's.

        Raises:
            UserError: for that.
        """
        if self.mask is not None and self.mask.shape != self.kernel.shape:
            raise UserError(
                f"nn.{type(self).__name__}: a mask of shape {self.mask.shape} for a kernel of "
                f"{self.kernel.shape}; give one of the kernel's shape"
            )

    def kernel_shape_of_one(self) -> tuple[int, ...]:
        return self.kernel.shape[-len(self.kernel_size) - 2 :]

    def operands(self, inputs: Array) -> tuple[Array, Array, Array | None, tuple[int, ...]]:
        """Input with one batch dimension, kernel, bias, and the batch dimensions that the input had."""
        leading = inputs.shape[: inputs.ndim - len(self.kernel_size) - 1]
        x = inputs if len(leading) == 1 else inputs.reshape(-1, *inputs.shape[len(leading) :])
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        bias = None if self.bias is None else self.bias[...]
        return *self.promote_dtype((x, kernel, bias), dtype=self.dtype), leading


class Conv(_Convolution, nnx.Conv):
    """`nnx.Conv` on batch, pixels and channels that may be cut, by one of several algorithms.

    Args:
        args: positional arguments of `nnx.Conv`.
        algorithm: as in `shardtrain.ops.conv`.
        implementation: as in `shardtrain.ops.conv`.
        kwargs: keyword arguments of `nnx.Conv`.

    Raises:
        UserError: at construction, for strides, dilations or padding that define no convolution, an algorithm
            that does not support them, a `conv_general_dilated` of your own, or a mask
            of another shape than the kernel's; when called, for an `out_sharding`.

    Example:
        >>> conv = st.nn.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0))
        >>> conv(jnp.ones((2, 8, 8, 3))).shape
        (2, 8, 8, 16)
    """

    def __init__(
        self, *args: Any, algorithm: str = "auto", implementation: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **({"kernel_init": lecun_normal} | kwargs))
        rank = len(self.kernel_size)
        for name in (
            "strides",
            "kernel_dilation",
            "input_dilation",
        ):  # refuses here what the call would refuse
            tuple_of(getattr(self, name), rank, name)
        self.algorithm, self.implementation = algorithm, implementation
        strides = tuple_of(self.strides, rank, "strides")
        if reason := refused(algorithm, self.kernel_size, strides, implementation):
            raise UserError(f"nn.Conv: {reason}")
        _check_padding("nn.Conv", self.padding, rank)
        self.check_mask()
        refuse(self, "conv_general_dilated", (lax.conv_general_dilated,), "the layer brings its own")

    def pixels(self) -> tuple[int, int]:
        strides = tuple_of(self.strides, len(self.kernel_size), "strides")
        return math.prod(s for s, k in zip(strides, self.kernel_size, strict=True) if k > 1), 1

    @in_layout
    def __call__(
        self, inputs: Num[Array, "*batch_and_pixels channels_in"], out_sharding: Any = None
    ) -> Num[Array, "*batch_and_pixels_out channels_out"]:
        """Convolves inputs `(*batch, *spatial, channels)` with any number of batch dimensions, as in Flax."""
        refuse_sharding(self, out_sharding=out_sharding)
        x, kernel, bias, leading = self.operands(inputs)
        y = ops.conv(
            x,
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            input_dilation=self.input_dilation,
            groups=self.feature_group_count,
            algorithm=self.algorithm,
            implementation=self.implementation,
            layout=self.layout,
            channel_mode=self.channel_mode(),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y.reshape(*leading, *y.shape[1:])


class ConvTranspose(_Convolution, nnx.ConvTranspose):
    """`nnx.ConvTranspose` on batch, pixels and channels that may be cut; see `shardtrain.ops.conv_transpose`.

    `shardtrain.ops.torch_padding` gives the `padding` for PyTorch's arguments.

    Args:
        args: positional arguments of `nnx.ConvTranspose`.
        kwargs: keyword arguments of `nnx.ConvTranspose`.

    Raises:
        UserError: at construction, for strides, dilation or padding that define no convolution, or a mask of
            another shape than the kernel's; when called, for an `out_sharding`.

    Example:
        >>> up = st.nn.ConvTranspose(8, 4, (2, 2), (2, 2), padding="VALID", rngs=nnx.Rngs(0))
        >>> up(jnp.ones((2, 7, 8, 8))).shape
        (2, 14, 16, 4)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"kernel_init": lecun_normal} | kwargs))
        rank = len(self.kernel_size)
        strides = tuple_of(self.strides, rank, "strides")
        tuple_of(self.kernel_dilation, rank, "kernel_dilation")
        transposed_pads(self.padding, self.kernel_size, strides)
        self.check_mask()

    def pixels(self) -> tuple[int, int]:
        return 1, math.prod(tuple_of(self.strides, len(self.kernel_size), "strides"))

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        specs = super().parameter_specs(mesh)
        if self.transpose_kernel:  # stored as (*window, outputs, inputs)
            *window, outputs, inputs = self.kernel_shape_of_one()
            kernel_dim = self.channel_plan(mesh).kernel_dim
            transposed = self.layout.parameter((*window, inputs, outputs), kernel_dim, mesh)
            specs["kernel"] = P(*transposed[:-2], transposed[-1], transposed[-2])
        return specs

    @in_layout
    def __call__(
        self, inputs: Num[Array, "*batch_and_pixels channels_in"], out_sharding: Any = None
    ) -> Num[Array, "*batch_and_pixels_out channels_out"]:
        """Maps inputs `(*batch, *spatial, channels)` with any number of batch dimensions, as in Flax."""
        refuse_sharding(self, out_sharding=out_sharding)
        x, kernel, bias, leading = self.operands(inputs)
        y = ops.conv_transpose(
            x,
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            layout=self.layout,
            channel_mode=self.channel_mode(),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y.reshape(*leading, *y.shape[1:])


class LocallyConnected(Contraction, nnx.Module):
    """A convolution with different filters at every output pixel; see `shardtrain.ops.local`.

    Its arguments and parameters are those of `flax.linen.ConvLocal`, and `image`, since there are as many
    filters as output pixels. Filters and biases are cut as the pixels are: each device stores, uses and
    updates those of its own pixels. Unlike Linen's, the default initial values have the variance of a
    convolution's, whatever the number of pixels.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        image: extents of the input, one for each spatial dimension; one number for one dimension.
        kernel_size: rows of the window.
        strides: as in `nnx.Conv`.
        padding: as in `nnx.Conv`.
        kernel_dilation: as in `nnx.Conv`.
        use_bias: whether to add a bias to every output value.
        dtype: of the computation.
        param_dtype: of the parameters.
        precision: of the products.
        kernel_init: initial values of the filters.
        bias_init: initial values of the biases.
        rngs: random keys for the initial values.

    Raises:
        UserError: at construction, for a window that does not fit the image; when called, for inputs of
            another size.

    Example:
        >>> layer = st.nn.LocallyConnected(1, 16, (8, 8), (3, 3), rngs=nnx.Rngs(0))
        >>> layer.kernel.shape, layer(jnp.ones((2, 8, 8, 1))).shape
        ((8, 8, 9, 16), (2, 8, 8, 16))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        image: int | Sequence[int],
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ) -> None:
        self.image = listed(image, "image")
        rank = self.pixel_dims = len(self.image)
        self.kernel_size = tuple_of(kernel_size, rank, "kernel_size")
        self.strides = tuple_of(strides, rank, "strides")
        self.padding = padding if isinstance(padding, str | int) else tuple(padding)
        self.kernel_dilation = tuple_of(kernel_dilation, rank, "kernel_dilation")
        windows = local_windows(self.image, self.kernel_size, self.strides, padding, self.kernel_dilation)
        self.image_out = tuple(w.extent_out for w in windows)
        if in_features < 1 or out_features < 1:
            raise UserError(f"nn.LocallyConnected: {in_features} -> {out_features} channels; give 1 or more")
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self.dtype, self.precision = dtype, precision
        kernel_init = kernel_init or nnx.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", batch_axis=tuple(range(rank))
        )
        shape = (*self.image_out, in_features * math.prod(self.kernel_size), out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        biases = (*self.image_out, out_features)
        self.bias = nnx.Param(bias_init(rngs.params(), biases, param_dtype)) if use_bias else None

    def pixels(self) -> tuple[int, int]:
        return math.prod(s for s, k in zip(self.strides, self.kernel_size, strict=True) if k > 1), 1

    def spatial(self) -> tuple[str, ...] | None:
        return spatial_names(len(self.image))

    def undivided(self, mesh: AnyMesh) -> Iterator[str]:
        yield from super().undivided(mesh)
        for rows, dimension in zip(self.image_out, spatial_names(len(self.image)), strict=True):
            axes = self.layout.cut(dimension, mesh)
            if axes and rows % size(mesh, axes):
                yield (
                    f"the filters of '{{layers}}' are those of {rows} rows of {dimension}, which do not "
                    f"divide by {'*'.join(axes)}={size(mesh, axes)}: each device keeps all of these rows"
                )

    @in_layout
    def __call__(
        self, inputs: Num[Array, "batch *spatial channels_in"]
    ) -> Num[Array, "batch *spatial_out channels_out"]:
        """Maps inputs `(batch, *image, channels)`."""
        if inputs.ndim != len(self.image) + 2 or inputs.shape[1:] != (*self.image, self.in_features):
            raise UserError(
                f"nn.LocallyConnected was made for inputs (batch, "
                f"{', '.join(map(str, (*self.image, self.in_features)))}), not {inputs.shape}"
            )
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return ops.local(
            x,
            kernel,
            bias,
            window=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            layout=self.layout,
            channel_mode=self.channel_mode(),
            precision=self.precision,
        )


def _check_padding(what: str, padding: Padding, rank: int) -> None:
    """Refuses at construction the names of paddings that the call would refuse."""
    names = ("SAME", "VALID", *MODES, *(("CAUSAL",) if rank == 1 else ()))
    if isinstance(padding, str) and padding.upper() not in names:
        raise UserError(f"{what}: padding={padding!r}; use {', '.join(map(repr, names))} or numbers")
