"""What a user may well type: it works, or one sentence says what would."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import shardtrain as st
from shardtrain import UserError, models, nn, ops

X = jnp.ones((2, 8, 8, 4))
ROW, NONE = jnp.ones((2, 8, 4)), jnp.ones((2, 0, 4))
KERNEL = jnp.ones((3, 3, 4, 4))
LINEAR = inspect.unwrap(ops.linear)  # jaxtyping, at work in tests alone, would speak first


def lenet():
    return models.LeNet(image=(16, 16, 1), rngs=nnx.Rngs(0))


def summary(*args):
    return st.summary(lenet(), st.make_mesh("data=8"), *args)


REFUSED = {
    "groups=0": (
        lambda: ops.conv_transpose(X, KERNEL, groups=0, transpose_kernel=True),
        "do not divide into groups=0",
    ),
    "vector for a kernel": (lambda: LINEAR(ROW, jnp.ones((5, 3))), r"linear: .*\(2, 8, 4\) .*\(5, 3\)"),
    "bias": (lambda: LINEAR(ROW, jnp.ones((4, 3)), jnp.ones(4)), r"linear: a bias of shape \(4,\) for 3"),
    "no rows to convolve": (lambda: ops.conv(NONE, jnp.ones((3, 4, 3))), "does not fit the width of 0"),
    "no rows to pool": (lambda: ops.max_pool(NONE, 2), "does not fit the width of 0"),
    "no rows to resize": (lambda: ops.resize(NONE, 2), "resize: .* has no pixels"),
    "no rows to pool adaptively": (lambda: ops.adaptive_max_pool(NONE, 2), "max_pool: .* has no pixels"),
    "embed by floats": (lambda: ops.embed(jnp.ones((2, 3)), jnp.ones((5, 4))), "embed: indices of float"),
    "embed from 3-D": (
        lambda: ops.embed(jnp.ones((2, 3), int), jnp.ones((5, 4, 4))),
        r"a table of shape \(5, 4, 4\)",
    ),
    "a window of nothing": (
        lambda: ops.conv(ROW, jnp.ones((0, 4, 6))),
        r"\(0, 4, 6\) has a window without a pixel",
    ),
    "two types": (
        lambda: ops.conv(ROW.astype("f4"), jnp.ones((3, 4, 6))),
        "float32 and a kernel of float64; cast",
    ),
    "no channels": (lambda: nn.LocallyConnected(1, 0, (4, 4), 3, rngs=nnx.Rngs(0)), "1 -> 0 channels"),
    "scale of groups": (
        lambda: ops.group_norm(X, 2, jnp.ones(3)),
        r"group_norm: scale has shape \(3,\) for 4",
    ),
    "bias of layers": (
        lambda: ops.layer_norm(X, jnp.ones(4), jnp.ones(3)),
        r"layer_norm: bias has shape \(3,\) for 4 channels",
    ),
    "method": (lambda: nn.Upsample(2, "cubic"), "there are 'nearest' and 'linear'"),
    "factor": (lambda: nn.Upsample(0), "factor=0"),
    "features": (lambda: models.UNet(3, features=8, rngs=nnx.Rngs(0)), "features=8; give two levels or more"),
    "extents": (
        lambda: models.LeNet(image=(8, 8), rngs=nnx.Rngs(0)),
        r"LeNet: image=\(8, 8\); give \(height",
    ),
    "no extents": (
        lambda: models.LocalNet(image=(8, 8), rngs=nnx.Rngs(0)),
        r"LocalNet: image=\(8, 8\); give",
    ),
    "crop that grows": (lambda: nn.Crop()(X, (9, 8)), r"\(9, 8\) pixels of \(8, 8\)"),
    "summary of text": (lambda: summary("abc"), "inputs='abc'; give the batch's shape"),
    "summary of floats": (lambda: summary((1.5, 16, 16, 1)), "give the batch's shape"),
    "summary of a list of shapes": (lambda: summary([(8, 16, 16, 1)]), "give the batch's shape"),
    "summary of nothing": (lambda: st.summary(7, st.make_mesh("data=8")), "int and Mesh; give an NNX model"),
    "summary on text": (lambda: st.summary(lenet(), "data=8"), "LeNet and str; .*make_mesh"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()


TAKEN = {
    "one number for a window": (lambda: nn.MaxPool(2, 2)(X), (2, 4, 4, 4)),
    "one number for a mean": (lambda: nn.AvgPool(3)(ROW), (2, 6, 4)),
    "one number for extents": (lambda: nn.AdaptiveAvgPool(3)(X), (2, 3, 3, 4)),
    "a global maximum": (lambda: nn.AdaptiveMaxPool(1)(X), (2, 1, 1, 4)),
    "one number for an image": (lambda: nn.LocallyConnected(4, 3, 8, 3, rngs=nnx.Rngs(0))(ROW), (2, 8, 3)),
    "one number for a window of filters": (
        lambda: ops.local(X, jnp.ones((8, 8, 36, 3)), window=3),
        (2, 8, 8, 3),
    ),
    "inputs by name": (lambda: nn.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0))(inputs=X), (2, 8, 8, 5)),
    "no examples": (lambda: ops.local(ROW[:0], jnp.ones((8, 12, 3)), window=3), (0, 8, 3)),
    "whole numbers": (lambda: ops.max_pool(ROW.astype(int), 2), (2, 7, 4)),
}


@pytest.mark.parametrize("mesh", ["data=1", "data=2,channel=4"])
@pytest.mark.parametrize(("call", "shape"), TAKEN.values(), ids=TAKEN)
def test_taken(call, shape, mesh):
    with jax.set_mesh(st.make_mesh(mesh)):
        assert call().shape == shape
