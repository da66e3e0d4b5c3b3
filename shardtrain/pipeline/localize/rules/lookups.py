"""Operations that read and write at places which are computed: embeddings, labels, buffers of loops."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from shardtrain import jaxprs
from shardtrain.layout import Axes
from shardtrain.pipeline.localize.block import Block, finest


def dynamic_slice(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    x, *starts = blocks
    sizes = equation.params["slice_sizes"]
    x = x.whole_on([d for d, n in enumerate(sizes) if n != x.shape[d]])
    mine = [x.value.shape[d] if n == x.shape[d] else n for d, n in enumerate(sizes)]
    return [replace(x, value=lax.dynamic_slice(x.value, [s.value for s in starts], mine), shape=tuple(sizes))]


def dynamic_update_slice(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    x, update, *starts = blocks
    part = [d for d in range(len(x.shape)) if x.shape[d] != update.shape[d]]
    cut = finest([x.whole_on(part).cut, update.whole_on(part).cut])
    x, update = x.moved(cut), update.moved(cut)
    return [replace(x, value=lax.dynamic_update_slice(x.value, update.value, [s.value for s in starts]))]


def gather(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """Cut along indices, along what every index has a row of its own for, and along what is read whole.

    Of numbers also along what indices point at: each device reads what it has, and all of that is summed.
    """
    x, index = blocks
    p, shape = equation.params, equation.outvars[0].aval.shape
    dims = p["dimension_numbers"]
    window = [
        d for d in range(len(x.shape)) if d not in (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    ]
    own = dict(zip(dims.start_indices_batching_dims, dims.operand_batching_dims, strict=True))
    free = [d for d in window if p["slice_sizes"][d] == x.shape[d] and d not in dims.start_index_map]

    cut_index = [*index.cut[:-1], ()]
    for i, o in own.items():
        taken = {axis for j, axes in enumerate(cut_index) if j != i for axis in axes}
        if len(x.cut[o]) > len(cut_index[i]) and not taken & set(x.cut[o]):
            cut_index[i] = x.cut[o]
    taken = {axis for axes in cut_index for axis in axes}
    numbers = jnp.issubdtype(x.value.dtype, jnp.number)
    picked = [d for d in dims.collapsed_slice_dims if d in dims.start_index_map and numbers]
    cut_x: list[Axes] = [
        x.cut[d] if d in (*free, *picked) and not taken & set(x.cut[d]) else () for d in range(len(x.shape))
    ]
    for i, o in own.items():
        cut_x[o] = cut_index[i]
    x, index = x.moved(tuple(cut_x)), index.moved(tuple(cut_index))

    sizes = tuple(x.value.shape[d] if d in free else n for d, n in enumerate(p["slice_sizes"]))
    places, here, over = _own_places(equation, x, index, picked)
    (value,) = jaxprs.rebind(equation, [x.value, places], slice_sizes=sizes)
    if over:
        value = lax.psum(jnp.where(jnp.expand_dims(here, dims.offset_dims), value, 0), over)
    rows, columns = iter(cut_index), iter(cut_x[d] for d in window)
    cut = tuple(next(columns if d in dims.offset_dims else rows) for d in range(len(shape)))
    return [replace(x, value=value, shape=shape, cut=cut)]


def _own_places(equation: Any, x: Block, index: Block, picked: Sequence[int]) -> tuple[Array, Any, Axes]:
    """Indices of a `gather` into a device's own block, which of them point into it, and the axes that cut it.

    An index out of all bounds stays so, and is the first device's.
    """
    places, here = index.value, jnp.bool_(True)
    over: Axes = ()
    order, mode = equation.params["dimension_numbers"].start_index_map, equation.params["mode"]
    for d in picked:
        if x.cut[d]:
            k, rows, number = order.index(d), x.value.shape[d], lax.axis_index(x.cut[d])
            place = places[..., k]
            if mode != lax.GatherScatterMode.FILL_OR_DROP:
                place = jnp.clip(place, 0, x.shape[d] - 1)
            mine = place - (number * rows).astype(place.dtype)
            inside = (place >= 0) & (place < x.shape[d])
            here &= jnp.where(inside, (mine >= 0) & (mine < rows), number == 0)
            places, over = places.at[..., k].set(jnp.where(here, mine, 0)), (*over, *x.cut[d])
    return places, here, over


def scatter(equation: Any, blocks: Sequence[Block]) -> list[Block]:
    """As `gather`. Where several devices add into the same rows, all that they add is summed."""
    x, index, update = blocks
    dims = equation.params["dimension_numbers"]
    adds = equation.primitive.name in ("scatter-add", "scatter_add")
    own = dict(zip(dims.scatter_indices_batching_dims, dims.operand_batching_dims, strict=True))
    window = [
        d for d in range(len(x.shape)) if d not in (*dims.inserted_window_dims, *dims.operand_batching_dims)
    ]
    of_window = dict(zip(dims.update_window_dims, window, strict=True))
    rows = [
        d for d in range(len(update.shape)) if d not in of_window
    ]  # the dimension of each of the indices'

    cut: list[Axes] = [()] * len(x.shape)  # of the result
    cut_update: list[Axes] = [()] * len(update.shape)
    taken: set[str] = set()
    for i, d in enumerate(rows):
        choices = [update.cut[d], index.cut[i], x.cut[own[i]] if i in own else ()]
        axes = next((c for c in choices if c and not taken & set(c)), ()) if adds or i in own else ()
        cut_update[d] = axes
        taken |= set(axes)
        if i in own:
            cut[own[i]] = axes
    for d, o in of_window.items():
        if update.shape[d] == x.shape[o] and o not in dims.scatter_dims_to_operand_dims:
            axes = next((c for c in (update.cut[d], x.cut[o]) if c and not taken & set(c)), ())
            cut_update[d] = cut[o] = axes
            taken |= set(axes)

    shared = [d for i, d in enumerate(rows) if i not in own]
    over = tuple(axis for d in shared for axis in cut_update[d])
    x, update = x.moved(tuple(cut)), update.moved(tuple(cut_update)).filled(0, shared)
    index = index.moved((*(cut_update[d] for d in rows), ())).filled(0, [rows.index(d) for d in shared])
    # What is added to counts once; the sum comes last, where it can be put off.
    into = jnp.where(lax.axis_index(over) == 0, x.value, jnp.zeros_like(x.value)) if over else x.value
    (value,) = jaxprs.rebind(equation, [into, index.value, update.value])
    return [replace(x, value=lax.psum(value, over) if over else value)]


RULES = {
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter_add", "scatter-max", "scatter-min", "scatter-mul"), scatter
    ),
}
