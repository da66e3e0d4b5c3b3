"""U-Net in one, two and three dimensions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.nn.conv import Conv, ConvTranspose
from shardtrain.nn.norm import BatchNorm, GroupNorm, InstanceNorm
from shardtrain.nn.pool import Concat, Crop, MaxPool
from shardtrain.ops.arguments import listed

_NORMS: dict[str, Callable[..., nnx.Module]] = {
    "batch": BatchNorm,
    "group": lambda features, **kinds: GroupNorm(features, num_groups=None, group_size=8, **kinds),
    "instance": InstanceNorm,
}


class _Double(nnx.Module):
    """Two convolutions of 3 pixels, each normalized."""

    def __init__(self, features_in: int, features: int, rank: int, norm: str, kinds: dict[str, Any]) -> None:
        bare = kinds | {"use_bias": False}
        self.conv1 = Conv(features_in, features, (3,) * rank, **bare)
        self.norm1 = _NORMS[norm](features, **kinds)
        self.conv2 = Conv(features, features, (3,) * rank, **bare)
        self.norm2 = _NORMS[norm](features, **kinds)

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x))))))


class UNet(nnx.Module):
    """A U-Net that labels every pixel of signals, images or volumes of any extents.

    Each level halves the image by max pooling (rounding up), and doubles it again by a transposed
    convolution, whose output is cropped to the image with which it is concatenated.

    Args:
        classes: outputs of every pixel.
        channels: of the input.
        rank: spatial dimensions, 1 to 3.
        features: of each level, from the full image down.
        norm: `"instance"`, `"batch"` or `"group"` (of 8 channels).
        remat: whether to recompute each pair of convolutions in the backward pass.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        UserError: an unknown rank or norm, or fewer than two levels.

    Example:
        >>> model = st.models.UNet(classes=3, rank=3, features=(8, 16), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((1, 6, 7, 8, 1))).shape
        (1, 6, 7, 8, 3)

    References:
        Ronneberger, Fischer and Brox, U-Net, MICCAI 2015; Cicek et al., 3D U-Net, MICCAI 2016.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        *,
        rank: int = 2,
        features: int | Sequence[int] = (32, 64, 128, 256),
        norm: str = "instance",
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not 1 <= rank <= 3:
            raise UserError(f"UNet: rank={rank}; images have 1, 2 or 3 spatial dimensions")
        if norm not in _NORMS:
            raise UserError(f"UNet: norm={norm!r}; there are {', '.join(map(repr, _NORMS))}")
        if not isinstance(features, Sequence) or len(features) < 2:
            raise UserError(f"UNet: features={features}; give two levels or more, such as (32, 64)")
        features = listed(features, "features")
        if norm == "group" and any(f % 8 for f in features):
            raise UserError(f"UNet: norm='group' has groups of 8 channels; {tuple(features)} do not divide")
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        above = [channels, *features]
        self.down = nnx.List([_Double(above[i], f, rank, norm, kinds) for i, f in enumerate(features)])
        self.pools = nnx.List([MaxPool((2,) * rank, (2,) * rank, "SAME") for _ in features[1:]])
        pairs = list(zip(features[:0:-1], features[-2::-1], strict=True))
        two = (2,) * rank
        self.rise = nnx.List([ConvTranspose(a, b, two, two, padding="VALID", **kinds) for a, b in pairs])
        self.fit = nnx.List([Crop() for _ in pairs])
        self.join = nnx.List([Concat() for _ in pairs])
        self.up = nnx.List([_Double(2 * b, b, rank, norm, kinds) for _, b in pairs])
        self.head = Conv(features[0], classes, (1,) * rank, **kinds)
        self.remat = remat

    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *spatial classes"]:
        skips = []
        for block, pool in zip(self.down, (*self.pools, None), strict=True):
            x = self._apply(block, x)
            if pool is not None:
                skips.append(x)
                x = pool(x)
        for rise, fit, join, block in zip(self.rise, self.fit, self.join, self.up, strict=True):
            skip = skips.pop()
            x = fit(rise(x), skip.shape[1:-1])
            x = self._apply(block, join(skip, x))
        return self.head(x)

    def _apply(self, block: _Double, x: Array) -> Array:
        return nnx.remat(type(block).__call__)(block, x) if self.remat else block(x)
