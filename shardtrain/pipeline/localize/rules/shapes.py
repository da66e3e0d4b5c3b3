"""Operations that rearrange elements: reshaping, slices, and those that run along some dimensions only."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax import lax

from shardtrain import jaxprs
from shardtrain.layout import Axes
from shardtrain.pipeline.localize.block import Block, block_shape, finest


def broadcast_in_dim(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    x, shape, dims = blocks[0], equation.params["shape"], equation.params["broadcast_dimensions"]
    x = x.whole_on([d for d, target in enumerate(dims) if x.shape[d] != shape[target]])
    cut: list[Axes] = [()] * len(shape)
    for source, target in enumerate(dims):
        cut[target] = x.cut[source]
    mine = block_shape(shape, tuple(cut), x.sizes)
    return [replace(x, value=lax.broadcast_in_dim(x.value, mine, dims), shape=shape, cut=tuple(cut))]


def reshape(equation: Any, blocks: Sequence[Block]) -> list[Block] | None:
    """Reshapes; a dimension stays cut if the blocks of a new one at the same place in memory are the same."""
    x, shape = blocks[0], equation.params["new_sizes"]
    if equation.params["dimensions"] is not None:
        return None
    starts = [math.prod(shape[:d]) for d in range(len(shape))]
    cut: list[Axes] = [()] * len(shape)
    for dim, axes in enumerate(x.cut):
        here = [d for d, n in enumerate(starts) if n == math.prod(x.shape[:dim]) and 0 not in shape]
        fits = [
            d for d in here if shape[d] == x.shape[dim] or not (x.uneven(dim) or shape[d] % x.shards(dim))
        ]
        if fits and shape[fits[-1]] > 1:
            cut[fits[-1]] = axes
        else:
            x = x.whole_on([dim])
    mine = block_shape(shape, tuple(cut), x.sizes)
    return [replace(x, value=lax.reshape(x.value, mine), shape=shape, cut=tuple(cut))]


def transpose(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    x, order = blocks[0], equation.params["permutation"]
    value = lax.transpose(x.value, order)
    return [
        replace(x, value=value, shape=tuple(x.shape[d] for d in order), cut=tuple(x.cut[d] for d in order))
    ]


def squeeze(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    dims = {d % len(blocks[0].shape) for d in equation.params["dimensions"]}
    x = blocks[0].whole_on(dims)
    left = [d for d in range(len(x.shape)) if d not in dims]
    value = lax.squeeze(x.value, tuple(dims))
    return [replace(x, value=value, shape=tuple(x.shape[d] for d in left), cut=tuple(x.cut[d] for d in left))]


def slice_(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Slices; a dimension stays cut if the elements stay in the same blocks, with more padding."""
    p, x = equation.params, blocks[0]
    starts, limits, shape = list(p["start_indices"]), list(p["limit_indices"]), equation.outvars[0].aval.shape
    strides = p["strides"] or (1,) * len(starts)
    for d in range(len(shape)):
        if starts[d] or strides[d] != 1 or -(-shape[d] // x.shards(d)) != x.value.shape[d]:
            x = x.whole_on([d])
        if x.cut[d]:
            limits[d] = x.value.shape[d]
    return [replace(x, value=lax.slice(x.value, starts, limits, strides), shape=shape)]


def pad(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Pads; a dimension stays cut if the new elements fit into the padding of the last blocks."""
    x, fill = blocks
    config, shape = list(equation.params["padding_config"]), equation.outvars[0].aval.shape
    for d, (low, _, inner) in enumerate(config):
        if x.cut[d] and config[d] != (0, 0, 0):
            if low == 0 and inner == 0 and -(-shape[d] // x.shards(d)) == x.value.shape[d]:
                x = x.filled(fill.value, [d])
                config[d] = (0, 0, 0)
            else:
                x = x.whole_on([d])
    return [replace(x, value=lax.pad(x.value, fill.value, config), shape=shape)]


def along(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Sorts, sums up or reverses along some dimensions, which must be whole; the others stay cut."""
    p = equation.params
    given = next(p[k] for k in ("dimensions", "dimension", "axis") if k in p)
    dims = [int(d) % len(blocks[0].shape) for d in np.atleast_1d(given)]
    rest = [b.whole_on(dims) for b in blocks]
    cut = finest(b.cut for b in rest)
    outs = jaxprs.rebind(equation, [b.moved(cut).value for b in rest])
    shapes = [v.aval.shape for v in equation.outvars]
    return [replace(rest[0], value=v, shape=s, cut=cut) for v, s in zip(outs, shapes, strict=True)]


def stack(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    cut, axis = finest(b.cut for b in blocks), equation.params["axis"]
    (value,) = jaxprs.rebind(equation, [b.moved(cut).value for b in blocks])
    shape = equation.outvars[0].aval.shape
    return [replace(blocks[0], value=value, shape=shape, cut=(*cut[:axis], (), *cut[axis:]))]


def unstack(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    axis = equation.params["axis"]
    x = blocks[0].whole_on([axis])
    shape, cut = equation.outvars[0].aval.shape, (*x.cut[:axis], *x.cut[axis + 1 :])
    return [replace(x, value=v, shape=shape, cut=cut) for v in jaxprs.rebind(equation, [x.value])]


def tile(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    x = blocks[0].whole_on([d for d, n in enumerate(equation.params["reps"]) if n != 1])
    (value,) = jaxprs.rebind(equation, [x.value])
    return [replace(x, value=value, shape=equation.outvars[0].aval.shape)]


_ALONG = (
    "concatenate",
    "cumlogsumexp",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "rev",
    "sort",
    "split",
    "top_k",
)

RULES = {
    "broadcast_in_dim": broadcast_in_dim,
    "pad": pad,
    "reshape": reshape,
    "slice": slice_,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
    "unstack": unstack,
    **dict.fromkeys(_ALONG, along),
}
