"""Models of the kinds that Flax users bring: with the layers renamed, on meshes, they train as plain nnx does."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st

from . import moved_models as models
from .test_attention import plain_attention

BATCH, STEPS, MICROBATCHES = 8, 3, 4
LAYERS = (
    "Conv", "ConvTranspose", "Linear", "Embed", "BatchNorm", "GroupNorm", "LayerNorm", "InstanceNorm", "RMSNorm",
    "PReLU", "MultiHeadAttention",
)  # fmt: skip


def kit(layers, pools, **attention):
    """All layers with parameters in float64, and the functions."""
    made = {name: functools.partial(getattr(layers, name), param_dtype=jnp.float64) for name in LAYERS}
    made["MultiHeadAttention"] = functools.partial(made["MultiHeadAttention"], **attention)
    return SimpleNamespace(**made, Dropout=layers.Dropout, max_pool=pools.max_pool, avg_pool=pools.avg_pool)


THEIRS = kit(nnx, nnx, attention_fn=plain_attention)  # nnx's own has digits of float32 only
OURS = kit(st.nn, st.ops)

IMAGES = ("data=8", "height=4,width=2", "data=2,height=2,channel=2", "pipe=2,data=2,height=2")
SIGNALS = ("data=8", "width=8", "data=2,width=2,channel=2", "pipe=2,data=2,width=2")
TABLES = ("data=8", "data=4,channel=2", "pipe=2,data=2,channel=2")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model, and what it is trained on.

    Attributes:
        make: from a kit and a stream of random keys.
        inputs: shapes, of one input or of several.
        targets: the shape of an image of numbers for each example; None for classes.
        meshes: where it is trained.
        dimensions: of the inputs, as for the trainer.
        top: if given, inputs are integers below it.
    """

    make: Any
    inputs: Any
    targets: tuple[int, ...] | None = None
    meshes: tuple[str, ...] = IMAGES
    dimensions: Any = None
    top: int | None = None

    def batch(self):
        random = np.random.default_rng(0)

        def draw(shape):
            shape = (BATCH, *shape)
            return random.integers(0, self.top, shape) if self.top else random.normal(size=shape)

        inputs = draw(self.inputs) if isinstance(self.inputs, tuple) else [draw(s) for s in self.inputs]
        targets = (
            np.arange(BATCH) % 10 if self.targets is None else random.normal(size=(BATCH, *self.targets))
        )
        return inputs, targets

    def loss(self, outputs, targets):
        if self.targets is None:
            return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return ((outputs - targets) ** 2).mean(tuple(range(1, outputs.ndim)))


KINDS = {
    "resnet": Kind(models.ResNet, (16, 16, 3)),
    "densenet": Kind(models.DenseNet, (16, 16, 3)),
    "vgg": Kind(models.VGG, (16, 16, 3)),
    "unet": Kind(models.UNet, (16, 16, 3), (16, 16, 3)),
    "unet of volumes": Kind(functools.partial(models.UNet, rank=3), (8, 8, 8, 3), (8, 8, 8, 3)),
    "vae": Kind(models.VAE, (16, 16, 3), (16, 16, 3)),
    "convnext": Kind(models.ConvNeXt, (16, 16, 3)),
    "convlstm": Kind(models.ConvLSTM, (3, 8, 8, 3), dimensions="batch time height width features"),
    "tcn": Kind(models.TCN, (16, 3), meshes=SIGNALS),
    "whisper": Kind(models.Whisper, (32, 3), meshes=SIGNALS),
    "vit": Kind(models.ViT, (16, 16, 3)),
    "unetr": Kind(models.UNETR, (8, 8, 8, 3), (8, 8, 8, 3)),
    "diffusion": Kind(
        models.Diffusion, [(16, 16, 3), ()], (16, 16, 3), dimensions=["batch height width features", "batch"]
    ),
    "mixer": Kind(models.Mixer, (16, 16, 3)),
    "mobilenet": Kind(models.MobileNet, (16, 16, 3)),
    "inception": Kind(models.Inception, (16, 16, 3)),
    "text": Kind(models.TextClassifier, (12,), meshes=TABLES, top=20),
    "super-resolution": Kind(models.SuperResolution, (16, 16, 3), (32, 32, 3)),
    "table": Kind(models.Tabular, (6,), meshes=TABLES),
}

OFTEN = {
    ("vit", "data=2,height=2,channel=2"),
    ("table", "pipe=2,data=2,channel=2"),
    ("whisper", "width=8"),
}


def normalizes_batches(model):
    return any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model))


@functools.cache
def plain(name, microbatches):
    """The losses of plain nnx on one device; batch norm normalizes by the statistics of a microbatch."""
    kind = KINDS[name]
    model = kind.make(THEIRS, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    inputs, targets = jax.tree.map(jnp.asarray, kind.batch())

    @nnx.jit
    def step(model, optimizer, inputs, targets):
        def loss(model):
            total = 0.0
            for i in range(microbatches):
                x, t = jax.tree.map(lambda a, i=i: a[i::microbatches], (inputs, targets))
                total += kind.loss(model(x), t).mean() / microbatches
            return total

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    return [float(step(model, optimizer, inputs, targets)) for _ in range(STEPS)]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=[] if (name, mesh) in OFTEN else pytest.mark.slow)
        for name, kind in KINDS.items()
        for mesh in kind.meshes
    ],
)
@pytest.mark.filterwarnings("ignore:scatter inputs")  # nnx stores float64 into statistics of float32
def test_a_model_with_its_layers_renamed_trains_as_in_nnx(name, mesh):
    kind = KINDS[name]
    model = kind.make(OURS, nnx.Rngs(0))
    staged = "pipe" in mesh
    one = st.Trainer(
        model,
        optax.sgd(0.1, momentum=0.9),
        mesh=mesh,
        loss=kind.loss,
        dimensions=kind.dimensions,
        accumulate=MICROBATCHES if staged else 1,
    )
    found = [row["loss"] for row in one.fit([kind.batch()] * STEPS, steps=STEPS, progress=False)]
    expected = plain(name, MICROBATCHES if staged and normalizes_batches(model) else 1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert len(set(found)) == STEPS
