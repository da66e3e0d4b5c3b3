"""Operations that read and write at computed places: embeddings, labels, buffers of loops."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from shardtrain import jaxprs
from shardtrain.layout import Axes
from shardtrain.pipeline.localize.block import Block, Cut, finest


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
    """Reads rows of the operand at computed places.

    The result stays cut along the indices, along batching dimensions, and along dimensions that are read
    whole. If the elements are numbers, the operand may also stay cut along a dimension that the indices point
    into: each device then reads the rows that it has, and the results of all are summed.
    """
    x, index = blocks
    p, shape = equation.params, equation.outvars[0].aval.shape
    dims = _GatherDimensions.of(equation, x)
    index_cut = dims.index_cut(x, index)
    operand_cut = dims.operand_cut(x, index_cut)
    x, index = x.moved(operand_cut), index.moved(index_cut)

    sizes = tuple(x.value.shape[d] if d in dims.whole else n for d, n in enumerate(p["slice_sizes"]))
    places, here, over = _own_places(equation, x, index, dims.picked)
    (value,) = jaxprs.rebind(equation, [x.value, places], slice_sizes=sizes)
    offsets = p["dimension_numbers"].offset_dims
    if over:
        value = lax.psum(jnp.where(jnp.expand_dims(here, offsets), value, 0), over)
    rows, columns = iter(index_cut), iter(operand_cut[d] for d in dims.window)
    cut = tuple(next(columns if d in offsets else rows) for d in range(len(shape)))
    return [replace(x, value=value, shape=shape, cut=cut)]


@dataclass(frozen=True)
class _GatherDimensions:
    """What the dimensions of a gather's operand are for.

    Attributes:
        batching: for each batching dimension of the indices the dimension of the operand that goes with it.
        window: the dimensions of the operand that the result has, too.
        whole: those of them that are read whole, whatever the indices are.
        picked: the dimensions along which an index picks one row, if the elements are numbers.
    """

    batching: Mapping[int, int]
    window: tuple[int, ...]
    whole: frozenset[int]
    picked: tuple[int, ...]

    @classmethod
    def of(cls, equation: Any, x: Block) -> "_GatherDimensions":
        dims, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
        dropped = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
        window = tuple(d for d in range(len(x.shape)) if d not in dropped)
        indexed = set(dims.start_index_map)
        numbers = jnp.issubdtype(x.value.dtype, jnp.number)
        return cls(
            _pairs(dims.start_indices_batching_dims, dims.operand_batching_dims),
            window,
            frozenset(d for d in window if sizes[d] == x.shape[d] and d not in indexed),
            tuple(int(d) for d in dims.collapsed_slice_dims if d in indexed and numbers),
        )

    def index_cut(self, x: Block, index: Block) -> Cut:
        """How the indices are to be cut: as they are, or as the operand where that is finer."""
        cut: list[Axes] = [*index.cut[:-1], ()]
        for i, d in self.batching.items():
            others = {axis for j, axes in enumerate(cut) if j != i for axis in axes}
            if len(x.cut[d]) > len(cut[i]) and not others & set(x.cut[d]):
                cut[i] = x.cut[d]
        return tuple(cut)

    def operand_cut(self, x: Block, index_cut: Cut) -> Cut:
        """How the operand is to be cut, by axes that do not cut the indices."""
        taken = {axis for axes in index_cut for axis in axes}
        usable = {*self.whole, *self.picked}
        cut = [axes if d in usable and not taken & set(axes) else () for d, axes in enumerate(x.cut)]
        for i, d in self.batching.items():
            cut[d] = index_cut[i]
        return tuple(cut)


def _own_places(equation: Any, x: Block, index: Block, picked: Sequence[int]) -> tuple[Array, Any, Axes]:
    """Returns the indices of a gather into a device's own block of the operand.

    An index that is out of bounds stays so; the first device reads what it stands for.

    Returns:
        The indices, which of them this device is to read, and the mesh axes that cut what they point into.
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
    """Writes or adds rows at computed places.

    The result stays cut along the same dimensions as that of `gather`. Where the rows of an addition are cut,
    every device adds its own rows to zeros (one of them: to the operand), and the results of all are summed.
    """
    x, index, update = blocks
    dims = _ScatterDimensions.of(equation, x, update)
    cut, update_cut = dims.cuts(x, index, update)
    shared = [d for i, d in enumerate(dims.rows) if i not in dims.batching]
    over = tuple(axis for d in shared for axis in update_cut[d])
    x, update = x.moved(cut), update.moved(update_cut).filled(0, shared)
    index = index.moved((*(update_cut[d] for d in dims.rows), ()))
    index = index.filled(0, [dims.rows.index(d) for d in shared])
    # The operand must count once. The sum comes last, so that it can be put off until the end of the step.
    into = jnp.where(lax.axis_index(over) == 0, x.value, jnp.zeros_like(x.value)) if over else x.value
    (value,) = jaxprs.rebind(equation, [into, index.value, update.value])
    return [replace(x, value=lax.psum(value, over) if over else value)]


@dataclass(frozen=True)
class _ScatterDimensions:
    """What the dimensions of a scatter's operands are for.

    Attributes:
        batching: for each batching dimension of the indices the dimension of the operand that goes with it.
        rows: for each dimension of the indices that of the update that goes with it.
        window: for each other dimension of the update the dimension of the operand that it is written along.
        whole: those dimensions of the update that are written whole, whatever the indices are.
        adds: whether rows are added, so that every device may add its own.
    """

    batching: Mapping[int, int]
    rows: tuple[int, ...]
    window: Mapping[int, int]
    whole: frozenset[int]
    adds: bool

    @classmethod
    def of(cls, equation: Any, x: Block, update: Block) -> "_ScatterDimensions":
        dims = equation.params["dimension_numbers"]
        dropped = (*dims.inserted_window_dims, *dims.operand_batching_dims)
        kept = [d for d in range(len(x.shape)) if d not in dropped]
        window = _pairs(dims.update_window_dims, kept)
        indexed = set(dims.scatter_dims_to_operand_dims)
        return cls(
            _pairs(dims.scatter_indices_batching_dims, dims.operand_batching_dims),
            tuple(d for d in range(len(update.shape)) if d not in window),
            window,
            frozenset(d for d, o in window.items() if update.shape[d] == x.shape[o] and o not in indexed),
            equation.primitive.name in ("scatter-add", "scatter_add"),
        )

    def cuts(self, x: Block, index: Block, update: Block) -> tuple[Cut, Cut]:
        """How the operand and the update are to be cut; no axis cuts two dimensions of the result."""
        cut: list[Axes] = [()] * len(x.shape)
        update_cut: list[Axes] = [()] * len(update.shape)
        taken: set[str] = set()
        for i, d in enumerate(self.rows):
            along = self.batching.get(i)
            if self.adds or along is not None:
                candidates = [update.cut[d], index.cut[i], () if along is None else x.cut[along]]
                update_cut[d] = _first_free(candidates, taken)
            if along is not None:
                cut[along] = update_cut[d]
            taken |= set(update_cut[d])
        for d in sorted(self.whole):
            update_cut[d] = cut[self.window[d]] = _first_free([update.cut[d], x.cut[self.window[d]]], taken)
            taken |= set(update_cut[d])
        return tuple(cut), tuple(update_cut)


def _pairs(keys: Sequence[Any], values: Sequence[Any]) -> dict[int, int]:
    """Returns dimensions by dimensions, as ints of Python: jax may have those of numpy."""
    return dict(zip(map(int, keys), map(int, values), strict=True))


def _first_free(candidates: Sequence[Axes], taken: Collection[str]) -> Axes:
    """Returns the first of several cuts that cuts anything, and by none of the axes `taken`."""
    return next((axes for axes in candidates if axes and not set(taken) & set(axes)), ())


RULES = {
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter_add", "scatter-max", "scatter-min", "scatter-mul"), scatter
    ),
}
