import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.layout import Layout
from shardtrain.mesh import make_mesh
from shardtrain.nn import models, partition


def parameters(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_resnets_have_the_published_sizes(depth, count):
    """The parameter counts of torchvision's resnet18, 34 and 50."""
    model = nnx.eval_shape(lambda: models.ResNet(depth, rngs=nnx.Rngs(0)))
    assert parameters(model) == count


@pytest.mark.parametrize(
    ("depth", "norm"),
    [
        (8, "group"),
        pytest.param(50, "batch", marks=pytest.mark.slow),
        pytest.param(18, "batch", marks=pytest.mark.slow),
    ],
)
def test_a_small_resnet_of_every_depth_is_the_same_on_a_mesh(depth, norm):
    model = models.ResNet(
        depth, 10, 3, stem="large", width=8, norm=norm, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 37, 32, 3), jnp.float64)
    expected = nnx.jit(lambda m, x: m(x))(model, x)
    mesh = make_mesh("data=2,height=2,channel=2")
    partition.assign(model, mesh, Layout(), {})
    with jax.set_mesh(mesh):
        found = nnx.jit(lambda m, x: m(x))(model, x)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_lenet_on_a_mesh():
    model = models.LeNet(10, (11, 8, 1), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 11, 8, 1), jnp.float64)
    expected = nnx.jit(lambda m, x: m(x))(model, x)
    with jax.set_mesh(make_mesh("data=2,height=2,channel=2")):
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, rtol=1e-9)


@pytest.mark.parametrize(("make", "count"), [(models.AlexNet, 61_100_840), (models.VGG, 138_357_544)])
def test_classics_have_the_published_sizes(make, count):
    """The parameter counts of torchvision's alexnet and vgg16."""
    assert parameters(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))) == count


OFTEN = ("local", "unet of images")

OTHERS = {
    "alexnet": (models.AlexNet, {"hidden": 16}, (2, 67, 63, 3), "data=2,height=2,channel=2"),
    "vgg": (
        models.VGG,
        {"depth": 11, "width": 4, "hidden": 16},
        (2, 33, 32, 3),
        "height=2,width=2,channel=2",
    ),
    "local": (models.LocalNet, {"image": (9, 8, 2)}, (4, 9, 8, 2), "data=2,height=2,channel=2"),
    "unet of signals": (models.UNet, {"classes": 3, "rank": 1, "features": (8, 16)}, (2, 19, 1), "width=4"),
    "unet of images": (
        models.UNet,
        {"classes": 3, "rank": 2, "features": (8, 16), "norm": "batch"},
        (2, 9, 7, 1),
        "height=3,channel=2",
    ),
    "unet of volumes": (
        models.UNet,
        {"classes": 3, "rank": 3, "features": (4, 8), "remat": True},
        (1, 7, 6, 9, 1),
        "depth=2,height=2,width=2",
    ),
}


@pytest.mark.parametrize(
    ("make", "options", "shape", "mesh"),
    [
        pytest.param(*case, id=name, marks=[] if name in OFTEN else [pytest.mark.slow])
        for name, case in OTHERS.items()
    ],
)
def test_models_are_the_same_on_a_mesh(make, options, shape, mesh):
    """Outputs, and the gradients of all parameters."""

    @nnx.jit
    def outcome(model, x):
        model.eval()
        return nnx.value_and_grad(lambda m: (y := jnp.sin(m(x))).sum() + (y**2).sum())(model)

    init = nnx.jit(lambda: make(**options, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    expected = outcome(init(), x)
    on_mesh, model = make_mesh(mesh), init()
    partition.assign(model, on_mesh, Layout(), {})
    with jax.set_mesh(on_mesh):
        found = outcome(model, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), found, expected)


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1), jnp.float64)

    def gradient(remat):
        model = models.ResNet(8, 10, 1, remat=remat, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        return nnx.to_pure_dict(nnx.jit(nnx.grad(lambda m: m(x).sum()))(model))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradient(True), gradient(False)
    )


def test_what_there_is_not():
    with pytest.raises(UserError, match="no depth 20; there are 8, 18, 34, 50"):
        models.ResNet(20, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="norm='layer'"):
        models.ResNet(8, norm="layer", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="3x8 is too small"):
        models.LeNet(10, (3, 8, 1), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="no depth 12; there are 11, 13, 16, 19"):
        models.VGG(12, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="rank=4; images have 1, 2 or 3"):
        models.UNet(2, rank=4, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="give two levels or more"):
        models.UNet(2, features=(8,), rngs=nnx.Rngs(0))
    alexnet = nnx.eval_shape(lambda: models.AlexNet(rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="62x64 are too small, 63x63 is the least"):
        alexnet(jnp.ones((1, 62, 64, 3)))
