"""Networks of convolutions, pooling and linear layers, one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.nn.conv import Conv
from shardtrain.nn.linear import Linear
from shardtrain.nn.pool import AdaptiveAvgPool, AvgPool, Dropout, Flatten, MaxPool
from shardtrain.nn.rounds import Rounds


class LeNet(nnx.Module):
    """LeNet-5 with ReLU: two convolutions with average pooling, three linear layers.

    Args:
        classes: outputs.
        image: height, width and channels of the input.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Example:
        >>> st.models.LeNet(classes=10, image=(28, 28, 1), rngs=nnx.Rngs(0))(jnp.ones((2, 28, 28, 1))).shape
        (2, 10)

    References:
        LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998.
    """

    def __init__(
        self,
        classes: int = 10,
        image: Sequence[int] = (28, 28, 1),
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if not isinstance(image, Sequence) or len(image) != 3:
            raise UserError(f"LeNet: image={image}; give (height, width, channels), such as (28, 28, 1)")
        height, width, channels = image
        if min(height, width) < 4:
            raise UserError(f"LeNet halves its images twice; {height}x{width} is too small, 4x4 is the least")
        self.conv1 = Conv(channels, 8, (5, 5), **kinds)
        self.conv2 = Conv(8, 16, (5, 5), **kinds)
        self.pool1, self.pool2 = (AvgPool((2, 2), strides=(2, 2)) for _ in range(2))
        self.flatten = Flatten()
        self.linear1 = Linear(16 * (height // 4) * (width // 4), 120, **kinds)
        self.linear2 = Linear(120, 84, **kinds)
        self.head = Linear(84, classes, **kinds)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        x = self.pool1(nnx.relu(self.conv1(x)))
        x = self.pool2(nnx.relu(self.conv2(x)))
        x = self.flatten(x)
        return self.head(nnx.relu(self.linear2(nnx.relu(self.linear1(x)))))


class AlexNet(nnx.Module):
    """AlexNet in one tower: five convolutions, three linear layers with dropout.

    The layers of "One weird trick", which torchvision has too: 61.1 million parameters for 1000 classes.

    Args:
        classes: outputs.
        channels: of the input, of 63 pixels or more in height and width.
        width: features of the first convolution; the others have 3, 6, 4 and 4 times as many.
        hidden: features of the first two linear layers.
        rounds: makes the layer between convolutions and linear layers that are cut by other axes, see
            `shardtrain.nn.Rounds`: `partial(Rounds, "spread")`, for example. One round by default.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for initial values and dropout.

    Example:
        >>> st.models.AlexNet(classes=10, hidden=64, rngs=nnx.Rngs(0))(jnp.ones((2, 64, 64, 3))).shape
        (2, 10)

    References:
        Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks,
        NIPS 2012; Krizhevsky, One Weird Trick for Parallelizing Convolutional Neural Networks, 2014.
    """

    def __init__(
        self,
        classes: int = 1000,
        channels: int = 3,
        *,
        width: int = 64,
        hidden: int = 4096,
        rounds: Callable[[], Rounds] = Rounds,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        features = [width * n for n in (1, 3, 6, 4, 4)]
        self.convs = nnx.List(
            [
                Conv(channels, features[0], (11, 11), 4, padding=2, **kinds),
                Conv(features[0], features[1], (5, 5), **kinds),
                *(Conv(features[i], features[i + 1], (3, 3), **kinds) for i in (1, 2, 3)),
            ]
        )
        self.pools = nnx.List([MaxPool((3, 3), (2, 2)) for _ in range(3)])
        self.shrink = AdaptiveAvgPool((6, 6))
        self.flatten = Flatten()
        self.rounds = rounds()
        self.hidden = nnx.List([Linear(features[-1] * 36, hidden, **kinds), Linear(hidden, hidden, **kinds)])
        self.dropouts = nnx.List([Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.head = Linear(hidden, classes, **kinds)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        if min(x.shape[1:3]) < 63:
            raise UserError(f"AlexNet: images of {x.shape[1]}x{x.shape[2]} are too small, 63x63 is the least")
        pools = {0: self.pools[0], 1: self.pools[1], 4: self.pools[2]}
        for i, conv in enumerate(self.convs):
            x = nnx.relu(conv(x))
            x = pools[i](x) if i in pools else x
        return self.rounds(AlexNet.classify, self, self.flatten(self.shrink(x)))

    def classify(self, x: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
        """The linear layers."""
        for dropout, linear in zip(self.dropouts, self.hidden, strict=True):
            x = nnx.relu(linear(dropout(x)))
        return self.head(x)


_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nnx.Module):
    """A VGG network: stages of 3x3 convolutions, each followed by pooling; 138.4 million parameters at 16.

    Args:
        depth: 11, 13, 16 or 19 layers.
        classes: outputs.
        channels: of the input, of 32 pixels or more in height and width.
        width: features of the first stage, doubled up to eight times that.
        hidden: features of the first two linear layers.
        dtype: of the computation.
        param_dtype: of the parameters.
        rngs: for initial values and dropout.

    Raises:
        UserError: an unknown depth.

    Example:
        >>> model = st.models.VGG(11, classes=10, width=8, hidden=64, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 32, 32, 3))).shape
        (2, 10)

    References:
        Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.
    """

    def __init__(
        self,
        depth: int = 16,
        classes: int = 1000,
        channels: int = 3,
        *,
        width: int = 64,
        hidden: int = 4096,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if depth not in _VGG:
            raise UserError(f"VGG: there is no depth {depth}; there are {', '.join(map(str, _VGG))}")
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        stages, features = [], channels
        for stage, count in enumerate(_VGG[depth]):
            convs = []
            for _ in range(count):
                convs.append(Conv(features, width * min(8, 2**stage), (3, 3), kernel_init=init, **kinds))
                features = width * min(8, 2**stage)
            stages.append(nnx.List(convs))
        self.stages = nnx.List(stages)
        self.pools = nnx.List([MaxPool((2, 2), (2, 2)) for _ in stages])
        self.shrink = AdaptiveAvgPool((7, 7))
        self.flatten = Flatten()
        self.hidden = nnx.List([Linear(features * 7 * 7, hidden, **kinds), Linear(hidden, hidden, **kinds)])
        self.dropouts = nnx.List([Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.head = Linear(hidden, classes, **kinds)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        if min(x.shape[1:3]) < 32:
            raise UserError(f"VGG: images of {x.shape[1]}x{x.shape[2]} are too small, 32x32 is the least")
        for convs, pool in zip(self.stages, self.pools, strict=True):
            for conv in convs:
                x = nnx.relu(conv(x))
            x = pool(x)
        x = self.flatten(self.shrink(x))
        for dropout, linear in zip(self.dropouts, self.hidden, strict=True):
            x = dropout(nnx.relu(linear(x)))
        return self.head(x)
