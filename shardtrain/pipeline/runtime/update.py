"""A function of all parameters, each part of it computed by the rank that holds its arguments.

An optimizer's update is traced once, on the ordinary named global arrays, so whatever it does by name, by
parameter or over all of them is right: masks, LAMB's ratios, the global norm. What concerns one rank's
arrays is that rank's; what joins several ranks' (a sum of norms) is sent to all, and must be small.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Var

from shardtrain import jaxprs
from shardtrain.errors import UserError
from shardtrain.pipeline.localize.evaluate import Block, Cut, Sizes, evaluate

LARGEST = 1 << 20
"""Bytes that may be sent to all ranks: norms and the like, not parameters."""

Named = dict[int, Array]


class RankwiseUpdate:
    """A jaxpr whose arguments live on different ranks of a pipeline.

    Args:
        closed: the function, of global arrays.
        homes: the rank of each argument, None for one that every rank has.
        cuts: how each argument lies within its rank.
        results: the rank and the cut of each result.
        sizes: of the mesh axes other than `pipe`.
        ranks: how many there are.

    Raises:
        UserError: arrays of several ranks are joined that are too large to send to all.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        homes: Sequence[int | None],
        cuts: Sequence[Cut],
        results: Sequence[tuple[int | None, Cut]],
        sizes: Sizes,
        ranks: int,
    ) -> None:
        self.closed, self.sizes, self.ranks, self.results = closed, sizes, ranks, results
        jaxpr = closed.jaxpr
        self.cuts = dict(zip(jaxpr.invars, cuts, strict=True))
        self.numbers = {v: i for i, v in enumerate(jaxpr.invars)}
        self.makers = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.outvars}
        self.home: dict[Any, int | None] = dict.fromkeys(jaxpr.constvars, None)
        self.home |= dict(zip(jaxpr.invars, homes, strict=True))
        level: dict[Any, int] = dict.fromkeys(self.home, 0)
        self.levels: list[int] = []
        joined: dict[Any, int] = {}
        for equation in jaxpr.eqns:
            ins = [a for a in equation.invars if isinstance(a, Var)]
            at = {self.home[v] for v in ins} - {None}
            here = max((level[v] for v in ins), default=0)
            if len(at) > 1:
                joined |= {v: level[v] for v in ins if self.home[v] is not None}
                here += 1
            for v in equation.outvars:
                self.home[v] = next(iter(at)) if len(at) == 1 else None
                level[v] = here
            self.levels.append(here)
        self.last = max(self.levels, default=0)
        for (rank, _), v in zip(results, jaxpr.outvars, strict=True):
            if rank is None and isinstance(v, Var) and self.home[v] is not None:
                joined[v] = level[v]
                self.last = max(self.last, level[v] + 1)
        self.joined = joined
        large = sum(v.aval.size * v.aval.dtype.itemsize for v in joined)
        if large > LARGEST:
            raise UserError(
                f"pipeline: the optimizer joins {large >> 20} MiB of arrays of several stages, which would "
                f"be sent to all; use transformations that treat each parameter by itself, or sums over them"
            )

    def __call__(
        self,
        packed: Any,
        shared: Mapping[int, Array],
        read: Callable[[int, Any], Named],
        write: Callable[[int, Any, Named], Any],
    ) -> tuple[Any, Named]:
        """Runs it, inside a `shard_map` that is manual over all axes.

        Args:
            packed: what this device holds.
            shared: the arguments that every rank has, by their number.
            read: the arguments that a rank finds in `packed`, by number.
            write: puts a rank's results, by number, back into what it holds.

        Returns:
            What this device holds now, and the results that every rank has.
        """
        jaxpr, rank = self.closed.jaxpr, lax.axis_index("pipe")
        known = {
            v: Block(shared[i], v.aval.shape, self.cuts[v], self.sizes)
            for v, i in self.numbers.items()
            if i in shared
        }

        def everywhere(level: int) -> None:
            eqns = [
                e
                for e, at in zip(jaxpr.eqns, self.levels, strict=True)
                if at == level and all(self.home[v] is None for v in e.outvars)
            ]
            ends = [v for e in eqns for v in e.outvars]
            ins = list(known)
            sub = jaxprs.subprogram(self.closed, ins, eqns, ends)
            known.update(zip(ends, evaluate(sub, list(known.values()), self.sizes), strict=True))

        def on(which: int, packed: Any, wanted: Sequence[Any]) -> list[Block]:
            found = read(which, packed)
            mine = {
                v: Block(found[i], v.aval.shape, self.cuts[v], self.sizes)
                for v, i in self.numbers.items()
                if i in found
            }
            mine = {**known, **mine}
            needed: set[int] = set()
            todo = [v for v in wanted if isinstance(v, Var)]
            while todo:
                v = todo.pop()
                i = self.makers.get(v)
                if v not in mine and i is not None and i not in needed:
                    needed.add(i)
                    todo += [a for a in jaxpr.eqns[i].invars if isinstance(a, Var)]
            eqns = [jaxpr.eqns[i] for i in sorted(needed)]
            sub = jaxprs.subprogram(self.closed, list(mine), eqns, list(wanted))
            return evaluate(sub, list(mine.values()), self.sizes)

        for level in range(self.last + 1):
            everywhere(level)
            sent = [v for v, at in self.joined.items() if at == level]
            if not sent:
                continue

            def part(which: int, sent: Sequence[Any] = sent) -> Callable[[Any], list[Array]]:
                def run(packed: Any) -> list[Array]:
                    own = [v for v in sent if self.home[v] == which]
                    whole = {
                        v: b.whole_on(range(len(b.shape)))
                        for v, b in zip(own, on(which, packed, own), strict=True)
                    }
                    return [
                        whole[v].value if v in whole else jnp.zeros(v.aval.shape, v.aval.dtype) for v in sent
                    ]

                return run

            values = lax.psum(lax.switch(rank, [part(r) for r in range(self.ranks)], packed), "pipe")
            for v, value in zip(sent, values, strict=True):
                value = value.astype(v.aval.dtype)  # sums of truth values are whole numbers
                known[v] = Block(value, v.aval.shape, ((),) * len(v.aval.shape), self.sizes)

        def finish(which: int) -> Callable[[Any], Any]:
            def run(packed: Any) -> Any:
                at = [i for i, (r, _) in enumerate(self.results) if r == which]
                blocks = on(which, packed, [jaxpr.outvars[i] for i in at])
                return write(
                    which,
                    packed,
                    {i: b.moved(self.results[i][1]).value for i, b in zip(at, blocks, strict=True)},
                )

            return run

        packed = lax.switch(rank, [finish(r) for r in range(self.ranks)], packed)
        at = [i for i, (r, _) in enumerate(self.results) if r is None]
        sub = jaxprs.subprogram(self.closed, list(known), [], [jaxpr.outvars[i] for i in at])
        outs = evaluate(sub, list(known.values()), self.sizes)
        return packed, {i: b.moved(self.results[i][1]).value for i, b in zip(at, outs, strict=True)}
