"""Operations that join elements: reductions, products of matrices, convolutions, pooling."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from shardtrain import jaxprs
from shardtrain.layout import Axes
from shardtrain.pipeline.localize.block import Block, Cut, finest


def reduce(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    name, dims, x = equation.primitive.name, [int(d) for d in equation.params["axes"]], blocks[0]
    if any(x.uneven(d) for d in dims):
        x = x.filled(_neutral(name, x.value.dtype), dims)
    (value,) = jaxprs.rebind(equation, [x.value])
    if over := tuple(a for d in dims for a in x.cut[d]):
        place = name.startswith("arg")
        value = _place(equation, x, value, *dims) if place else _joined(equation, value, over)
    left = [d for d in range(len(x.shape)) if d not in dims]
    return [replace(x, value=value, shape=tuple(x.shape[d] for d in left), cut=tuple(x.cut[d] for d in left))]


def _joined(equation: Any, value: Array, over: Axes) -> Array:
    join = {"reduce_sum": lax.psum, "reduce_max": lax.pmax, "reduce_min": lax.pmin}.get(
        equation.primitive.name
    )
    if join and value.dtype != bool:
        return join(value, over)
    return jaxprs.rebind(equation, [lax.all_gather(value, over)], axes=(0,))[0]


def _place(equation: Any, x: Block, mine: Array, dim: int) -> Array:
    """Returns the index of the largest (or least) element along a cut dimension, from that of each block."""
    over, rows = x.cut[dim], x.value.shape[dim]
    best = jnp.take_along_axis(x.value, jnp.expand_dims(mine, dim), dim).squeeze(dim)
    places = lax.all_gather(mine + (lax.axis_index(over) * rows).astype(mine.dtype), over)
    (which,) = jaxprs.rebind(equation, [lax.all_gather(best, over)], axes=(0,))
    return jnp.take_along_axis(places, which[None], 0).squeeze(0)


def _neutral(name: str, dtype: Any) -> Any:
    if name in ("reduce_max", "reduce_min", "argmax", "argmin"):
        low = name in ("reduce_max", "argmax")
        if jnp.issubdtype(dtype, jnp.inexact):
            return -np.inf if low else np.inf
        return (
            not low
            if jnp.issubdtype(dtype, jnp.bool_)
            else jnp.iinfo(dtype).min
            if low
            else jnp.iinfo(dtype).max
        )
    if name == "reduce_and":
        return np.invert(np.zeros((), dtype))
    return 1 if name == "reduce_prod" else 0


def dot_general(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Multiplies the blocks; where a contracted dimension is cut, the products of all devices are summed."""
    a, b = blocks
    (contracted_a, contracted_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    a_cut, b_cut = _product_cuts(equation, a, b)
    a, b = a.moved(a_cut), b.moved(b_cut)
    values = [a.filled(0, contracted_a).value, b.filled(0, contracted_b).value]
    (value,) = jaxprs.rebind(equation, values)
    if over := tuple(axis for d in contracted_a for axis in a_cut[d]):
        value = lax.psum(value, over)
    free_a = [axes for d, axes in enumerate(a_cut) if d not in (*contracted_a, *batch_a)]
    free_b = [axes for d, axes in enumerate(b_cut) if d not in (*contracted_b, *batch_b)]
    cut = (*(a_cut[d] for d in batch_a), *free_a, *free_b)
    return [replace(a, value=value, shape=equation.outvars[0].aval.shape, cut=cut)]


def _product_cuts(equation: Any, a: Block, b: Block) -> tuple[Cut, Cut]:
    """Returns how the operands of a product are to be cut.

    Dimensions that are contracted or multiplied pairwise are cut the same way in both operands. A mesh axis
    cuts one dimension of the whole product; where the operands disagree, the larger one decides.
    """
    (contracted_a, contracted_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    partner = {
        (1, j): (0, i) for i, j in zip((*contracted_a, *batch_a), (*contracted_b, *batch_b), strict=True)
    }
    dimensions = [
        [partner.get((side, d), (side, d)) for d in range(len(x.shape))] for side, x in enumerate((a, b))
    ]
    cuts: dict[tuple[int, int], Axes] = {}
    taken: set[str] = set()
    for side in sorted([0, 1], key=lambda side: -(a, b)[side].value.size):
        for dimension, axes in zip(dimensions[side], (a, b)[side].cut, strict=True):
            if axes and not cuts.get(dimension) and not taken & set(axes):
                cuts[dimension] = axes
                taken |= set(axes)
    a_cut, b_cut = (tuple(cuts.get(dimension, ()) for dimension in row) for row in dimensions)
    return a_cut, b_cut


def convolution(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Convolves where examples are cut, or (in gradients of kernels) the dimension that is summed over.

    All other cuts are the business of `ops.conv`.
    """
    p = equation.params
    (na, ca, *_), (_, cb, *_), (no, *_) = p["dimension_numbers"]
    a, b = blocks
    examples = a.cut[na] if p["batch_group_count"] == 1 else ()
    summed = (a.cut[ca] or b.cut[cb]) if p["feature_group_count"] == 1 else ()
    summed = () if set(summed) & set(examples) else summed
    a = a.moved(tuple({na: examples, ca: summed}.get(d, ()) for d in range(len(a.shape))))
    b = b.moved(tuple(summed if d == cb else () for d in range(len(b.shape))))
    (value,) = jaxprs.rebind(equation, [a.filled(0, [ca]).value, b.filled(0, [cb]).value])
    value = lax.psum(value, summed) if summed else value
    cut = tuple(examples if d == no else () for d in range(len(a.shape)))
    return [replace(a, value=value, shape=equation.outvars[0].aval.shape, cut=cut)]


def windowed(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Pools, and computes gradients of pooling; dimensions stay cut along which a window is one element."""
    p = equation.params
    windows = [
        d
        for d in range(len(p["window_dimensions"]))
        if any(p[k][d] != 1 for k in _STEPS if p.get(k) is not None) or tuple(p["padding"][d]) != (0, 0)
    ]
    arrays = [b.whole_on(windows) for b in blocks]
    cut = finest(b.cut for b in arrays)
    (value,) = jaxprs.rebind(equation, [b.moved(cut).value for b in arrays])
    return [replace(arrays[0], value=value, shape=equation.outvars[0].aval.shape, cut=cut)]


_STEPS = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
_REDUCE = ("and", "max", "min", "or", "prod", "sum", "xor")
_WINDOWED = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")

RULES = {
    "argmax": reduce,
    "argmin": reduce,
    "conv_general_dilated": convolution,
    "dot_general": dot_general,
    "select_and_gather_add": windowed,
    "select_and_scatter_add": windowed,
    **dict.fromkeys([f"reduce_{name}" for name in _REDUCE], reduce),
    **dict.fromkeys(_WINDOWED, windowed),
}
