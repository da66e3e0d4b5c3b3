"""The base class of layers that contract channels with a kernel, and their initial values.

Convolutions and linear maps subclass their `nnx` namesakes, so arguments, parameter names, initial values and
checkpoints are those of `nnx`; only the call goes through `shardtrain.ops`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from shardtrain import ops
from shardtrain.layout import AnyMesh, active_mesh, axes_of
from shardtrain.mesh import size
from shardtrain.nn.base import Partitioned
from shardtrain.ops.channels import ChannelMode


def lecun_normal(
    key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32, out_sharding: Any = None
) -> Array:
    """`nnx`'s default initial values of kernels, bit for bit, in a tenth of the time to compile.

    All dimensions but the last are drawn as one: XLA takes seconds to compile a draw of 4 or 5 dimensions.
    """
    flat = math.prod(shape[:-1]), shape[-1]
    return nnx.initializers.lecun_normal()(key, flat, dtype, out_sharding).reshape(shape)


class Contraction(Partitioned):
    """Base class of layers with a kernel from channels to channels and an optional bias.

    Attributes:
        in_features: channels of the input.
        out_features: channels of the output.
        feature_group_count: groups of channels that do not see each other.
        use_bias: whether there is a bias.
        kernel: the last two dimensions are input and output channels, unless a subclass says otherwise.
        pixel_dims: how many leading dimensions of kernel and bias are pixels of the output.
    """

    in_features: int
    out_features: int
    feature_group_count: int = 1
    use_bias: bool
    kernel: nnx.Param[Array]
    pixel_dims = 0

    def pixels(self) -> tuple[int, int]:
        """The ratio of input pixels to output pixels, by which `channel_plan` counts bytes."""
        return 1, 1

    def channel_plan(self, mesh: AnyMesh | None) -> ops.ChannelPlan:
        """How this layer communicates over the axes that cut its channels.

        It depends on the layer alone and leaves padding out of account, so that the kernel can be placed on
        devices before there is a batch.
        """
        return ops.channel_plan(self.layout, mesh, self.channels(), self.pixels(), self.feature_group_count)

    def channel_mode(self) -> ChannelMode:
        """The mode of the plan on the active mesh."""
        return self.channel_plan(active_mesh()).mode

    def kernel_shape_of_one(self) -> tuple[int, ...]:
        """The kernel's shape without the dimensions in front by which `nnx.vmap` stacks layers."""
        return self.kernel.shape[-self.pixel_dims - 2 :]

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        shape = self.kernel_shape_of_one()
        kernel_dim = self.channel_plan(mesh).kernel_dim
        specs = {"kernel": self.layout.parameter(shape, kernel_dim, mesh, self.pixel_dims)}
        if self.use_bias:
            shape = (*shape[: self.pixel_dims], self.out_features)
            specs["bias"] = self.layout.parameter(shape, -1, mesh, self.pixel_dims)
        return specs

    def undivided(self, mesh: AnyMesh) -> Iterator[str]:
        axes = self.layout.cut("channels", mesh)
        if axes and not any(
            set(axes) & set(axes_of(entry)) for entry in self.parameter_specs(mesh)["kernel"]
        ):
            yield (
                f"channels do not divide by {'*'.join(axes)}={size(mesh, axes)} in {{layers}}: there every "
                f"device computes all of them"
            )

    def channels(self) -> tuple[int, int]:
        return (self.in_features, self.out_features)
