"""Operators made wrong on purpose: the comparisons of the other files must notice each one."""

import functools
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from shardtrain import Layout, ops
from shardtrain.ops import halo, island, norm, pool
from shardtrain.ops.window import Window

from .parity import numbers, parity, reference_conv
from .test_conv import on_stages
from .test_norm import statistics_parity
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
    patch.setattr(island, "gather", lambda parameter, kept, layout, vary: whole(parameter))


def mean_of_gradients(patch):
    """The spread kernel's gradient is a mean over the shards, as of a loss that is a mean already."""
    right = island.gather

    def wrong(parameter, kept, layout, vary):
        y = right(parameter, kept, layout, vary)
        return y / 2 + lax.stop_gradient(y / 2)

    patch.setattr(island, "gather", wrong)


def scatter_without_sum(patch):
    def wrong(y, axes, *, scatter_dimension, tiled):
        block = y.shape[scatter_dimension] // lax.axis_size(axes)
        return lax.dynamic_slice_in_dim(y, lax.axis_index(axes) * block, block, scatter_dimension)

    patch.setattr(lax, "psum_scatter", wrong)


def gather_in_another_order(patch):
    right = lax.all_gather

    def wrong(x, axes, *, axis, tiled):
        return jnp.roll(right(x, axes, axis=axis, tiled=tiled), x.shape[axis], axis)

    patch.setattr(lax, "all_gather", wrong)


def statistics_per_device(patch):
    def unchecked(local, mesh, in_specs, out_specs, *args):
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    patch.setattr(island, "run", unchecked)  # jax's own check of varying axes would notice it as well
    patch.setattr(norm._Sums, "over_devices", lambda self, x: x * lax.axis_size(self.axes))


def padded_rows_count(patch):
    """Rows of padding are examples like all others."""
    right = island.pad_to

    def wrong(x, extents):
        ones = [(0, to - have) for to, have in zip(extents, x.shape, strict=True)]
        return jnp.pad(x, ones, constant_values=1) if x.shape[-1] == 1 else right(x, extents)

    patch.setattr(island, "pad_to", wrong)
    patch.setattr(island, "real", lambda x, *_: x)


def frozen_statistics(patch):
    """The gradient as if mean and variance were constants."""

    def wrong(sums, saved, cotangents):
        normal, inverse, scale, _, weight, _ = saved
        dy = cotangents[0]
        dbias, dscale = sums.over_devices(jnp.stack([dy.sum(sums.dims), (dy * normal).sum(sums.dims)]))
        return scale * inverse * dy, dscale, dbias, None if weight is None else jnp.zeros_like(weight)

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
    "statistics per device": (statistics_per_device, functools.partial(NORM, "data=2,height=4")),
    "padded rows count": (padded_rows_count, functools.partial(NORM, "data=2,height=4")),
    "statistics without gradient": (frozen_statistics, functools.partial(NORM, "data=2,height=4")),
    "padding of zero wins": (padding_of_zero, functools.partial(pool_parity, numbers(2, 8, 3, 4) - 9)),
    "gradient to all equal values": (gradient_to_all_ties, functools.partial(pool_parity, TIES)),
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


@pytest.mark.parametrize(
    ("attribute", "change", "check"),
    [
        ("first", lambda right: lambda w: right(w) + 1, rows_arrive),
        ("halo", lambda right: lambda w: (right(w)[0], max(0, right(w)[1] - 1)), rows_arrive),
        ("halo", lambda right: lambda w: (right(w)[0], right(w)[1] + 1), halos_are_minimal),
        ("drift", lambda right: lambda w: 0, rows_arrive),
    ],
    ids=["late start", "halo too short", "halo too long", "blocks do not drift"],
)
def test_wrong_arithmetic_is_noticed(monkeypatch, attribute, change, check):
    window = 13, 5, 3, (2, 2), 4
    check(Window(*window))
    descriptor = vars(Window)[attribute]
    right = descriptor.fget if isinstance(descriptor, property) else descriptor.func
    monkeypatch.setattr(Window, attribute, property(change(right)))
    with pytest.raises(AssertionError):
        check(Window(*window))
