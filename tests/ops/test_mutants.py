"""Operators made wrong on purpose: the comparisons of the other files must notice each one."""

import dataclasses
import functools
import importlib
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from shardtrain import Layout, ops
from shardtrain.ops import example_norm, halo, island, norm, pool
from shardtrain.ops.window import Reach, Window

from .parity import numbers, on_stages, parity, reference_conv
from .test_locally_connected import Case as Local
from .test_locally_connected import test_filters_stay_with_their_pixels as filters_stay
from .test_norm import affine_args, flax_norm, mask_parity, statistics_parity
from .test_transpose import Case as Transposed
from .test_window import halos_are_minimal, rows_arrive


@pytest.fixture(autouse=True)
def fresh_caches():
    """What was traced before a change, or with it, must not serve the other tests."""
    jax.clear_caches()
    yield
    jax.clear_caches()


# --- what is compared -------------------------------------------------------------------------------------


def conv_parity(mesh="height=2,width=2", size=(3, 3), **options):
    args = [numbers(4, 8, 8, 4), numbers(*size, 4, 8), numbers(8)]
    parity(functools.partial(ops.conv, **options), reference_conv(1, "SAME"), args, mesh)


def stage_parity():
    args = [numbers(2, 2, 8, 4, 2), numbers(2, 3, 3, 2, 2)]
    parity(on_stages(ops.conv), jax.vmap(reference_conv(1, "SAME")), args, "pipe=2,height=4")


def pool_parity(x):
    options = {"strides": (1, 1), "padding": "SAME"}
    op, reference = (lambda x, f=f: f(x, (3, 1), **options) for f in (ops.max_pool, nnx.max_pool))
    parity(op, reference, [x], "height=4")


def case_parity(mesh, case):
    parity(case.op, case.reference, case.args(), mesh)


def dual_parity():
    parity(ops.conv, reference_conv(1, "SAME"), [numbers(2, 8, 3, 4), numbers(3, 3, 4, 2)], "height=4")


def ring_parity():
    args = [numbers(2, 8, 3, 2), numbers(7, 1, 2, 2)]
    parity(functools.partial(ops.conv, padding="CIRCULAR"), reference_conv(1, "CIRCULAR"), args, "height=4")


def straddling_parity():
    args = [numbers(2, 5, 6), numbers(3, 2, 6)]
    parity(functools.partial(ops.conv, groups=3), reference_conv(1, "SAME", groups=3), args, "channel=2")


def axes_order_parity():
    layout = Layout(height=("width", "height"), width=())
    args = [numbers(2, 8, 3, 2), numbers(3, 3, 2, 2)]
    parity(functools.partial(ops.conv, layout=layout), reference_conv(1, "SAME"), args, "height=2,width=4")


def groups_parity():
    args = [numbers(2, 3, 8), numbers(1, 4, 8)]
    parity(functools.partial(ops.conv, groups=2), reference_conv(1, "SAME", groups=2), args, "channel=4")


def group_norm_parity():
    reference = flax_norm(nnx.GroupNorm, 12, True, num_groups=2)  # 3 channels a device
    args = affine_args((2, 3, 12), True)
    parity(lambda x, s, b: ops.group_norm(x, 2, s, b), reference, args, "channel=4")


NORM = functools.partial(statistics_parity, shape=(4, 7, 4, 3), affine=True, real=None)


# --- how they are made wrong ------------------------------------------------------------------------------


def late_halos(patch, which="_neighbours"):
    """Halos begin one row too deep in the neighbour."""
    right = getattr(halo, which)
    patch.setattr(halo, which, lambda x, dim, w, fill: right(jnp.roll(x, 1, dim), dim, w, fill))


def halos_swapped(patch):
    """What comes from below is put above: nothing else than the order is wrong."""
    right = halo._neighbours

    def wrong(x, dim, window, fill):
        low, high = right(x, dim, window, fill)
        return high, low

    patch.setattr(halo, "_neighbours", wrong)


def no_corners(patch):
    """The second dimension is exchanged as if the first had brought no halo."""
    conv = importlib.import_module("shardtrain.ops.conv")  # the package's `conv` is the function
    right = conv.exchange

    def wrong(x, dim, window, **options):
        y = right(x, dim, window, **options)
        return y if dim == 1 else y.at[:, ::9, ::5].set(0)  # 8 + 2 halo rows over 2 shards: 6 by 6

    patch.setattr(conv, "exchange", wrong)


def nearest_hop_only(patch):
    right = halo._neighbours

    def wrong(x, dim, window, fill):
        low, high = right(x, dim, window, fill)
        far = jnp.zeros_like
        return [*map(far, low[:-1]), *low[-1:]], [*high[:1], *map(far, high[1:])]

    patch.setattr(halo, "_neighbours", wrong)


def gradient_of_one_shard(patch, axes=("data", "height"), lost="height"):
    """The kernel's gradient is summed over `data`, but of the height shards only the first counts."""

    @jax.custom_vjp
    def whole(kernel):
        return lax.pcast(kernel, axes, to="varying")

    def backward(_, gradient):
        return (lax.psum(jnp.where(lax.axis_index(lost) == 0, gradient, 0), axes),)

    whole.defvjp(lambda kernel: (whole(kernel), None), backward)
    patch.setattr(island, "gather", lambda parameter, *_: whole(parameter))


def mean_of_gradients(patch):
    """The spread kernel's gradient is a mean over the shards, as of a loss that is a mean already."""
    right = island.gather

    def wrong(*args):
        y = right(*args)
        return y / 2 + lax.stop_gradient(y / 2)

    patch.setattr(island, "gather", wrong)


def scatter_without_sum(patch):
    def wrong(y, axes, *, scatter_dimension, tiled):
        block = y.shape[scatter_dimension] // lax.axis_size(axes)
        return lax.dynamic_slice_in_dim(y, lax.axis_index(axes) * block, block, scatter_dimension)

    patch.setattr(lax, "psum_scatter", wrong)


def gather_in_another_order(patch):
    right = lax.all_gather

    def wrong(x, axes, *, axis, **options):
        return jnp.roll(right(x, axes, axis=axis, **options), x.shape[axis], axis)

    patch.setattr(lax, "all_gather", wrong)


def statistics_per_device(patch):
    def unchecked(local, mesh, in_specs, out_specs, *args):
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    patch.setattr(island, "run", unchecked)  # jax's own check of varying axes would notice it as well
    patch.setattr(norm._Sums, "over_devices", lambda self, x: x * lax.axis_size(self.axes))


SPACE = "height=2,channel=2"


def counts_per_device(patch):
    """Each device divides by the number of values that count in its own block, times the devices."""
    right = norm._Sums.over_devices

    def wrong(sums, x):
        total = right(sums, x)
        return total.at[-1].set(x[-1] * lax.axis_size(sums.axes)) if x.ndim == 2 and len(x) == 3 else total

    unchecked = lambda local, mesh, in_specs, out_specs, *args: jax.shard_map(  # noqa: E731
        local, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*args)
    patch.setattr(island, "run", unchecked)
    patch.setattr(norm._Sums, "over_devices", wrong)


def masked_rows_count(patch):
    """The mask is there in the number of values alone: what is summed are all."""
    where = SimpleNamespace(**{**vars(jnp), "where": lambda mask, x, other: x})
    patch.setattr(example_norm, "jnp", where)


def second_pass_per_device(patch):
    """The mean is that of all devices; squares of deviations from it are not summed over them."""
    right, calls = example_norm._ExampleNorm._over_devices, itertools.count()

    def wrong(plan, sums):
        return 2 * sums if next(calls) % 2 else right(plan, sums)

    patch.setattr(example_norm._ExampleNorm, "_over_devices", wrong)


def padded_rows_count(patch):
    """Rows of padding are examples like all others."""
    right = island.pad_to

    def wrong(x, extents):
        ones = [(0, to - have) for to, have in zip(extents, x.shape, strict=True)]
        return jnp.pad(x, ones, constant_values=1) if x.shape[-1] == 1 else right(x, extents)

    patch.setattr(island, "pad_to", wrong)
    patch.setattr(island, "mask_padding", lambda x, *_: x)


def frozen_statistics(patch):
    """The gradient as if mean and variance were constants."""

    def wrong(sums, saved, cotangents):
        normal, inverse, scale, _, _ = saved
        dy = cotangents[0]
        dbias, dscale = sums.over_devices(jnp.stack([dy.sum(sums.dims), (dy * normal).sum(sums.dims)]))
        return scale * inverse * dy, dscale, dbias, None

    right = norm._normalize_forward
    normalize = jax.custom_vjp(lambda *args: right(*args)[0], nondiff_argnums=(0,))
    normalize.defvjp(right, wrong)
    patch.setattr(norm, "_normalize", normalize)


def padding_of_zero(patch):
    right = pool.exchange

    def wrong(x, dim, window, *, fill, grouped):
        return right(x, dim, window, fill=0.0, grouped=grouped)

    patch.setattr(pool, "exchange", wrong)


def gradient_to_all_ties(patch):
    def wrong(x, fill, combine, size, strides, padding):
        shifted = [x[:, i : x.shape[1] - size[1] + 1 + i] for i in range(size[1])]
        return jnp.stack(shifted).max(0)

    patch.setattr(pool, "lax", SimpleNamespace(**{**vars(lax), "reduce_window": wrong}))


def ring_one_hop_too_few(patch):
    """Either way round, rows from farther than the next shard never come."""
    right = halo._received

    def wrong(x, dim, part, axes, grouped):
        n = len(part.senders)
        near = [(i - sender) % n in (1, n - 1) for i, sender in enumerate(part.senders)]
        rows = right(x, dim, part, axes, grouped)
        return jnp.where(jnp.asarray(near)[lax.axis_index(axes)], rows, 0)

    patch.setattr(halo, "_received", wrong)


def groups_one_device_on(patch):
    """The devices that share a group are taken to begin one device too late."""
    right = lax.all_gather

    def wrong(x, axes, *, axis_index_groups=None, **options):
        if axis_index_groups is not None:
            n = max(map(max, axis_index_groups)) + 1
            axis_index_groups = [[(device + 1) % n for device in group] for group in axis_index_groups]
        return right(x, axes, axis_index_groups=axis_index_groups, **options)

    patch.setattr(lax, "all_gather", wrong)


def groups_one_channel_on(patch):
    """A device counts the channels of its groups from one too many."""
    count = SimpleNamespace(**{**vars(jnp), "arange": lambda n: jnp.arange(n) + int(n == 3)})
    patch.setattr(example_norm, "jnp", count)


def duals_shifted(patch):
    """The input's gradient is taken from the output's one row on."""
    module = importlib.import_module("shardtrain.ops.conv")
    right = module._duals

    def wrong(*args):
        return [dataclasses.replace(w, pad=(w.pad[0] - 1, w.pad[1] + 1)) for w in right(*args)]

    patch.setattr(module, "_duals", wrong)


def permutes_in_mesh_order(patch):
    """As jax 0.10 numbers the devices of a permute, whatever the order of the axes."""

    def wrong(x, axes, pairs):
        names = tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a in axes)
        return lax.ppermute(x, names, pairs)

    patch.setattr(halo.compat, "ppermute", wrong)


def straddling_groups_shifted(patch):
    """Filters of groups on two devices are put one output channel too far."""
    module = importlib.import_module("shardtrain.ops.conv")
    right = module._among

    def wrong(kernel, starts, channels, axes):
        return right(
            kernel,
            tuple(s + 1 if s + 1 + kernel.shape[-1] <= channels else s for s in starts),
            channels,
            axes,
        )

    patch.setattr(module, "_among", wrong)


def straddling_groups_late(patch):
    """They take the input channels of the next group."""
    module = importlib.import_module("shardtrain.ops.conv")
    right = module.straddle

    def wrong(groups, shards, channels_in, channels_out):
        found = right(groups, shards, channels_in, channels_out)
        return dataclasses.replace(found, inputs=(found.inputs[0],) * shards)

    patch.setattr(module, "straddle", wrong)


def transposed_padding_shifted(patch):
    module = importlib.import_module("shardtrain.ops.transpose")
    right = module.transposed_pads
    patch.setattr(module, "transposed_pads", lambda *args: [(a + 1, b - 1) for a, b in right(*args)])


def border_gradient_twice(patch):
    """What a shard's first row gets back is added to by the neighbour, which had it all already."""
    right = pool.exchange

    def wrong(x, dim, window, **options):
        row = lax.broadcasted_iota(int, x.shape, dim)
        border = (row == 0) & (lax.axis_index(window.axes) > 0)
        return right(jnp.where(border, 2 * x - lax.stop_gradient(x), x), dim, window, **options)

    patch.setattr(pool, "exchange", wrong)


def filters_reduced_over_space(patch, axes=("data", "height")):
    """The gradient of filters is summed as a convolution's is, though every pixel has its own."""

    @jax.custom_vjp
    def summed(kernel):
        return lax.pcast(kernel, ("data",), to="varying")

    def backward(_, gradient):
        return (lax.pcast(lax.psum(gradient, axes), ("height",), to="varying"),)

    summed.defvjp(lambda kernel: (summed(kernel), None), backward)
    patch.setattr(island, "gather", lambda parameter, kept, layout, vary, space: summed(parameter))


TIES = np.random.default_rng(0).integers(0, 2, (2, 8, 3, 4)).astype(float)

MUTANTS = {
    "halo off by one": (late_halos, conv_parity),
    "halos swapped": (halos_swapped, conv_parity),
    "grouped halo off by one": (functools.partial(late_halos, which="_grouped"), stage_parity),
    "corners missing": (no_corners, conv_parity),
    "second hop dropped": (nearest_hop_only, functools.partial(conv_parity, "height=8", (5, 1))),
    "kernel gradient not summed over height": (
        gradient_of_one_shard,
        functools.partial(conv_parity, "data=2,height=4"),
    ),
    "mean of spread gradients": (
        mean_of_gradients,
        functools.partial(conv_parity, "data=2,height=4", layout=Layout(parameters=("data",))),
    ),
    "scatter without sum": (
        scatter_without_sum,
        functools.partial(conv_parity, "height=2,channel=2", channel_mode="scatter"),
    ),
    "channels gathered in another order": (
        gather_in_another_order,
        functools.partial(conv_parity, "height=2,channel=2", channel_mode="gather"),
    ),
    "a mask counts per device": (counts_per_device, functools.partial(mask_parity, "batch", "values", SPACE)),
    "statistics of masked rows": (
        masked_rows_count,
        functools.partial(mask_parity, "group", "values", SPACE),
    ),
    "second pass per device": (
        second_pass_per_device,
        functools.partial(mask_parity, "layer", None, SPACE, two_passes=True),
    ),
    "statistics per device": (statistics_per_device, functools.partial(NORM, "data=2,height=4")),
    "padded rows count": (padded_rows_count, functools.partial(NORM, "data=2,height=4")),
    "statistics without gradient": (frozen_statistics, functools.partial(NORM, "data=2,height=4")),
    "padding of zero wins": (padding_of_zero, functools.partial(pool_parity, numbers(2, 8, 3, 4) - 9)),
    "gradient to all equal values": (gradient_to_all_ties, functools.partial(pool_parity, TIES)),
    "one hop too few to filters of their own": (
        nearest_hop_only,
        functools.partial(case_parity, "width=8", Local((2, 8, 2), (5,), 2)),
    ),
    "one hop too few around a ring": (ring_one_hop_too_few, ring_parity),
    "groups begin a device late": (groups_one_device_on, groups_parity),
    "gradient from the rows of the next output": (
        duals_shifted,
        dual_parity,
    ),
    "a permute in the mesh's order": (permutes_in_mesh_order, axes_order_parity),
    "filters of straddling groups shifted": (straddling_groups_shifted, straddling_parity),
    "inputs of straddling groups of one device": (straddling_groups_late, straddling_parity),
    "groups begin a channel late": (groups_one_channel_on, group_norm_parity),
    "transposed padding shifted": (
        transposed_padding_shifted,
        functools.partial(case_parity, "height=4", Transposed((2, 8, 3, 2), (3, 3), 2, strides=2)),
    ),
    "gradient of a border row twice": (
        border_gradient_twice,
        functools.partial(pool_parity, numbers(2, 8, 3, 4)),
    ),
    "filters summed over pixels": (
        filters_reduced_over_space,
        functools.partial(case_parity, "data=2,height=4", Local((2, 8, 3, 2), (3, 1), 2)),
    ),
}


RIGHT = {name: compare for name, (_, compare) in MUTANTS.items() if compare is not conv_parity}


@pytest.mark.slow  # what the other files assert anyway
@pytest.mark.parametrize("compare", [conv_parity, *RIGHT.values()], ids=["halos", *RIGHT])
def test_the_right_operator_passes(compare):
    compare()


@pytest.mark.parametrize(("mutate", "compare"), MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_operator_is_noticed(monkeypatch, mutate, compare):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"gradient|value"):
        compare()


def test_sums_over_pixels_are_noticed_in_bytes(monkeypatch):
    filters_reduced_over_space(monkeypatch)
    with pytest.raises(AssertionError, match="all-reduce"):
        filters_stay(3, 1)


@pytest.mark.parametrize(
    ("attribute", "change", "check"),
    [
        ("offsets", lambda right: lambda w: tuple(o + 1 for o in right(w)), rows_arrive),
        ("halo", lambda right: lambda w: (right(w)[0], max(0, right(w)[1] - 1)), rows_arrive),
        ("halo", lambda right: lambda w: (right(w)[0], right(w)[1] + 1), halos_are_minimal),
        ("offsets", lambda right: lambda w: right(w)[:1] * w.shards, rows_arrive),
    ],
    ids=["late start", "halo too short", "halo too long", "blocks do not drift"],
)
def test_wrong_arithmetic_is_noticed(monkeypatch, attribute, change, check):
    window = 13, 5, 3, (2, 2), 4
    check(Window(*window))
    right = vars(Reach)[attribute].func
    monkeypatch.setattr(Reach, attribute, property(change(right)))
    with pytest.raises(AssertionError):
        check(Window(*window))
