"""PyTorch's own functions on the same weights: forward and every gradient, in float64.

Arrays are PyTorch's, channels first; the operators see them turned.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from shardtrain import make_mesh, ops  # noqa: E402

from .parity import numbers, pulled  # noqa: E402

MESHES = ["height=2,width=2", pytest.param(None, marks=pytest.mark.slow, id="no mesh")]
pytestmark = pytest.mark.parametrize("mesh", MESHES)


def first(x):
    return jnp.moveaxis(x, -1, 1)


def last(x):
    return jnp.moveaxis(x, 1, -1)


def turned(weight):
    """Outputs, inputs and window to Flax's window, inputs and outputs."""
    return jnp.moveaxis(weight, (0, 1), (-1, -2))


def torch_parity(op, reference, args, mesh):
    """`op`, channels last inside and first outside, and its gradients are those of PyTorch's `reference`."""
    tensors = [torch.tensor(a, requires_grad=True) for a in args]
    y = reference(*tensors)
    cotangent = numbers(*y.shape, seed=1)
    y.backward(torch.tensor(cotangent))
    expected = [y.detach(), *(t.grad for t in tensors)]
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        _, (value, gradients) = pulled(op, args, cotangent)
    for i, (a, b) in enumerate(zip([value, *gradients], expected, strict=True)):
        b = b.numpy()
        assert a.shape == b.shape
        limit = 1e-10 * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg="value" if i == 0 else f"gradient {i}")


CONVOLUTIONS = {
    "1-D, stride, dilation": ((2, 3, 9), (4, 3, 3), {"stride": 2, "padding": 2, "dilation": 2}),
    "2-D, groups": ((2, 4, 7, 5), (6, 2, 3, 2), {"padding": (1, 0), "groups": 2, "stride": (1, 2)}),
    "2-D, depthwise": ((2, 4, 7, 5), (8, 1, 3, 3), {"padding": 1, "groups": 4}),
    "2-D, same": ((2, 3, 7, 5), (4, 3, 3, 5), {"padding": "same", "dilation": (2, 1)}),
    "3-D": ((2, 2, 4, 5, 3), (3, 2, 3, 2, 3), {"padding": (1, 0, 1), "stride": (2, 1, 1)}),
}


@pytest.mark.parametrize(("shape", "weight", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_conv(mesh, shape, weight, options):
    def op(x, weight, bias):
        padding = options["padding"]
        return first(
            ops.conv(
                last(x),
                turned(weight),
                bias,
                strides=options.get("stride", 1),
                padding=padding.upper() if isinstance(padding, str) else padding,
                dilation=options.get("dilation", 1),
                groups=options.get("groups", 1),
            )
        )

    reference = [F.conv1d, F.conv2d, F.conv3d][len(shape) - 3]
    args = [numbers(*shape), numbers(*weight), numbers(weight[0])]
    torch_parity(op, functools.partial(reference, **options), args, mesh)


@pytest.mark.parametrize("mode", ["circular", "reflect"])
@pytest.mark.parametrize("window", [(3, 5), (4, 2)])
def test_padding_mode(mesh, mode, window):
    """`padding="same"` of a layer with a `padding_mode`; even windows lean to the end in both."""

    def reference(x, weight, bias):
        layer = torch.nn.Conv2d(3, 4, window, padding="same", padding_mode=mode, dtype=torch.float64)
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    def op(x, weight, bias):
        return first(ops.conv(last(x), turned(weight), bias, padding=mode.upper()))

    torch_parity(op, reference, [numbers(2, 3, 7, 5), numbers(4, 3, *window), numbers(4)], mesh)


TRANSPOSED = {
    "U-Net's": ((2, 3, 5, 3), (3, 4, 2, 2), {"stride": 2}),
    "DCGAN's": ((2, 3, 5, 3), (3, 4, 4, 4), {"stride": 2, "padding": 1}),
    "output padding": ((2, 3, 5, 3), (3, 4, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "groups": ((2, 4, 5, 3), (4, 3, 3, 2), {"stride": (3, 2), "groups": 2, "output_padding": (2, 0)}),
    "1-D, dilation": ((2, 3, 7), (3, 2, 3), {"stride": 2, "padding": 3, "dilation": 2, "output_padding": 1}),
    "3-D": ((2, 2, 3, 4, 2), (2, 3, 3, 2, 2), {"stride": (1, 2, 2), "padding": (1, 0, 1)}),
}


@pytest.mark.parametrize(("shape", "weight", "options"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_conv_transpose(mesh, shape, weight, options):
    dilation, groups = options.get("dilation", 1), options.get("groups", 1)
    pads = ops.torch_padding(
        weight[2:],
        options.get("padding", 0),
        output_padding=options.get("output_padding", 0),
        dilation=dilation,
    )

    def op(x, weight, bias):
        kernel = turned(weight)
        strides = options["stride"]
        more = {"padding": pads, "dilation": dilation, "groups": groups, "transpose_kernel": True}
        return first(ops.conv_transpose(last(x), kernel, bias, strides=strides, **more))

    reference = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d][len(shape) - 3]
    args = [numbers(*shape), numbers(*weight), numbers(weight[1] * groups)]
    torch_parity(op, functools.partial(reference, **options), args, mesh)


POOLS = {
    "1-D": ((2, 3, 9), (3,), {"stride": (2,), "padding": (1,)}),
    "2-D, overlapping": ((2, 3, 7, 6), (3, 2), {"stride": (1, 1), "padding": (1, 0)}),
    "2-D, stride 2": ((2, 3, 7, 9), (3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    "3-D": ((2, 2, 4, 5, 3), (2, 3, 2), {"stride": (2, 1, 1), "padding": (1, 1, 0)}),
}


@pytest.mark.parametrize("kind", ["max", "mean", "mean without padding"])
@pytest.mark.parametrize(("shape", "window", "options"), POOLS.values(), ids=POOLS)
def test_pool(mesh, kind, shape, window, options):
    more = {} if kind == "max" else {"count_include_pad": kind == "mean"}
    pool = ops.max_pool if kind == "max" else ops.avg_pool
    name = f"{'max' if kind == 'max' else 'avg'}_pool{len(window)}d"
    reference = functools.partial(getattr(F, name), kernel_size=window, **options, **more)

    def op(x):
        return first(pool(last(x), window, strides=options["stride"], padding=options["padding"], **more))

    torch_parity(op, reference, [numbers(*shape) - 3], mesh)


def test_equal_values(mesh):
    """Both give the gradient of a maximum to the first of equal values."""
    x = np.random.default_rng(0).integers(0, 3, (2, 3, 7, 6)).astype(float)
    op = lambda x: first(ops.max_pool(last(x), (3, 2), padding=(1, 0)))  # noqa: E731
    torch_parity(op, lambda x: F.max_pool2d(x, (3, 2), 1, (1, 0)), [x], mesh)


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize(
    ("shape", "extents"), [((2, 3, 13), (6,)), ((2, 3, 13, 5), (6, 7)), ((2, 2, 5, 3, 4), (3, 2, 3))]
)
def test_adaptive_pool(mesh, kind, shape, extents):
    pool = ops.adaptive_avg_pool if kind == "avg" else ops.adaptive_max_pool
    reference = getattr(F, f"adaptive_{kind}_pool{len(extents)}d")
    torch_parity(
        lambda x: first(pool(last(x), extents)), lambda x: reference(x, extents), [numbers(*shape)], mesh
    )


@pytest.mark.parametrize(
    ("mode", "shape", "extents"),
    [
        ("nearest-exact", (2, 3, 7), (13,)),
        ("nearest-exact", (2, 3, 7, 5), (14, 3)),
        ("nearest-exact", (2, 2, 3, 4, 5), (5, 8, 3)),
        ("linear", (2, 3, 7), (5,)),
        ("bilinear", (2, 3, 7, 5), (14, 3)),
        ("bilinear", (2, 3, 7, 5), (13, 9)),
        ("trilinear", (2, 2, 3, 4, 5), (5, 8, 3)),
    ],
)
def test_interpolate(mesh, mode, shape, extents):
    method = "nearest" if mode == "nearest-exact" else "linear"
    reference = functools.partial(F.interpolate, size=extents, mode=mode)
    torch_parity(
        lambda x: first(ops.resize(last(x), extents, method=method)), reference, [numbers(*shape)], mesh
    )


@pytest.mark.parametrize(
    ("mode", "theirs"), [("wrap", "circular"), ("reflect", "reflect"), ("edge", "replicate")]
)
def test_pad(mesh, mode, theirs):
    pads = (2, 3), (1, 2)
    op = lambda x: first(ops.pad(last(x), pads, mode=mode))  # noqa: E731
    reference = lambda x: F.pad(x, (*pads[1], *pads[0]), mode=theirs)  # noqa: E731
    torch_parity(op, reference, [numbers(2, 3, 7, 5)], mesh)


SHAPE = 3, 4, 7, 5

NORMS = {
    "batch": (
        lambda x, s, b: ops.batch_norm(x, s, b)[0],
        lambda x, s, b: F.batch_norm(x, None, None, s, b, training=True),
    ),
    "group": (
        lambda x, s, b: ops.group_norm(x, 2, s, b, epsilon=1e-5),
        lambda x, s, b: F.group_norm(x, 2, s, b),
    ),
    "instance": (
        lambda x, s, b: ops.instance_norm(x, s, b, epsilon=1e-5),
        lambda x, s, b: F.instance_norm(x, weight=s, bias=b),
    ),
    "layer": (
        lambda x, s, b: ops.layer_norm(x, s, b, epsilon=1e-5),
        lambda x, s, b: F.layer_norm(x.movedim(1, -1), (4,), s, b).movedim(-1, 1),
    ),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norm(mesh, norm):
    ours, theirs = NORMS[norm]
    args = [numbers(*SHAPE) * 3 + 1, *(numbers(4, seed=i) for i in range(2))]
    torch_parity(lambda x, s, b: first(ours(last(x), s, b)), theirs, args, mesh)


def test_embedding(mesh):
    indices = np.random.default_rng(0).integers(0, 7, (3, 5))
    op = lambda table: ops.embed(jnp.asarray(indices), table)  # noqa: E731
    torch_parity(op, lambda table: F.embedding(torch.tensor(indices), table), [numbers(7, 4)], mesh)


def test_linear(mesh):
    op = lambda x, weight, bias: ops.linear(x, weight.T, bias)  # noqa: E731
    torch_parity(op, F.linear, [numbers(3, 5, 4), numbers(6, 4), numbers(6)], mesh)
