"""Residual networks."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.nn.conv import Conv
from shardtrain.nn.linear import Linear
from shardtrain.nn.norm import BatchNorm, GroupNorm
from shardtrain.nn.pool import GlobalAvgPool, MaxPool


class _Block(nnx.Module):
    """Two 3x3 convolutions around a skip connection."""

    expansion = 1

    def __init__(
        self, features_in: int, width: int, stride: int, norm: Callable, kinds: dict[str, Any]
    ) -> None:
        bare = kinds | {"use_bias": False}
        self.conv1 = Conv(features_in, width, (3, 3), stride, **bare)
        self.norm1 = norm(width)
        self.conv2 = Conv(width, width, (3, 3), **bare)
        self.norm2 = norm(width, scale_init=nnx.initializers.zeros_init())  # the block starts as the identity
        self.shortcut = _shortcut(features_in, width, stride, norm, bare)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class _Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions around a skip connection; the stride is in the 3x3 (ResNet v1.5)."""

    expansion = 4

    def __init__(
        self, features_in: int, width: int, stride: int, norm: Callable, kinds: dict[str, Any]
    ) -> None:
        bare = kinds | {"use_bias": False}
        out = width * self.expansion
        self.conv1 = Conv(features_in, width, (1, 1), **bare)
        self.norm1 = norm(width)
        self.conv2 = Conv(width, width, (3, 3), stride, **bare)
        self.norm2 = norm(width)
        self.conv3 = Conv(width, out, (1, 1), **bare)
        self.norm3 = norm(out, scale_init=nnx.initializers.zeros_init())
        self.shortcut = _shortcut(features_in, out, stride, norm, bare)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def _shortcut(
    features_in: int, out: int, stride: int, norm: Callable, bare: dict[str, Any]
) -> nnx.Module | None:
    if features_in == out and stride == 1:
        return None
    return nnx.Sequential(Conv(features_in, out, (1, 1), stride, **bare), norm(out))


_DEPTHS: dict[int, tuple[Any, tuple[int, ...]]] = {
    8: (_Block, (1, 1, 1)),
    18: (_Block, (2, 2, 2, 2)),
    34: (_Block, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nnx.Module):
    """A residual network: 18, 34 or 50 layers, or 8 for small images.

    `stem="large"` is the 7x7 convolution and max pooling for images of 64 pixels and more; `"small"` is a 3x3
    convolution of stride 1, for images of 8 to 32 pixels. The default is `"small"` for a depth of 8.

    Args:
        depth: 18, 34, 50, or 8: three stages of one block, `width` 16, for small images.
        classes: outputs.
        channels: of the input.
        stem: `"large"` or `"small"`.
        width: features of the first stage, doubled in each later one.
        norm: `"batch"` or `"group"` (of 8 channels).
        remat: whether to recompute each block in the backward pass and save its input only.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        UserError: an unknown depth or norm.

    Example:
        >>> st.models.ResNet(depth=8, classes=10, channels=1, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 1))).shape
        (2, 10)

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    def __init__(
        self,
        depth: int = 18,
        classes: int = 1000,
        channels: int = 3,
        *,
        stem: Literal["large", "small"] | None = None,
        width: int | None = None,
        norm: str = "batch",
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if depth not in _DEPTHS:
            raise UserError(f"ResNet: there is no depth {depth}; there are {', '.join(map(str, _DEPTHS))}")
        block, stages = _DEPTHS[depth]
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kinds_conv = kinds | {"kernel_init": nnx.initializers.variance_scaling(2.0, "fan_out", "normal")}
        width = width or (16 if depth == 8 else 64)

        def make_norm(features: int, **extra: Any) -> nnx.Module:
            if norm == "batch":
                return BatchNorm(features, momentum=0.9, **kinds, **extra)
            return GroupNorm(features, num_groups=None, group_size=8, **kinds, **extra)

        if norm not in ("batch", "group"):
            raise UserError(f"ResNet: norm={norm!r}; there are 'batch' and 'group'")
        small = stem == "small" or (stem is None and depth == 8)
        bare = kinds_conv | {"use_bias": False}
        if small:
            self.stem = Conv(channels, width, (3, 3), **bare)
        else:
            self.stem = Conv(channels, width, (7, 7), 2, padding=3, **bare)
        self.norm = make_norm(width)
        self.pool = None if small else MaxPool((3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        blocks, features = [], width
        for stage, count in enumerate(stages):
            for position in range(count):
                stride = 2 if stage and not position else 1
                blocks.append(block(features, width << stage, stride, make_norm, kinds_conv))
                features = (width << stage) * block.expansion
        self.blocks = nnx.List(blocks)
        self.mean = GlobalAvgPool()
        self.head = Linear(features, classes, **kinds)
        self.remat = remat

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        x = nnx.relu(self.norm(self.stem(x)))
        x = x if self.pool is None else self.pool(x)
        for block in self.blocks:
            x = nnx.remat(type(block).__call__)(block, x) if self.remat else block(x)
        return self.head(self.mean(x))
