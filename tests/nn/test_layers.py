"""Our layers against their nnx namesakes: same arguments, same names, same weights, same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, nn
from shardtrain.errors import UserError
from shardtrain.mesh import make_mesh

MESHES = ["data=1", "data=2,height=2,channel=2", "height=4,width=2", "channel=8"]

CASES = {
    "Conv": (nnx.Conv, nn.Conv, (8, 16, (3, 3)), {"strides": 2, "padding": 1}),
    "Conv, no bias": (nnx.Conv, nn.Conv, (8, 5, (5, 5)), {"use_bias": False, "padding": "VALID"}),
    "Conv, groups": (nnx.Conv, nn.Conv, (8, 8, (3, 3)), {"feature_group_count": 8, "kernel_dilation": 2}),
    "Conv, circular": (nnx.Conv, nn.Conv, (8, 16, (4, 3)), {"padding": "CIRCULAR", "strides": (2, 1)}),
    "Conv, reflect": (nnx.Conv, nn.Conv, (8, 4, (3, 5)), {"padding": "REFLECT"}),
    "Conv, input dilation": (nnx.Conv, nn.Conv, (8, 4, (3, 3)), {"input_dilation": (2, 1), "padding": 2}),
    "ConvTranspose": (nnx.ConvTranspose, nn.ConvTranspose, (8, 4, (3, 2), (2, 2)), {}),
    "ConvTranspose, turned": (
        nnx.ConvTranspose,
        nn.ConvTranspose,
        (8, 16, (4, 3), (2, 3)),
        {"transpose_kernel": True, "padding": "CIRCULAR"},
    ),
    "InstanceNorm": (nnx.InstanceNorm, nn.InstanceNorm, (8,), {}),
    "Linear": (nnx.Linear, nn.Linear, (8, 10), {}),
    "BatchNorm": (nnx.BatchNorm, nn.BatchNorm, (8,), {"momentum": 0.9}),
    "GroupNorm": (nnx.GroupNorm, nn.GroupNorm, (8,), {"num_groups": 2}),
    "LayerNorm": (nnx.LayerNorm, nn.LayerNorm, (8,), {}),
}

MORE_CASES = {
    "RMSNorm": (nnx.RMSNorm, nn.RMSNorm, (8,), {}),
    "BatchNorm, two passes": (nnx.BatchNorm, nn.BatchNorm, (8,), {"use_fast_variance": False}),
    "GroupNorm, two passes": (nnx.GroupNorm, nn.GroupNorm, (8, 2), {"use_fast_variance": False}),
    "PReLU": (nnx.PReLU, nn.PReLU, (0.3,), {}),
    "LinearGeneral": (nnx.LinearGeneral, nn.LinearGeneral, (8, (4, 3)), {}),
    "LinearGeneral, two dimensions": (
        nnx.LinearGeneral,
        nn.LinearGeneral,
        ((6, 8), (2, 4)),
        {"axis": (-2, -1), "use_bias": False},
    ),
    "LinearGeneral, not the last": (nnx.LinearGeneral, nn.LinearGeneral, (6, 4), {"axis": 2}),
    "Einsum": (nnx.Einsum, nn.Einsum, ("nhwa,bac->nhwbc", (2, 8, 4), (2, 4)), {}),
}


def x64(layer):
    """The layer with all its numbers in float64, and off their initial zeros and ones."""
    key = jax.random.key(1)
    state = nnx.state(layer)
    nnx.update(layer, jax.tree.map(lambda v: jax.random.uniform(key, v.shape, jnp.float64, 0.5, 1.5), state))
    return layer


def outcome(layer, x):
    """Output, gradients by everything, and the state after one call."""

    def loss(layer, x):
        y = layer(x)
        return jnp.sin(y).sum(), y

    (grad_layer, grad_x), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, grad_x, nnx.to_pure_dict(grad_layer), nnx.to_pure_dict(nnx.state(layer))


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_parity_with_nnx(case, spec):
    layer_parity(*CASES[case], spec)


@pytest.mark.parametrize(
    "spec", ["height=2,channel=2", pytest.param("data=2,height=2,channel=2", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", MORE_CASES)
def test_parity_of_more_layers(case, spec):
    layer_parity(*MORE_CASES[case], spec)


def layer_parity(theirs, ours, args, kwargs, spec):
    x = jax.random.normal(jax.random.key(0), (4, 7, 6, 8), jnp.float64)
    kwargs = kwargs | {"param_dtype": jnp.float64}
    if theirs is not nnx.PReLU:
        kwargs |= {"rngs": nnx.Rngs(0)}
    reference, layer = x64(theirs(*args, **kwargs)), x64(ours(*args, **kwargs))
    assert nnx.to_pure_dict(nnx.state(layer)).keys() == nnx.to_pure_dict(nnx.state(reference)).keys()
    expected = nnx.jit(outcome)(reference, x)
    with jax.set_mesh(make_mesh(spec)):
        found = nnx.jit(outcome)(layer, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, expected)


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose", "Linear", "BatchNorm", "GroupNorm", "LayerNorm"])
def test_the_same_key_gives_the_same_weights(name):
    theirs, ours, args, kwargs = CASES[name]
    a, b = (nnx.state(make(*args, **kwargs, rngs=nnx.Rngs(3))) for make in (theirs, ours))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(a), nnx.to_pure_dict(b))


@pytest.mark.parametrize("spec", ["data=1", "data=2,height=2,channel=2"])
def test_locally_connected_is_linens(spec):
    """The parameters of `flax.linen.ConvLocal`, name for name, give its outputs."""
    x = jax.random.normal(jax.random.key(0), (4, 7, 6, 8), jnp.float64)
    theirs = linen.ConvLocal(6, (3, 3), (2, 1), padding="SAME", param_dtype=jnp.float64)
    variables = theirs.init(jax.random.key(1), x)
    variables = jax.tree.map(lambda v: jax.random.normal(jax.random.key(2), v.shape, v.dtype), variables)
    ours = nn.LocallyConnected(8, 6, (7, 6), 3, (2, 1), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.State({k: nnx.Param(v) for k, v in variables["params"].items()}))
    with jax.set_mesh(make_mesh(spec)):
        np.testing.assert_allclose(ours(x), theirs.apply(variables, x), atol=1e-10)


def test_locally_connected_starts_with_the_variance_of_a_convolution():
    layer = nn.LocallyConnected(8, 6, (16, 16), 3, rngs=nnx.Rngs(0))
    assert float(layer.kernel[...].std()) == pytest.approx((8 * 9) ** -0.5, rel=0.05)
    with pytest.raises(UserError, match=r"made for inputs \(batch, 16, 16, 8\), not \(2, 16, 8, 8\)"):
        layer(jnp.ones((2, 16, 8, 8)))


@pytest.mark.parametrize("spec", ["data=1", "data=2,channel=4"])
def test_embed_looks_up_and_attends(spec):
    theirs, ours = (make(12, 8, param_dtype=jnp.float64, rngs=nnx.Rngs(0)) for make in (nnx.Embed, nn.Embed))
    indices = jnp.array([[0, 11, -1], [5, 5, 12]])
    with jax.set_mesh(make_mesh(spec)):
        np.testing.assert_array_equal(ours(indices), theirs(indices))
        query = jax.random.normal(jax.random.key(0), (4, 8), jnp.float64)
        np.testing.assert_allclose(ours.attend(query), theirs.attend(query), atol=1e-12)
    with pytest.raises(UserError, match="looks up integers, not float"):
        ours(query)


def test_pools_are_those_of_nnx():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    np.testing.assert_array_equal(
        nn.MaxPool((3, 2), (2, 1), "SAME")(x), nnx.max_pool(x, (3, 2), (2, 1), "SAME")
    )
    np.testing.assert_allclose(
        nn.AvgPool((3, 3), padding="SAME", count_include_pad=False)(x),
        nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
        rtol=1e-6,
    )


def test_running_statistics_are_used_in_evaluation():
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 8), jnp.float64)
    kwargs = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    reference, layer = x64(nnx.BatchNorm(8, **kwargs)), x64(nn.BatchNorm(8, **kwargs))
    reference.eval(), layer.eval()
    with jax.set_mesh(make_mesh("data=2,height=2,channel=2")):
        np.testing.assert_allclose(layer(x), reference(x), rtol=1e-12)


@pytest.mark.parametrize("running", [False, True])
def test_running_statistics_do_not_widen_the_output(running):
    """In nnx they do: a network in bfloat16 would go on in float32 after its first batch norm."""
    layer = nn.BatchNorm(8, use_running_average=running, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.full(8, 100.3)
    y = layer(jnp.full((4, 8), 100.5, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    if running:  # and are not rounded: bfloat16 has no 100.3
        np.testing.assert_allclose(y.astype(float), 0.2, rtol=0.01)


def test_batches_of_any_rank():
    conv, linear = nn.Conv(3, 4, (3,), rngs=nnx.Rngs(0)), nn.Linear(3, 4, rngs=nnx.Rngs(0))
    assert conv(jnp.ones((9, 3))).shape == (9, 4)
    assert conv(jnp.ones((2, 5, 9, 3))).shape == (2, 5, 9, 4)
    assert linear(jnp.ones(3)).shape == (4,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: nn.Conv(1, 1, (3,), input_dilation=0, rngs=r), "input_dilation=0 for 1 spatial"),
        (lambda r: nn.Conv(1, 1, (3,), padding="MIRROR", rngs=r), "padding='MIRROR'; use 'SAME'"),
        (lambda r: nn.Conv(1, 1, (3, 3), padding="CAUSAL", rngs=r), "padding='CAUSAL'; use 'SAME'"),
        (lambda r: nn.ConvTranspose(1, 1, (3,), padding="REFLECT", rngs=r), "REFLECT' is not defined"),
        (lambda r: nn.ConvTranspose(1, 1, (3,), (1, 2), rngs=r), "strides=.* for 1 spatial"),
        (lambda r: nn.LocallyConnected(1, 1, (4, 4), 5, padding="VALID", rngs=r), "does not fit the height"),
        (
            lambda r: nn.InstanceNorm(3, axis_name="data", rngs=r),
            "axis_name='data', but .* leave axis_name out",
        ),
        (lambda r: nn.Conv(1, 1, (3, 3), (1, 2, 3), rngs=r), "strides=.* for 2 spatial dimensions"),
        (lambda r: nn.BatchNorm(3, axis=1, rngs=r), "channels last"),
        (lambda r: nn.BatchNorm(3, axis_name="data", rngs=r), "leave axis_name out"),
        (lambda r: nn.LayerNorm(3, reduction_axes=(1, 2), rngs=r), "normalizes the last axis"),
    ],
)
def test_what_is_not_partitioned_is_refused_at_construction(make, message):
    with pytest.raises(UserError, match=message):
        make(nnx.Rngs(0))


def masks(spec, x, **kwargs):
    layer = nn.Dropout(0.4, rngs=nnx.Rngs(7), **kwargs)
    with jax.set_mesh(make_mesh(spec)):
        return np.asarray(nnx.jit(lambda layer, x: layer(x))(layer, x) != 0)


def test_dropout_draws_the_same_mask_on_every_mesh():
    x = jnp.ones((8, 7, 6, 16))
    one = masks("data=1", x)
    assert 0.5 < one.mean() < 0.7
    for spec in MESHES[1:]:
        np.testing.assert_array_equal(masks(spec, x), one)


def test_dropout_draws_by_example():
    layer = nn.Dropout(0.4, rngs=nnx.Rngs(7))
    x = jnp.ones((8, 16))
    whole = layer(x, rngs=jax.random.key(0))
    with nn.examples(jnp.arange(1, 8, 2)):
        odd = layer(x[1::2], rngs=jax.random.key(0))
    np.testing.assert_array_equal(odd, whole[1::2])
    assert not np.array_equal(whole[0], whole[1])


def test_a_mask_that_differs_by_device_is_rejected():
    """The mutant: every device draws its own block from the same key."""
    layer = nn.Dropout(0.4, rngs=nnx.Rngs(7))
    whole = layer(jnp.ones((8, 16)), rngs=jax.random.key(0))
    blocks = jnp.concatenate([layer(jnp.ones((4, 16)), rngs=jax.random.key(0))] * 2)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(blocks, whole)


def test_dropout_keeps_the_mean_and_can_be_switched_off():
    x = jnp.ones((64, 1000))
    layer = nn.Dropout(0.25, rngs=nnx.Rngs(0))
    assert abs(float(layer(x).mean()) - 1) < 0.01
    layer.eval()
    assert layer(x) is x
    assert (nn.Dropout(1.0, rngs=nnx.Rngs(0))(x) == 0).all()


def test_rows_that_are_no_examples_do_not_count():
    x = jax.random.normal(jax.random.key(0), (4, 3, 3, 8), jnp.float64)
    layer = nn.BatchNorm(8, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    with nn.examples(jnp.arange(4), jnp.array([True, True, True, False])):
        y = layer(x)
    np.testing.assert_allclose(
        y[:3], nn.BatchNorm(8, param_dtype=jnp.float64, rngs=nnx.Rngs(0))(x[:3]), rtol=1e-12
    )


def test_a_mask_of_examples_alone_leaves_rows_that_are_none():
    """Rows of padding have statistics of their own, since those of nothing are NaN; real ones have nnx's."""
    x = jax.random.normal(jax.random.key(0), (4, 3, 3, 8))
    mask = jnp.array([True, False, True, False]).reshape(4, 1, 1, 1)
    for ours, theirs in ((nn.LayerNorm, nnx.LayerNorm), (nn.InstanceNorm, nnx.InstanceNorm)):
        expected = theirs(8, rngs=nnx.Rngs(0))(x, mask=mask)
        with nn.examples(jnp.arange(4), jnp.array([True, True, True, False])):
            found = ours(8, rngs=nnx.Rngs(0))(x, mask=mask)
        np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-5, atol=1e-5)
        assert np.isnan(found[1]).all()
        assert np.isfinite(found[3]).all()


@pytest.mark.parametrize("spec", ["data=1", "data=2,height=2"])
def test_a_mask_updates_the_running_statistics_as_in_nnx(spec):
    x = jax.random.normal(jax.random.key(0), (4, 7, 6, 8), jnp.float64)
    mask = (jnp.arange(7) % 3 > 0).reshape(1, 7, 1, 1)
    ours, theirs = (x64(library.BatchNorm(8, momentum=0.5, rngs=nnx.Rngs(0))) for library in (nn, nnx))
    with jax.set_mesh(make_mesh(spec)):
        found = nnx.jit(lambda layer, x: layer(x, mask=mask))(ours, x)
    np.testing.assert_allclose(found, theirs(x, mask=mask), rtol=1e-9)
    np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=1e-9)


def test_sums_over_microbatches_have_no_masks_and_no_second_pass():
    layer = nn.BatchNorm(8, rngs=nnx.Rngs(0))
    with nn.examples(jnp.arange(4), summing=True), pytest.raises(UserError, match="statistics='microbatch'"):
        layer(jnp.ones((4, 3, 8)), mask=jnp.ones((4, 1, 1), bool))
    layer = nn.BatchNorm(8, use_fast_variance=False, rngs=nnx.Rngs(0))
    with (
        nn.examples(jnp.arange(4), summing=True),
        pytest.raises(UserError, match="use_fast_variance=False, but"),
    ):
        layer(jnp.ones((4, 3, 8)))


def test_features_that_do_not_agree_are_refused():
    layer = nn.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0))
    with pytest.raises(
        UserError, match=r"maps features \(2, 3\) in the dimensions \(-2, -1\), .* \(5, 3, 2\)"
    ):
        layer(jnp.ones((5, 3, 2)))


def test_where_the_kernels_of_several_dimensions_are_cut():
    mesh = make_mesh("data=4,channel=2")
    heads = nn.LinearGeneral(8, (4, 3), rngs=nnx.Rngs(0))
    joined = nn.LinearGeneral((4, 6), 8, axis=(-2, -1), rngs=nnx.Rngs(0))
    odd = nn.LinearGeneral(8, (3, 4), rngs=nnx.Rngs(0))
    assert heads.parameter_specs(mesh) == {"kernel": P(None, "channel", None), "bias": P("channel", None)}
    assert joined.parameter_specs(mesh) == {"kernel": P("channel", None, None), "bias": P("channel")}
    assert odd.parameter_specs(mesh) == {"kernel": P(None, None, None), "bias": P(None, None)}
    assert [list(layer.undivided(mesh)) for layer in (heads, joined)] == [[], []]
    (said,) = odd.undivided(mesh)
    assert "'{layers}', 3, does not divide by channel=2: each device keeps the whole kernel" in said
    (said,) = nn.LinearGeneral(5, (3, 3), rngs=nnx.Rngs(0)).undivided(mesh)
    assert "channels do not divide by channel=2" in said


def test_what_stays_whole_is_said(caplog):
    mesh = make_mesh("data=4,channel=2")
    rngs = nnx.Rngs(0)

    class Block(nnx.Module):
        def __init__(self):
            self.conv = nn.Conv(8, 8, (3, 3), rngs=rngs)
            self.gamma = nnx.Param(jnp.ones(8))
            self.tables = nnx.List([nnx.Param(jnp.ones((1, 512, 512), jnp.float32))])  # 1 MiB
            self.einsum = nn.Einsum("nhwa,ab->nhwb", (8, 8), rngs=rngs)

    nn.assign(Block(), mesh, Layout(), {})
    assert (
        "whole on each of the channel=2 devices: gamma (64 bytes), tables.0 (1,048,576 bytes)" in caplog.text
    )
    assert "the kernel of 'einsum', an Einsum, is not cut by channel=2" in caplog.text
    with pytest.raises(UserError, match=r"a plain LinearGeneral, .* use shardtrain.nn.LinearGeneral"):
        nn.assign(nnx.Sequential(nnx.LinearGeneral(8, 8, rngs=rngs)), mesh, Layout(), {})


def test_a_large_parameter_is_refused_by_its_own_name():
    mesh = make_mesh("data=4,channel=2")

    class Tokens(nnx.Module):
        def __init__(self, width, rows):
            self.conv = nn.Conv(3, width, (16, 16), rngs=nnx.Rngs(0))
            self.positions = nnx.Param(jnp.ones((1, rows, 512), jnp.float32))

    blocks = nnx.eval_shape(lambda: nnx.Sequential(Tokens(8, 513)))
    with pytest.raises(
        UserError,
        match=r"the parameter 'layers.0.positions' of shape \(1, 513, 512\), 1.0 MiB, .* on each of the "
        r"channel=2 devices, which only parameters of at most 1.0 MiB are; let a layer of shardtrain.nn hold it",
    ):
        nn.assign(blocks, mesh, Layout(), {})
    large = nnx.eval_shape(lambda: Tokens(1024 * 64, 513))  # a hundredth of 192 MiB
    nn.assign(large, mesh, Layout(), {})


def test_rows_must_be_a_multiple_of_the_examples():
    layer = nn.Dropout(0.5, rngs=nnx.Rngs(0))
    with nn.examples(jnp.arange(4)):
        assert layer(jnp.ones((12, 3))).shape == (12, 3)
        with pytest.raises(UserError, match="6 rows for a batch of 4"):
            layer(jnp.ones((6, 3)))


def test_filters_that_cannot_be_cut_are_said(caplog):
    mesh = make_mesh("height=2,width=4")
    layer = nn.LocallyConnected(1, 4, (7, 8), 3, rngs=nnx.Rngs(0))
    nn.assign(layer, mesh, Layout(), {})
    assert layer.parameter_specs(mesh) == {
        "kernel": P(None, "width", None, None),
        "bias": P(None, "width", None),
    }
    (said,) = (r.getMessage() for r in caplog.records if "filters" in r.getMessage())
    assert "7 rows of height, which do not divide by height=2: each device keeps all" in said


def test_a_table_that_cannot_be_cut_is_said(caplog):
    mesh = make_mesh("channel=8")
    nn.assign(
        nnx.Sequential(nn.Embed(1001, 8, rngs=nnx.Rngs(0)), nn.Linear(8, 8, rngs=nnx.Rngs(0))),
        mesh,
        Layout(),
        {},
    )
    assert "1001 rows of 'layers.0' do not divide by channel=8: each device keeps all" in caplog.text


def test_layers_that_compute_all_channels_are_said_once(caplog):
    mesh = make_mesh("data=4,channel=2")
    layers = [nn.Linear(n, m, rngs=nnx.Rngs(0)) for n, m in ((8, 5), (5, 5), (5, 5))]
    model = nnx.Sequential(*layers)
    nn.assign(model, mesh, Layout(), {})
    assert [list(layer.undivided(mesh)) for layer in layers[:1]] == [[]]  # its inputs divide
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == (
        "channels do not divide by channel=2 in layers.1, layers.2: there every device computes all of them"
    )
