"""Small models of the kinds that Flax users bring, written once for any kit of layers.

`kit` is a namespace of layer classes and pooling functions: that of `nnx`, or that of shardtrain. Nothing else
in a model depends on it, as in a model that was moved over by renaming its layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class ResNet(nnx.Module):
    def __init__(self, kit, rngs):
        self.stem = kit.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = kit.BatchNorm(8, rngs=rngs)
        self.conv1 = kit.Conv(8, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = kit.BatchNorm(16, rngs=rngs)
        self.conv2 = kit.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = kit.BatchNorm(16, scale_init=nnx.initializers.zeros, rngs=rngs)
        self.skip = kit.Conv(8, 16, (1, 1), strides=2, use_bias=False, rngs=rngs)
        self.head = kit.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        y = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(y)) + self.skip(x))
        return self.head(jnp.mean(x, axis=(1, 2)))


class DenseNet(nnx.Module):
    def __init__(self, kit, rngs):
        self.kit = kit
        self.stem = kit.Conv(3, 8, (3, 3), rngs=rngs)
        self.norms = nnx.List([kit.BatchNorm(8 + 4 * i, rngs=rngs) for i in range(3)])
        self.convs = nnx.List([kit.Conv(8 + 4 * i, 4, (3, 3), use_bias=False, rngs=rngs) for i in range(3)])
        self.transition = kit.Conv(20, 12, (1, 1), rngs=rngs)
        self.head = kit.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = jnp.concatenate([x, conv(nnx.relu(norm(x)))], axis=-1)
        x = self.kit.avg_pool(self.transition(x), (2, 2), strides=(2, 2))
        return self.head(x.mean((1, 2)))


class VGG(nnx.Module):
    def __init__(self, kit, rngs):
        self.kit = kit
        self.convs = nnx.List([kit.Conv(i, o, (3, 3), rngs=rngs) for i, o in ((3, 8), (8, 8), (8, 16))])
        self.drop = kit.Dropout(0.0, rngs=rngs)
        self.wide = kit.Linear(2 * 2 * 16, 32, rngs=rngs)
        self.head = kit.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = self.kit.max_pool(nnx.relu(conv(x)), window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.head(self.drop(nnx.relu(self.wide(x))))


class UNet(nnx.Module):
    def __init__(self, kit, rngs, rank=2):
        self.kit, self.rank = kit, rank
        window = (3,) * rank
        self.down1 = kit.Conv(3, 8, window, rngs=rngs)
        self.norm1 = kit.BatchNorm(8, rngs=rngs)
        self.down2 = kit.Conv(8, 16, window, rngs=rngs)
        self.norm2 = kit.GroupNorm(16, num_groups=4, rngs=rngs)
        self.up = kit.ConvTranspose(16, 8, (2,) * rank, strides=(2,) * rank, rngs=rngs)
        self.merge = kit.Conv(16, 8, window, rngs=rngs)
        self.out = kit.Conv(8, 3, (1,) * rank, rngs=rngs)

    def __call__(self, x):
        two = (2,) * self.rank
        early = nnx.relu(self.norm1(self.down1(x)))
        x = self.kit.max_pool(early, two, strides=two)
        x = nnx.relu(self.norm2(self.down2(x)))
        x = jnp.concatenate([self.up(x), early], axis=-1)
        return self.out(nnx.relu(self.merge(x)))


class VAE(nnx.Module):
    """Draws its own noise, and reconstructs."""

    def __init__(self, kit, rngs):
        self.conv1 = kit.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.conv2 = kit.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
        self.mean = kit.Linear(4 * 4 * 8, 6, rngs=rngs)
        self.spread = kit.Linear(4 * 4 * 8, 6, rngs=rngs)
        self.wide = kit.Linear(6, 4 * 4 * 8, rngs=rngs)
        self.up1 = kit.ConvTranspose(8, 8, (3, 3), strides=(2, 2), rngs=rngs)
        self.up2 = kit.ConvTranspose(8, 3, (3, 3), strides=(2, 2), rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        x = x.reshape(x.shape[0], -1)
        mean, spread = self.mean(x), self.spread(x)
        z = mean + jnp.exp(0.5 * spread) * jax.random.normal(self.rngs.noise(), mean.shape, mean.dtype)
        x = nnx.relu(self.wide(z)).reshape(-1, 4, 4, 8)
        return nnx.sigmoid(self.up2(nnx.relu(self.up1(x))))


class ConvNeXt(nnx.Module):
    def __init__(self, kit, rngs):
        self.stem = kit.Conv(3, 8, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.first = kit.LayerNorm(8, epsilon=1e-6, rngs=rngs)
        self.depthwise = kit.Conv(8, 8, (7, 7), feature_group_count=8, rngs=rngs)
        self.norm = kit.LayerNorm(8, epsilon=1e-6, rngs=rngs)
        self.wide = kit.Linear(8, 32, rngs=rngs)
        self.narrow = kit.Linear(32, 8, rngs=rngs)
        self.scale = nnx.Param(jnp.full((8,), 0.5, jnp.float64))
        self.last = kit.LayerNorm(8, rngs=rngs)
        self.head = kit.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = self.first(self.stem(x))
        x = x + self.scale[...] * self.narrow(nnx.gelu(self.wide(self.norm(self.depthwise(x)))))
        return self.head(self.last(x.mean(axis=(1, 2))))


class ConvLSTM(nnx.Module):
    """A cell that is called for each frame of a clip `(batch, time, height, width, channels)`."""

    def __init__(self, kit, rngs):
        self.gates = kit.Conv(3 + 4, 16, (3, 3), rngs=rngs)
        self.head = kit.Linear(4, 10, rngs=rngs)

    def __call__(self, clip):
        hidden = cell = jnp.zeros((clip.shape[0], *clip.shape[2:4], 4), clip.dtype)
        for time in range(clip.shape[1]):
            gates = self.gates(jnp.concatenate([clip[:, time], hidden], -1))
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            cell = nnx.sigmoid(f) * cell + nnx.sigmoid(i) * jnp.tanh(g)
            hidden = nnx.sigmoid(o) * jnp.tanh(cell)
        return self.head(hidden.mean((1, 2)))


class TCN(nnx.Module):
    def __init__(self, kit, rngs):
        causal = {"padding": "CAUSAL", "rngs": rngs}
        self.enter = kit.Conv(3, 8, (1,), rngs=rngs)
        self.convs = nnx.List([kit.Conv(8, 8, (3,), kernel_dilation=2**i, **causal) for i in range(3)])
        self.norms = nnx.List([kit.LayerNorm(8, rngs=rngs) for _ in range(3)])
        self.head = kit.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = self.enter(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + nnx.relu(norm(conv(x)))
        return self.head(x[:, -1])


class Block(nnx.Module):
    """A transformer's, its norms first."""

    def __init__(self, kit, width, rngs):
        self.norm1 = kit.LayerNorm(width, rngs=rngs)
        self.attention = kit.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norm2 = kit.LayerNorm(width, rngs=rngs)
        self.wide = kit.Linear(width, 4 * width, rngs=rngs)
        self.narrow = kit.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))


def sinusoids(length, width):
    angles = np.arange(length)[:, None] / 100 ** (np.arange(width // 2) / (width // 2))
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], 1))


class Whisper(nnx.Module):
    """Its encoder: two convolutions over spectra of a signal, fixed positions, blocks of attention."""

    def __init__(self, kit, rngs):
        self.conv1 = kit.Conv(3, 8, (3,), rngs=rngs)
        self.conv2 = kit.Conv(8, 8, (3,), strides=2, rngs=rngs)
        self.blocks = nnx.List([Block(kit, 8, rngs) for _ in range(2)])
        self.norm = kit.LayerNorm(8, rngs=rngs)
        self.head = kit.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.conv2(nnx.gelu(self.conv1(x))))
        x = x + sinusoids(x.shape[1], 8)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ViT(nnx.Module):
    def __init__(self, kit, rngs):
        self.patches = kit.Conv(3, 8, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        self.token = nnx.Param(normal(rngs.params(), (1, 1, 8), jnp.float64))
        self.positions = nnx.Param(normal(rngs.params(), (1, 17, 8), jnp.float64))
        self.blocks = nnx.List([Block(kit, 8, rngs) for _ in range(2)])
        self.norm = kit.LayerNorm(8, rngs=rngs)
        self.head = kit.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, 8))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class UNETR(nnx.Module):
    """Tokens of a volume, joined with its own pixels again by transposed convolutions."""

    def __init__(self, kit, rngs):
        self.patches = kit.Conv(3, 8, (4, 4, 4), strides=(4, 4, 4), padding="VALID", rngs=rngs)
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 8, 8), jnp.float64))
        self.blocks = nnx.List([Block(kit, 8, rngs) for _ in range(2)])
        self.near = kit.Conv(3, 4, (3, 3, 3), rngs=rngs)
        self.up = kit.ConvTranspose(8, 4, (4, 4, 4), strides=(4, 4, 4), rngs=rngs)
        self.norm = kit.InstanceNorm(8, rngs=rngs)
        self.out = kit.Conv(8, 3, (3, 3, 3), rngs=rngs)

    def __call__(self, x):
        y = self.patches(x)
        pixels = y.shape[1:4]
        y = y.reshape(y.shape[0], -1, 8) + self.positions[...]
        for block in self.blocks:
            y = block(y)
        y = self.up(y.reshape(y.shape[0], *pixels, 8))
        return self.out(nnx.leaky_relu(self.norm(jnp.concatenate([y, self.near(x)], -1))))


class Diffusion(nnx.Module):
    """A step of denoising: an image and its time, embedded; attention at the lowest resolution."""

    def __init__(self, kit, rngs):
        self.kit = kit
        self.time1, self.time2 = kit.Linear(8, 16, rngs=rngs), kit.Linear(16, 16, rngs=rngs)
        self.enter = kit.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = kit.GroupNorm(8, num_groups=2, rngs=rngs)
        self.down = kit.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.scale = kit.Linear(16, 16, rngs=rngs)
        self.middle = kit.GroupNorm(16, num_groups=4, rngs=rngs)
        self.attention = kit.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up = kit.ConvTranspose(16, 8, (4, 4), strides=(2, 2), rngs=rngs)
        self.out = kit.Conv(16, 3, (3, 3), rngs=rngs)

    def __call__(self, inputs):
        x, time = inputs
        angles = time[:, None] * jnp.exp(-jnp.arange(4.0))
        time = self.time2(nnx.swish(self.time1(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))))
        early = self.enter(x)
        x = self.down(nnx.swish(self.norm(early)))
        x = x + self.scale(nnx.swish(time))[:, None, None, :]
        tokens = self.middle(x).reshape(x.shape[0], -1, 16)
        x = x + self.attention(tokens).reshape(x.shape)
        return self.out(jnp.concatenate([self.up(nnx.swish(x)), early], -1))


class Mixer(nnx.Module):
    def __init__(self, kit, rngs):
        self.patches = kit.Conv(3, 8, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.norm1, self.norm2 = kit.LayerNorm(8, rngs=rngs), kit.LayerNorm(8, rngs=rngs)
        self.tokens1, self.tokens2 = kit.Linear(16, 32, rngs=rngs), kit.Linear(32, 16, rngs=rngs)
        self.channels1, self.channels2 = kit.Linear(8, 32, rngs=rngs), kit.Linear(32, 8, rngs=rngs)
        self.head = kit.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        y = self.tokens2(nnx.gelu(self.tokens1(self.norm1(x).swapaxes(1, 2))))
        x = x + y.swapaxes(1, 2)
        x = x + self.channels2(nnx.gelu(self.channels1(self.norm2(x))))
        return self.head(x.mean(1))


class MobileNet(nnx.Module):
    """An inverted bottleneck with squeeze and excitation."""

    def __init__(self, kit, rngs):
        self.wide = kit.Conv(3, 16, (1, 1), use_bias=False, rngs=rngs)
        self.norm1 = kit.BatchNorm(16, rngs=rngs)
        self.depthwise = kit.Conv(16, 16, (5, 5), strides=2, feature_group_count=16, rngs=rngs)
        self.norm2 = kit.BatchNorm(16, rngs=rngs)
        self.squeeze, self.excite = kit.Conv(16, 4, (1, 1), rngs=rngs), kit.Conv(4, 16, (1, 1), rngs=rngs)
        self.narrow = kit.Conv(16, 8, (1, 1), rngs=rngs)
        self.head = kit.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.swish(self.norm1(self.wide(x)))
        x = nnx.swish(self.norm2(self.depthwise(x)))
        gate = self.excite(nnx.swish(self.squeeze(x.mean((1, 2), keepdims=True))))
        return self.head(self.narrow(x * nnx.sigmoid(gate)).mean((1, 2)))


class Inception(nnx.Module):
    def __init__(self, kit, rngs):
        self.kit = kit
        self.one = kit.Conv(3, 4, (1, 1), rngs=rngs)
        self.three = nnx.Sequential(
            kit.Conv(3, 4, (1, 1), rngs=rngs), nnx.relu, kit.Conv(4, 4, (3, 3), rngs=rngs)
        )
        self.wide = nnx.Sequential(kit.Conv(3, 4, (1, 7), rngs=rngs), kit.Conv(4, 4, (7, 1), rngs=rngs))
        self.pooled = kit.Conv(3, 4, (1, 1), rngs=rngs)
        self.head = kit.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        pooled = self.pooled(self.kit.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME"))
        x = jnp.concatenate([self.one(x), self.three(x), self.wide(x), pooled], -1)
        x = self.kit.max_pool(nnx.relu(x), (3, 3), strides=(2, 2))
        return self.head(x.mean((1, 2)))


class TextClassifier(nnx.Module):
    """Token numbers, whose padding of 0 attention does not see."""

    def __init__(self, kit, rngs):
        self.embed = kit.Embed(20, 8, rngs=rngs)
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (12, 8), jnp.float64))
        self.attention = kit.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = kit.RMSNorm(8, rngs=rngs)
        self.head = kit.Linear(8, 10, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions[...]
        x = x + self.attention(x, mask=nnx.make_attention_mask(tokens >= 0, tokens > 0))
        return self.head(self.norm(x).mean(1))


class SuperResolution(nnx.Module):
    """Channels become pixels at the end, as ESPCN's do."""

    def __init__(self, kit, rngs):
        self.enter = kit.Conv(3, 8, (5, 5), rngs=rngs)
        self.act = kit.PReLU()
        self.deep = kit.Conv(8, 8, (3, 3), rngs=rngs)
        self.out = kit.Conv(8, 12, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = self.out(self.act(self.deep(self.act(self.enter(x)))))
        n, h, w, _ = x.shape
        return x.reshape(n, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, 3)


class Tabular(nnx.Module):
    def __init__(self, kit, rngs):
        self.deep = kit.Linear(6, 16, rngs=rngs)
        self.norm = kit.BatchNorm(16, rngs=rngs)
        self.head = kit.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.deep(x))))
