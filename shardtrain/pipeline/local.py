"""A traced function of global arrays as the program of one device: each value is the block it holds.

Inside a pipeline stage nothing is left to XLA's partitioner: a stage is one branch of a program that is
manual over every mesh axis. What our operators do is in their islands already; what a model computes
between them (sums of residuals, activations, losses) is brought into local form here, by one rule for each
kind of primitive. Blocks are as XLA tiles: equal, the last ones filled up where the extent does not divide.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from shardtrain import compat
from shardtrain.layout import Axes, axes_of

log = logging.getLogger(__name__)

Cut = tuple[Axes, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Block:
    """What one device holds of a global array.

    Attributes:
        value: the block.
        shape: of the global array.
        cut: the mesh axes that cut each of its dimensions.
        sizes: of the mesh axes.
    """

    value: Array
    shape: tuple[int, ...]
    cut: Cut
    sizes: Sizes

    def shards(self, dim: int) -> int:
        return math.prod(self.sizes[a] for a in self.cut[dim])

    def uneven(self, dim: int) -> bool:
        return self.shape[dim] % self.shards(dim) != 0

    def moved(self, cut: Cut) -> "Block":
        """The same array, cut otherwise: what is whole is sliced, what is cut is gathered first."""
        x, have = self, list(self.cut)
        for dim, (old, new) in enumerate(zip(self.cut, cut, strict=True)):
            common = _prefix(old, new)
            if self.uneven(dim) or self.shape[dim] % math.prod(self.sizes[a] for a in new):
                common = old if old == new else ()
            if old != common:
                value = lax.all_gather(x.value, old[len(common) :], axis=dim, tiled=True)
                if not common:
                    value = lax.slice_in_dim(value, 0, self.shape[dim], axis=dim)
                have[dim] = common
                x = replace(x, value=value, cut=tuple(have))
        for dim, new in enumerate(cut):
            if more := new[len(have[dim]) :]:
                shards = math.prod(self.sizes[a] for a in more)
                rows = -(-x.value.shape[dim] // shards)
                widths = [(0, 0)] * len(self.shape)
                widths[dim] = (0, rows * shards - x.value.shape[dim])
                value = jnp.pad(x.value, widths) if widths[dim][1] else x.value
                value = lax.dynamic_slice_in_dim(value, lax.axis_index(more) * rows, rows, dim)
                have[dim] = new
                x = replace(x, value=value, cut=tuple(have))
        return x

    def whole_on(self, dims: Sequence[int]) -> "Block":
        return self.moved(tuple(() if d in dims else axes for d, axes in enumerate(self.cut)))

    def filled(self, fill: Any) -> "Block":
        """With `fill` in all that lies past the array's extents."""
        value = self.value
        for dim, axes in enumerate(self.cut):
            if self.uneven(dim):
                rows = value.shape[dim]
                row = lax.axis_index(axes) * rows + lax.broadcasted_iota(jnp.int32, value.shape, dim)
                value = jnp.where(row < self.shape[dim], value, jnp.asarray(fill, value.dtype))
        return replace(self, value=value)


def _prefix(a: Axes, b: Axes) -> Axes:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]


def cut_of(entries: P | None, rank: int) -> Cut:
    """A PartitionSpec as the axes of each of `rank` dimensions."""
    given = [] if entries is None else [axes_of(entry) for entry in entries]
    return tuple(given + [()] * (rank - len(given)))


def block_shape(shape: Sequence[int], cut: Cut, sizes: Sizes) -> tuple[int, ...]:
    """Shape of one device's block."""
    return tuple(-(-n // math.prod(sizes[a] for a in axes)) for n, axes in zip(shape, cut, strict=True))


def evaluate(closed: Any, blocks: Sequence[Block], sizes: Sizes) -> list[Block]:
    """Runs a closed jaxpr of global arrays on one device's blocks, inside a manual `shard_map`.

    Args:
        closed: made where the mesh is manual over at least one outer axis, so that its islands use grouped
            collectives, which may stand in a branch that only some devices take.
        blocks: of its arguments.
        sizes: of all mesh axes that may cut something.

    Returns:
        The blocks of its results; what they are cut by follows from the arguments and the islands.
    """
    return _Evaluator(sizes).run(closed.jaxpr, closed.consts, blocks)


class _Evaluator:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def block(self, value: Any, shape: Sequence[int] | None = None, cut: Cut | None = None) -> Block:
        shape = value.shape if shape is None else tuple(shape)
        return Block(value, shape, ((),) * len(shape) if cut is None else cut, self.sizes)

    def run(self, jaxpr: Any, consts: Sequence[Any], blocks: Sequence[Block]) -> list[Block]:
        known = {v: self.block(_constant(c)) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        known |= dict(zip(jaxpr.invars, blocks, strict=True))

        def read(atom: Any) -> Block:
            return self.block(_constant(atom.val)) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            outs = self.apply(equation, [read(atom) for atom in equation.invars])
            known |= dict(zip(equation.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, equation: Any, blocks: list[Block]) -> list[Block]:
        name = equation.primitive.name
        if name == "shard_map":
            return self.island(equation, blocks)
        if name in _CALLS:
            inner = next(compat.closed_jaxprs(equation))
            return self.run(inner.jaxpr, inner.consts, blocks)
        if name in _SAME:
            return blocks
        if name in _ELEMENTWISE:
            return self.elementwise(equation, blocks)
        rule = getattr(self, f"_{_RULES.get(name, name)}", None)
        outs = None if rule is None else rule(equation, blocks)
        if outs is None:
            outs = self.replicated(equation, blocks)
        return outs if isinstance(outs, list) else [outs]

    def bind(self, equation: Any, values: Sequence[Array], **changed: Any) -> list[Array]:
        return compat.rebind(equation, values, **changed)

    def replicated(self, equation: Any, blocks: list[Block]) -> list[Block]:
        """The last resort: every device of the stage gathers the operands and computes the whole."""
        if any(any(b.cut) for b in blocks):
            log.warning(
                "%s (%s) is gathered and computed whole on every device of its pipeline stage",
                equation.primitive.name,
                compat.where(equation),
            )
        whole = [b.whole_on(range(len(b.shape))).value for b in blocks]
        return [self.block(v) for v in self.bind(equation, whole)]

    def island(self, equation: Any, blocks: list[Block]) -> list[Block]:
        jaxpr, in_specs, out_specs = compat.island_parts(equation)
        values = [b.moved(cut_of(s, len(b.shape))).value for b, s in zip(blocks, in_specs, strict=True)]
        outs = plain(jaxpr, (), values)
        return [
            self.block(v, var.aval.shape, cut_of(s, len(var.aval.shape)))
            for v, s, var in zip(outs, out_specs, equation.outvars, strict=True)
        ]

    def elementwise(self, equation: Any, blocks: list[Block]) -> list[Block]:
        shape = equation.outvars[0].aval.shape
        cuts = [b.cut for b in blocks if b.shape == shape]
        cut = max(cuts, key=lambda c: sum(map(len, c)), default=((),) * len(shape))
        values = [b.moved(cut).value if b.shape == shape else b.value for b in blocks]
        return [self.block(v, shape, cut) for v in self.bind(equation, values)]

    def _broadcast_in_dim(self, equation: Any, blocks: list[Block]) -> Block:
        x, shape, dims = blocks[0], equation.params["shape"], equation.params["broadcast_dimensions"]
        cut: list[Axes] = [()] * len(shape)
        for source, target in enumerate(dims):
            if x.shape[source] == shape[target]:
                cut[target] = x.cut[source]
        mine = block_shape(shape, tuple(cut), self.sizes)
        return self.block(lax.broadcast_in_dim(x.value, mine, dims), shape, tuple(cut))

    def _reshape(self, equation: Any, blocks: list[Block]) -> Block:
        x, shape = blocks[0], equation.params["new_sizes"]
        cut: list[Axes] = [()] * len(shape)
        for dim, axes in enumerate(x.cut):
            if axes:
                before = math.prod(x.shape[:dim])
                ends = [math.prod(shape[:d]) for d in range(len(shape))]
                # The same leading elements before it, and blocks that are whole rows on both sides.
                fits = [d for d, n in enumerate(ends) if n == before and shape[d] % x.shards(dim) == 0]
                fits = [d for d in fits if shape[d] > 1]
                if fits and not x.uneven(dim):
                    cut[fits[-1]] = axes
                else:
                    x = x.whole_on([dim])
        mine = block_shape(shape, tuple(cut), self.sizes)
        return self.block(lax.reshape(x.value, mine), shape, tuple(cut))

    def _transpose(self, equation: Any, blocks: list[Block]) -> Block:
        order = equation.params["permutation"]
        x = blocks[0]
        return self.block(
            lax.transpose(x.value, order), [x.shape[d] for d in order], tuple(x.cut[d] for d in order)
        )

    def _squeeze(self, equation: Any, blocks: list[Block]) -> Block:
        dims = {d % len(blocks[0].shape) for d in equation.params["dimensions"]}
        x = blocks[0].whole_on(sorted(dims))
        left = [d for d in range(len(x.shape)) if d not in dims]
        value = lax.squeeze(x.value, tuple(dims))
        return self.block(value, [x.shape[d] for d in left], tuple(x.cut[d] for d in left))

    def _expand_dims(self, equation: Any, blocks: list[Block]) -> Block | None:
        return None

    def _along(self, equation: Any, blocks: list[Block]) -> list[Block]:
        """What runs along some dimensions and treats the others alike: sorts, running sums, reversal."""
        p = equation.params
        dims = next(p[k] for k in ("dimensions", "dimension", "axis", "axes") if k in p)
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        rest = [b.whole_on(dims) for b in blocks]
        cut = max((b.cut for b in rest), key=lambda c: sum(map(len, c)))
        outs = self.bind(equation, [b.moved(cut).value for b in rest])
        return [self.block(v, var.aval.shape, cut) for v, var in zip(outs, equation.outvars, strict=True)]

    def _reduce(self, equation: Any, blocks: list[Block]) -> Block | None:
        name, dims = equation.primitive.name, equation.params["axes"]
        x = blocks[0]
        if name in ("argmax", "argmin"):
            x = x.whole_on(dims)
        elif any(x.uneven(d) for d in dims):
            x = x.filled(_NEUTRAL[name](x.value.dtype))
        (value,) = self.bind(equation, [x.value])
        over = tuple(a for d in dims for a in x.cut[d])
        left = [d for d in range(len(x.shape)) if d not in dims]
        if over:
            join = _JOIN[name]
            value = join(value, over) if value.dtype != bool else join(value.astype(jnp.int8), over) > 0
        return self.block(value, [x.shape[d] for d in left], tuple(x.cut[d] for d in left))

    def _dot_general(self, equation: Any, blocks: list[Block]) -> Block:
        a, b = blocks
        (ca, cb), (ba, bb) = equation.params["dimension_numbers"]
        cut_a, cut_b = list(a.cut), list(b.cut)
        for i, j in [*zip(ca, cb, strict=True), *zip(ba, bb, strict=True)]:
            cut_a[i] = cut_b[j] = cut_a[i] or cut_b[j]
        free_a = [d for d in range(len(a.shape)) if d not in (*ca, *ba)]
        free_b = [d for d in range(len(b.shape)) if d not in (*cb, *bb)]
        taken = {axis for axes in cut_a for axis in axes}
        for d in free_b:
            if taken & set(cut_b[d]):
                cut_b[d] = ()
        a, b = a.moved(tuple(cut_a)), b.moved(tuple(cut_b))
        if any(a.uneven(d) for d in ca):
            a, b = a.filled(0), b.filled(0)
        (value,) = self.bind(equation, [a.value, b.value])
        if over := tuple(axis for d in ca for axis in a.cut[d]):
            value = lax.psum(value, over)
        cut = [a.cut[d] for d in (*ba, *free_a)] + [b.cut[d] for d in free_b]
        return self.block(value, equation.outvars[0].aval.shape, tuple(cut))

    def _convolution(self, equation: Any, blocks: list[Block]) -> Block | None:
        """Examples cut, pixels and channels whole: whatever else is cut belongs into `ops.conv`."""
        p = equation.params
        (na, ca, *_), (_, cb, *_), (no, *_) = p["dimension_numbers"]
        if p["batch_group_count"] != 1:
            return None
        a, b = blocks
        together = a.cut[ca] if p["feature_group_count"] == 1 and a.cut[ca] == b.cut[cb] else ()
        a = a.moved(tuple({na: a.cut[na], ca: together}.get(d, ()) for d in range(len(a.shape))))
        b = b.moved(tuple(together if d == cb else () for d in range(len(b.shape))))
        (value,) = self.bind(equation, [a.filled(0).value, b.filled(0).value])
        value = lax.psum(value, together) if together else value
        cut = tuple(a.cut[na] if d == no else () for d in range(len(a.shape)))
        return self.block(value, equation.outvars[0].aval.shape, cut)

    def _windowed(self, equation: Any, blocks: list[Block]) -> Block:
        p = equation.params
        window = p["window_dimensions"]
        rest = [b.whole_on([d for d, n in enumerate(window) if n != 1]) for b in blocks if b.shape]
        cut = max((b.cut for b in rest), key=lambda c: sum(map(len, c)))
        values = iter([b.moved(cut).value for b in rest])
        (value,) = self.bind(equation, [next(values) if b.shape else b.value for b in blocks])
        return self.block(value, equation.outvars[0].aval.shape, cut)

    def _iota(self, equation: Any, blocks: list[Block]) -> list[Block]:
        return [self.block(v) for v in self.bind(equation, [])]

    def _slice(self, equation: Any, blocks: list[Block]) -> Block:
        p, x = equation.params, blocks[0]
        starts, limits = list(p["start_indices"]), list(p["limit_indices"])
        strides = p["strides"] or (1,) * len(starts)
        shape = equation.outvars[0].aval.shape
        for d in range(len(starts)):
            same = -(-shape[d] // x.shards(d)) == x.value.shape[d]  # the same blocks, filled up more
            if x.cut[d] and not (starts[d] == 0 and strides[d] == 1 and same):
                x = x.whole_on([d])
            if x.cut[d]:
                limits[d] = x.value.shape[d]
        return self.block(lax.slice(x.value, starts, limits, strides), shape, x.cut)

    def _pad(self, equation: Any, blocks: list[Block]) -> Block:
        x, fill = blocks
        config = list(equation.params["padding_config"])
        shape = equation.outvars[0].aval.shape
        for d, (low, _, inner) in enumerate(config):
            if not x.cut[d] or config[d] == (0, 0, 0):
                continue
            if low == 0 and inner == 0 and -(-shape[d] // x.shards(d)) == x.value.shape[d]:
                one = replace(x, cut=tuple(c if i == d else () for i, c in enumerate(x.cut)))
                x = replace(x, value=one.filled(fill.value).value)
                config[d] = (0, 0, 0)
            else:
                x = x.whole_on([d])
        return self.block(lax.pad(x.value, fill.value, config), shape, x.cut)

    def _concatenate(self, equation: Any, blocks: list[Block]) -> list[Block]:
        return self._along(equation, blocks)

    def _dynamic_slice(self, equation: Any, blocks: list[Block]) -> Block:
        x, *starts = blocks
        sizes = equation.params["slice_sizes"]
        x = x.whole_on([d for d, n in enumerate(sizes) if n != x.shape[d]])
        mine = [x.value.shape[d] if n == x.shape[d] else n for d, n in enumerate(sizes)]
        value = lax.dynamic_slice(x.value, [s.value for s in starts], mine)
        return self.block(value, sizes, x.cut)

    def _dynamic_update_slice(self, equation: Any, blocks: list[Block]) -> Block:
        x, update, *starts = blocks
        part = [d for d in range(len(x.shape)) if x.shape[d] != update.shape[d]]
        x = x.whole_on(part)
        value = lax.dynamic_update_slice(x.value, update.moved(x.cut).value, [s.value for s in starts])
        return self.block(value, x.shape, x.cut)

    def _split(self, equation: Any, blocks: list[Block]) -> list[Block]:
        return self._along(equation, blocks)

    def _gather(self, equation: Any, blocks: list[Block]) -> Block | None:
        p, (x, index) = equation.params, blocks
        dims, sizes = p["dimension_numbers"], list(p["slice_sizes"])
        shared = dict(zip(dims.start_indices_batching_dims, dims.operand_batching_dims, strict=True))
        x = x.moved(tuple(c if d in shared.values() else () for d, c in enumerate(x.cut)))
        index = index.whole_on([len(index.shape) - 1])
        for i, o in shared.items():
            cut = list(x.cut)
            cut[o] = index.cut[i]
            x = x.moved(tuple(cut))
        (value,) = self.bind(equation, [x.value, index.value], slice_sizes=tuple(sizes))
        cut, shape = iter(index.cut[:-1]), equation.outvars[0].aval.shape
        out = tuple(() if d in dims.offset_dims else next(cut) for d in range(len(shape)))
        return self.block(value, shape, out)

    def _scatter(self, equation: Any, blocks: list[Block]) -> Block | None:
        x, index, update = blocks
        dims = equation.params["dimension_numbers"]
        shared = list(zip(dims.scatter_indices_batching_dims, dims.operand_batching_dims, strict=True))
        rest = [d for d in range(len(index.shape)) if d not in dims.scatter_indices_batching_dims]
        index = index.whole_on(rest)
        cut = [()] * len(x.shape)
        for i, o in shared:
            cut[o] = index.cut[i]
        places = [d for d in range(len(update.shape)) if d not in dims.update_window_dims]
        cut_update = [index.cut[places.index(d)] if d in places else () for d in range(len(update.shape))]
        values = [x.moved(tuple(cut)).value, index.value, update.moved(tuple(cut_update)).value]
        (value,) = self.bind(equation, values)
        return self.block(value, x.shape, tuple(cut))

    def _random_bits(self, equation: Any, blocks: list[Block]) -> list[Block]:
        key, shape = blocks[0], equation.outvars[0].aval.shape
        return [
            self.block(v, shape, key.cut + ((),) * (len(shape) - len(key.shape)))
            for v in self.bind(equation, [key.value])
        ]

    def _random_wrap(self, equation: Any, blocks: list[Block]) -> list[Block]:
        x = blocks[0].whole_on([len(blocks[0].shape) - 1])
        shape = equation.outvars[0].aval.shape
        return [self.block(v, shape, x.cut[: len(shape)]) for v in self.bind(equation, [x.value])]

    def _random_unwrap(self, equation: Any, blocks: list[Block]) -> list[Block]:
        shape = equation.outvars[0].aval.shape
        more = ((),) * (len(shape) - len(blocks[0].shape))
        return [self.block(v, shape, blocks[0].cut + more) for v in self.bind(equation, [blocks[0].value])]

    def _scan(self, equation: Any, blocks: list[Block]) -> list[Block]:
        p = equation.params
        nc, nk = p["num_consts"], p["num_carry"]
        consts, init, xs = blocks[:nc], blocks[nc : nc + nk], [b.whole_on([0]) for b in blocks[nc + nk :]]

        def turn(cuts: Sequence[Cut], carry: Sequence[Array], rows: Sequence[Array]) -> list[Block]:
            given = [replace(b, value=v, cut=c) for b, v, c in zip(init, carry, cuts, strict=True)]
            slices = [Block(v, b.shape[1:], b.cut[1:], self.sizes) for b, v in zip(xs, rows, strict=True)]
            inner = p["jaxpr"]
            return self.run(inner.jaxpr, inner.consts, [*consts, *given, *slices])

        cuts, found = self._settled(turn, init, [b.value[0] for b in xs])

        def body(carry: Any, rows: Any) -> Any:
            outs = turn(cuts, carry, rows)
            kept = [b.moved(c).value for b, c in zip(outs[:nk], cuts, strict=True)]
            return kept, [b.value for b in outs[nk:]]

        start = [b.moved(c).value for b, c in zip(init, cuts, strict=True)]
        last, ys = lax.scan(
            body, start, [b.value for b in xs], p["length"], reverse=p["reverse"], unroll=p["unroll"]
        )
        carries = [self.block(v, b.shape, c) for v, b, c in zip(last, init, cuts, strict=True)]
        rows = [
            self.block(v, (p["length"], *b.shape), ((), *b.cut)) for v, b in zip(ys, found[nk:], strict=True)
        ]
        return carries + rows

    def _settled(self, turn: Callable, init: list[Block], rows: list[Array]) -> tuple[list[Cut], list[Block]]:
        """Cuts of a loop's carries that one turn of it gives back, and the blocks of that turn."""
        cuts = [b.cut for b in init]
        found: list[Block] = []
        for attempt in range(4):

            def probe(carry: Any, rows: Any, cuts: list[Cut] = cuts) -> Any:
                found[:] = turn(cuts, carry, rows)
                return [b.value for b in found]

            jax.eval_shape(probe, [b.moved(c).value for b, c in zip(init, cuts, strict=True)], rows)
            after = [b.cut for b in found[: len(init)]]
            if after == cuts:
                break
            cuts = after if attempt < 2 else [((),) * len(b.shape) for b in init]
        return cuts, list(found)

    def _while(self, equation: Any, blocks: list[Block]) -> list[Block]:
        p = equation.params
        nt, nb = p["cond_nconsts"], p["body_nconsts"]
        tests, consts, init = blocks[:nt], blocks[nt : nt + nb], blocks[nt + nb :]

        def given(cuts: Sequence[Cut], carry: Sequence[Array]) -> list[Block]:
            return [replace(b, value=v, cut=c) for b, v, c in zip(init, carry, cuts, strict=True)]

        def turn(cuts: Sequence[Cut], carry: Sequence[Array], rows: Any = ()) -> list[Block]:
            body = p["body_jaxpr"]
            return self.run(body.jaxpr, body.consts, [*consts, *given(cuts, carry)])

        cuts, _ = self._settled(turn, init, [])

        def goes_on(carry: Any) -> Array:
            test = p["cond_jaxpr"]
            return self.run(test.jaxpr, test.consts, [*tests, *given(cuts, carry)])[0].value

        def body(carry: Any) -> Any:
            return [b.moved(c).value for b, c in zip(turn(cuts, carry), cuts, strict=True)]

        last = lax.while_loop(goes_on, body, [b.moved(c).value for b, c in zip(init, cuts, strict=True)])
        return [self.block(v, b.shape, c) for v, b, c in zip(last, init, cuts, strict=True)]

    def _cond(self, equation: Any, blocks: list[Block]) -> list[Block]:
        index, *rest = blocks
        found: list[Block] = []

        def branch(inner: Any, cuts: list[Cut] | None) -> Callable:
            def run(values: Sequence[Array]) -> list[Array]:
                given = [replace(b, value=v) for b, v in zip(rest, values, strict=True)]
                outs = self.run(inner.jaxpr, inner.consts, given)
                outs = outs if cuts is None else [b.moved(c) for b, c in zip(outs, cuts, strict=True)]
                found[:] = outs
                return [b.value for b in outs]

            return run

        values = [b.value for b in rest]
        jax.eval_shape(branch(equation.params["branches"][0], None), values)
        cuts = [b.cut for b in found]
        outs = lax.switch(index.value, [branch(b, cuts) for b in equation.params["branches"]], values)
        return [replace(b, value=v) for b, v in zip(found, outs, strict=True)]


def _constant(value: Any) -> Array:
    """A constant without the mesh under which it was traced."""
    key = jax.dtypes.issubdtype(getattr(value, "dtype", np.bool_), jax.dtypes.extended)
    return value if key or isinstance(value, jax.core.Tracer) else jnp.asarray(np.asarray(value))


def plain(jaxpr: Any, consts: Sequence[Any], values: Sequence[Array]) -> list[Array]:
    """Evaluates the jaxpr of an island where varying axes are not tracked: casts between them vanish."""
    known = {v: _constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    known |= dict(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Any:
        return _constant(atom.val) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        known |= dict(
            zip(equation.outvars, _plain(equation, [read(a) for a in equation.invars]), strict=True)
        )
    return [read(atom) for atom in jaxpr.outvars]


def _plain(equation: Any, values: list[Any]) -> list[Any]:
    name, p = equation.primitive.name, equation.params
    if name in _CASTS or name in _SAME:
        return values
    if name == "psum_invariant":
        return [lax.psum(v, p["axes"]) for v in values]
    if name == "all_gather_invariant":
        return [
            lax.all_gather(v, p["axis_name"], axis=p["all_gather_dimension"], tiled=p["tiled"])
            for v in values
        ]
    if name in _CALLS:
        inner = next(compat.closed_jaxprs(equation))
        return plain(inner.jaxpr, inner.consts, values)
    if name == "scan":
        nc, nk, inner = p["num_consts"], p["num_carry"], p["jaxpr"]

        def body(carry: Any, rows: Any) -> Any:
            outs = plain(inner.jaxpr, inner.consts, [*values[:nc], *carry, *rows])
            return outs[:nk], outs[nk:]

        carry, ys = lax.scan(
            body,
            values[nc : nc + nk],
            values[nc + nk :],
            p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *ys]
    if name == "while":
        nt, nb = p["cond_nconsts"], p["body_nconsts"]
        test, turn = p["cond_jaxpr"], p["body_jaxpr"]
        return lax.while_loop(
            lambda c: plain(test.jaxpr, test.consts, [*values[:nt], *c])[0],
            lambda c: plain(turn.jaxpr, turn.consts, [*values[nt : nt + nb], *c]),
            values[nt + nb :],
        )
    if name == "cond":
        branches = [lambda v, b=b: plain(b.jaxpr, b.consts, v) for b in p["branches"]]
        return lax.switch(values[0], branches, values[1:])
    return compat.rebind(equation, values)


_CASTS = frozenset({"pvary", "pcast", "preduced", "vary_unreduced_cast"})
_CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    ]
)
_SAME = frozenset(
    {"sharding_constraint", "reshard", "mesh_cast", "name", "copy", "copy_p", "optimization_barrier"}
)
_ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bessel_i0e",
        "bessel_i1e",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "eq_to",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "igamma",
        "igammac",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "polygamma",
        "pow",
        "population_count",
        "random_fold_in",
        "real",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "threefry2x32",
        "xor",
        "zeta",
    ]
)
_RULES = {
    **dict.fromkeys(
        [
            "argmax",
            "argmin",
            "reduce_sum",
            "reduce_max",
            "reduce_min",
            "reduce_prod",
            "reduce_and",
            "reduce_or",
        ],
        "reduce",
    ),
    **dict.fromkeys(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev"], "along"),
    **dict.fromkeys(
        [
            "reduce_window_max",
            "reduce_window_min",
            "reduce_window_sum",
            "select_and_scatter_add",
            "select_and_gather_add",
        ],
        "windowed",
    ),
    **dict.fromkeys(["scatter-add", "scatter_add", "scatter"], "scatter"),
    "conv_general_dilated": "convolution",
}


def _least(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _most(dtype: Any) -> Any:
    return np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


_NEUTRAL: dict[str, Callable[[Any], Any]] = {
    "reduce_sum": lambda _: 0,
    "reduce_prod": lambda _: 1,
    "reduce_max": _least,
    "reduce_min": _most,
    "reduce_and": lambda _: True,
    "reduce_or": lambda _: False,
}
_JOIN: dict[str, Callable[..., Array]] = {
    "reduce_sum": lax.psum,
    "reduce_prod": lambda v, axes: jnp.prod(lax.all_gather(v, axes), axis=0),
    "reduce_max": lax.pmax,
    "reduce_min": lax.pmin,
    "reduce_and": lax.pmin,
    "reduce_or": lax.pmax,
}
