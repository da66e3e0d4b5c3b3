"""The optimizer's update, in which every rank of the pipeline computes what concerns its own arrays.

The update is traced once, as a function of ordinary named global arrays. Whatever an optimizer does by name,
by parameter or over all parameters at once is therefore right: masks, LAMB's trust ratios, the global norm.
Each operation of the trace then runs on the rank that stores its operands. Where they are stored on several
ranks, it runs on the rank that has more of them than all others together, after the others have sent theirs:
a gradient stays where it is when it is divided by the norm of all gradients. Where there is no such rank, as
for the sum of the stages' squared norms, the operation runs on every rank, after all operands have been sent.
What is sent must be small.

Values are sent between rounds. In a round every rank computes what it can from its own arrays and from the
values sent so far; one sum over `pipe`, to which each rank contributes its own values and zeros for those of
the others, then makes the new values known to all. There are as many rounds as such operations depend on each
other, one or two for the usual optimizers, however many parameters there are.

The ranks take different branches of one `lax.switch`, in which only collectives may stand whose groups stay
within a rank; the sum over `pipe` is outside of it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr

from shardtrain import jaxprs
from shardtrain.errors import UserError
from shardtrain.pipeline.localize.evaluate import Block, Cut, Sizes, evaluate

LARGEST = 1 << 20
"""The most bytes that may be sent to all ranks: enough for norms and the like, too few for parameters."""

Groups = Mapping[str, Mapping[int, Array]]
"""Blocks of arrays: by the name of a group, and by the number of the array in its group."""


class Placement(NamedTuple):
    """Where an array is stored.

    Attributes:
        rank: of the pipeline; None for an array that every rank stores.
        cut: the mesh axes that cut each dimension of it within the rank.
    """

    rank: int | None
    cut: Cut


class RankwiseUpdate:
    """A function of groups of arrays that are stored on the ranks of a pipeline.

    Args:
        closed: the function as a jaxpr of global arrays. Its arguments are those of all groups, one group
            after the other; so are its results.
        arguments: for each group of arguments the placements of its arrays.
        results: for each group of results the placements that its arrays are to have.
        sizes: of the mesh axes other than `pipe`.
        ranks: of the pipeline.

    Raises:
        UserError: an operation joins arrays of several ranks that are too large to be sent to all.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        arguments: Mapping[str, Sequence[Placement]],
        results: Mapping[str, Sequence[Placement]],
        sizes: Sizes,
        ranks: int,
    ) -> None:
        self.closed, self.sizes, self.ranks = closed, sizes, ranks
        jaxpr = closed.jaxpr
        self.variables = dict(zip(_keys(arguments), jaxpr.invars, strict=True))
        placed = [placement for group in arguments.values() for placement in group]
        self.cuts = {v: p.cut for v, p in zip(jaxpr.invars, placed, strict=True)}
        ranks_of = {v: p.rank for v, p in zip(jaxpr.invars, placed, strict=True)}
        wanted = [placement for group in results.values() for placement in group]
        self.results = list(zip(_keys(results), jaxpr.outvars, wanted, strict=True))
        self.rounds = _Rounds(jaxpr, ranks_of, [v for _, v, p in self.results if p.rank is None])
        large = sum(v.aval.size * v.aval.dtype.itemsize for v in self.rounds.sent)
        if large > LARGEST:
            raise UserError(
                f"pipeline: the optimizer joins {large >> 20} MiB of arrays of several stages, which would "
                f"be sent to all; use transformations that treat each parameter by itself, or sums over them"
            )

    def __call__(
        self,
        packed: Any,
        shared: Groups,
        read: Callable[[int, Any], Groups],
        write: Callable[[int, Any, Groups], Any],
    ) -> tuple[Any, dict[str, dict[int, Array]]]:
        """Computes the results, inside a `shard_map` that is manual over all mesh axes.

        Args:
            packed: the arrays that this device's rank stores, in any form.
            shared: the arguments that every rank stores.
            read: `(rank, packed)` to the arguments that a rank stores.
            write: `(rank, packed, results)` to `packed` with the results of a rank in it.

        Returns:
            `packed` with this rank's results in it, and the results that every rank has.
        """
        return _Execution(self, shared, read).run(packed, write)


class _Rounds:
    """On which rank and in which round each operation of a jaxpr runs.

    Args:
        jaxpr: of the function.
        ranks_of: the rank that stores each argument, None for one that every rank stores.
        wanted: the results that every rank is to have.

    Attributes:
        rank: the rank that computes or stores each variable; None for one that every rank has.
        known_in: the round in which each variable is computed.
        round_of: the round in which each equation runs.
        sent: the variables that are sent to all ranks, with the round after which they are.
        count: how many rounds there are.
    """

    def __init__(self, jaxpr: Any, ranks_of: Mapping[Any, int | None], wanted: Sequence[Any]) -> None:
        self.equations = jaxpr.eqns
        self.rank: dict[Any, int | None] = {**dict.fromkeys(jaxpr.constvars), **ranks_of}
        self.known_in: dict[Any, int] = dict.fromkeys(self.rank, 0)
        self.sent: dict[Any, int] = {}
        self.round_of = [self._place(equation) for equation in jaxpr.eqns]
        self._send(jaxprs.variables(wanted))
        self.count = 1 + max([*self.round_of, *(after + 1 for after in self.sent.values())], default=0)

    def _place(self, equation: Any) -> int:
        operands = jaxprs.variables(equation.invars)
        number = max((self.known_in[v] for v in operands), default=0)
        stored = Counter[int]()
        for v in operands:
            if (rank := self.rank[v]) is not None:
                stored[rank] += v.aval.size * v.aval.dtype.itemsize
        home = max(stored, key=stored.__getitem__, default=None)
        if home is not None and len(stored) > 1:
            if 2 * stored[home] <= stored.total():
                home = None
            self._send([v for v in operands if self.rank[v] != home])
            number += 1
        for v in equation.outvars:
            self.rank[v], self.known_in[v] = home, number
        return number

    def _send(self, variables: Sequence[Any]) -> None:
        self.sent |= {v: self.known_in[v] for v in variables if self.rank[v] is not None}

    def on_every_rank(self, number: int) -> list[Any]:
        """Returns the equations that every rank runs in a round."""
        pairs = zip(self.equations, self.round_of, strict=True)
        return [e for e, n in pairs if n == number and all(self.rank[v] is None for v in e.outvars)]

    def sent_after(self, number: int) -> list[Any]:
        """Returns the variables that are sent to all ranks after a round."""
        return [v for v, after in self.sent.items() if after == number]


class _Execution:
    """One run of an update on this device.

    Attributes:
        known: the blocks of the variables that every rank knows so far.
    """

    def __init__(self, update: RankwiseUpdate, shared: Groups, read: Callable[[int, Any], Groups]) -> None:
        self.update, self.read = update, read
        self.maker_of = jaxprs.makers(update.closed.jaxpr.eqns)
        self.known = self._blocks(shared)

    def run(
        self, packed: Any, write: Callable[[int, Any, Groups], Any]
    ) -> tuple[Any, dict[str, dict[int, Array]]]:
        update = self.update
        for number in range(update.rounds.count):
            self._compute_on_every_rank(number)
            if sent := update.rounds.sent_after(number):
                self._send(sent, packed)

        def finish(rank: int) -> Callable[[Any], Any]:
            return lambda packed: write(rank, packed, self._results_of(rank, packed))

        packed = self._on_own_rank(finish, packed)
        return packed, self._results(None, lambda wanted: self._evaluate(self.known, [], wanted))

    def _on_own_rank(self, branch: Callable[[int], Callable[[Any], Any]], packed: Any) -> Any:
        """Returns what `branch(rank)` makes of `packed`, for the rank of this device."""
        return lax.switch(lax.axis_index("pipe"), [branch(r) for r in range(self.update.ranks)], packed)

    def _blocks(self, groups: Groups) -> dict[Any, Block]:
        update = self.update
        blocks = {}
        for key, v in update.variables.items():
            if key[1] in groups.get(key[0], ()):
                blocks[v] = Block(groups[key[0]][key[1]], v.aval.shape, update.cuts[v], update.sizes)
        return blocks

    def _evaluate(
        self, known: Mapping[Any, Block], equations: Sequence[Any], wanted: Sequence[Any]
    ) -> list[Block]:
        program = jaxprs.subprogram(self.update.closed, list(known), equations, list(wanted))
        return evaluate(program, list(known.values()), self.update.sizes)

    def _compute_on_every_rank(self, number: int) -> None:
        equations = self.update.rounds.on_every_rank(number)
        outs = [v for e in equations for v in e.outvars]
        self.known.update(zip(outs, self._evaluate(self.known, equations, outs), strict=True))

    def _compute_on(self, rank: int, packed: Any, wanted: Sequence[Any]) -> list[Block]:
        """Returns the values of some variables of a rank, from its arrays and what every rank knows."""
        equations = self.update.closed.jaxpr.eqns
        known = {**self.known, **self._blocks(self.read(rank, packed))}
        needed = jaxprs.behind(equations, self.maker_of, wanted, known)
        return self._evaluate(known, [equations[i] for i in sorted(needed)], wanted)

    def _send(self, sent: Sequence[Any], packed: Any) -> None:
        """Makes variables of single ranks known to every rank."""

        def contribution(rank: int) -> Callable[[Any], list[Array]]:
            own = [v for v in sent if self.update.rounds.rank[v] == rank]

            def compute(packed: Any) -> list[Array]:
                blocks = dict(zip(own, self._compute_on(rank, packed, own), strict=True))
                whole = {v: b.whole_on(range(len(b.shape))).value for v, b in blocks.items()}
                return [whole[v] if v in whole else jnp.zeros(v.aval.shape, v.aval.dtype) for v in sent]

            return compute

        for v, value in zip(sent, lax.psum(self._on_own_rank(contribution, packed), "pipe"), strict=True):
            value = value.astype(v.aval.dtype)  # a sum of truth values is an integer
            self.known[v] = Block(value, v.aval.shape, ((),) * len(v.aval.shape), self.update.sizes)

    def _results_of(self, rank: int, packed: Any) -> dict[str, dict[int, Array]]:
        return self._results(rank, lambda wanted: self._compute_on(rank, packed, wanted))

    def _results(
        self, rank: int | None, compute: Callable[[list[Any]], list[Block]]
    ) -> dict[str, dict[int, Array]]:
        """Returns the results that a rank is to have, or those that every rank is to have, by group."""
        mine = [
            (key, v, placement.cut) for key, v, placement in self.update.results if placement.rank == rank
        ]
        found: dict[str, dict[int, Array]] = {}
        for ((group, i), _, cut), block in zip(mine, compute([v for _, v, _ in mine]), strict=True):
            found.setdefault(group, {})[i] = block.moved(cut).value
        return found


def _keys(groups: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, int]]:
    """Yields the group and the number in it of each array, in order."""
    for name, group in groups.items():
        yield from ((name, i) for i in range(len(group)))
