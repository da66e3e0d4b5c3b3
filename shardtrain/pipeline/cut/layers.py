"""The layers of a model among its operations, and stages written as the layers they have."""

import fnmatch
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from shardtrain import jaxprs
from shardtrain.errors import UserError
from shardtrain.nn.base import layer_of
from shardtrain.pipeline.cut.graph import OperationGraph
from shardtrain.pipeline.cut.operation_costs import size_of

REST = "..."
"""In a layout, the layers in between."""


def allowed(flow: OperationGraph) -> list[int]:
    """Positions among the main operations at which a stage may begin: no parameter is used on both sides."""
    shut = {c for first, last in flow.spans().values() for c in range(first + 1, last + 1)}
    return [c for c in range(1, len(flow.main)) if c not in shut]


def arriving(flow: OperationGraph) -> list[int]:
    """Bytes of the activations that a cut at each position among the main operations would send on."""
    bytes_at = [0] * (len(flow.main) + 1)
    for v, (made, used) in flow.lives().items():
        for c in range(made + 1, min(used, len(flow.main)) + 1):
            bytes_at[c] += size_of([v])
    return bytes_at


class Layers:
    """Which main operations of a flow belong to which layer.

    An operation belongs to the layer whose scope it was traced in; without one, to those whose parameters
    or running statistics it uses; without any, it lies between layers, and before a cut that separates
    these it goes where the fewest bytes cross (to the layer in front, where that does not matter).

    Attributes:
        order: paths of the layers that run, in the order in which they do.
        first: the first operation of each.
        begins: the positions at which a stage may begin that holds whole layers, each with the operation
            that is its first in a layer.
    """

    def __init__(self, flow: OperationGraph) -> None:
        self.spans = flow.spans()
        self._known = {p for p in flow.traced.layers if p} or _holders(flow.traced.params)
        self._scopes: dict[str, str] = {}
        variables = [*zip(flow.traced.groups()[0], flow.traced.params, strict=True)]
        variables += zip(flow.traced.groups()[1], flow.traced.state, strict=True)
        home = {v: self._holder(name) for v, name in variables}
        touched = [self._touched(e, [home.get(v, "") for v in u]) for e, u in _pairs(flow)]
        self.first: dict[str, int] = {}
        for i, layers in enumerate(touched):
            for path in layers:
                self.first.setdefault(path, i)
        self.order = tuple(self.first)
        last = {path: i for i, layers in enumerate(touched) for path in layers}
        covered = [set(layers) for layers in touched]
        for path in {self._holder(name) for name in self.spans} & self.first.keys():
            for i in range(self.first[path], last[path]):
                covered[i].add(path)
        self.begins: dict[int, int] = {}
        free, bytes_at, firsts = frozenset(allowed(flow)), arriving(flow), frozenset(self.first.values())
        inside = [i for i, layers in enumerate(covered) if layers]
        for before, i in itertools.pairwise(inside):
            places = [c for c in range(before + 1, i + 1) if c in free]
            if places and i in firsts and not covered[before] & covered[i]:
                self.begins[min(places, key=lambda c: (bytes_at[c], -c))] = i

    def _holder(self, name: str) -> str:
        """The layer that has a variable, `""` for none."""
        parts = name.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        return next((path for path in above if path in self._known), "")

    def _touched(self, equation: Any, homes: Sequence[str]) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(self._traced_in(equation)))
        return found or tuple(dict.fromkeys(sorted(filter(None, homes))))

    def _traced_in(self, equation: Any) -> Iterator[str]:
        """The layers whose scopes an equation, or what it runs, was traced in."""
        scope = str(equation.source_info.name_stack)
        if scope not in self._scopes:
            self._scopes[scope] = layer_of(scope, self._known) if scope else ""
        if self._scopes[scope]:
            yield self._scopes[scope]
            return
        for inner in jaxprs.inner_jaxprs(equation):
            for e in inner.eqns:
                yield from self._traced_in(e)

    def stages(self, positions: Sequence[int]) -> list[tuple[str, ...]]:
        """The layers of each stage; one that several stages have a part of is in the first of them."""
        starts = [self.begins.get(p, p) for p in positions]
        at = {path: bisect_right(starts, i) for path, i in self.first.items()}
        return [tuple(p for p in self.order if at[p] == k) for k in range(len(positions) + 1)]

    def names(self, positions: Sequence[int]) -> list[tuple[str, ...]]:
        """As `stages`, each path as short as it may be: `blocks.0` for all layers in it."""
        parts = self.stages(positions)
        out = []
        for mine in parts:
            others = [path for part in parts if part is not mine for path in part]
            out.append(tuple(dict.fromkeys(_shortest(path, others) for path in mine)))
        return out

    def layout(self, positions: Sequence[int]) -> str:
        """The layout that says where `positions` cut.

        Raises:
            UserError: a cut that is not between layers; the nearest that is stands in the message.
        """
        for stage, position in enumerate(positions, 1):
            if position not in self.begins:
                near = self._nearest(positions)
                raise UserError(
                    f"pipeline: stage {stage} begins inside a layer, behind all of them, or with one that "
                    f"ran before, which no layout can say; use stages={len(positions) + 1} without a layout, "
                    f"or " + (f"the nearest that there is, {self._short(near)!r}" if near else "fewer stages")
                )
        return "|".join(",".join(names) for names in self.names(positions))

    def _nearest(self, positions: Sequence[int]) -> list[int]:
        """The positions between layers that are nearest to `positions`; none if there are too few."""
        free = sorted(self.begins)
        out: list[int] = []
        if len(free) < len(positions):
            return []
        for number, position in enumerate(positions, 1):
            some = free[: len(free) - len(positions) + number]  # as many as are left stay for those behind
            out.append(min(some, key=lambda c: abs(c - position)))
            free = [c for c in free if c > out[-1]]
        return out

    def _short(self, positions: Sequence[int]) -> str:
        """A layout that names the first layer of each later stage."""
        heads = (names[0] for names in self.names(positions)[1:])
        return "|".join([REST, *(f"{head},{REST}" for head in heads)])

    def positions(self, layout: str, stages: int) -> list[int]:
        """Where the stages of a layout begin.

        Raises:
            UserError: another number of stages, a pattern that matches nothing, layers that are left out,
                named twice or not in the order in which they run, a cut through a layer or a parameter.
        """
        parts = [[name.strip() for name in part.split(",") if name.strip()] for part in layout.split("|")]
        if len(parts) != stages:
            raise UserError(
                f"layout {layout!r} has {len(parts)} stages, {stages} are asked for; write the layers of "
                f"{stages} stages with | between them, such as {self.example(stages)!r}"
            )
        if not self.order:
            raise UserError(
                "layout: the model has no layers with paths of their own; leave the layout out, or build the "
                "model from layers that are attributes of it"
            )
        at = self._named(parts)
        self._fill(parts, at)
        out = []
        for stage in range(stages):
            mine = [path for path in self.order if at[path] == stage]
            if not mine:
                raise UserError(
                    f"layout {layout!r}: no layer is left for stage {stage}; name one, such as "
                    f"{self.example(stages)!r}"
                )
            out += [self._place(mine[0], at)] if stage else []
        return out

    def within(self, span: tuple[int, int]) -> list[str]:
        """The layers that begin between two operations."""
        return [path for path in self.order if span[0] <= self.first[path] <= span[1]]

    def example(self, stages: int) -> str:
        """Some layout of so many stages."""
        later = [path for path in self.order if self.first[path] in self.begins.values()]
        step = len(later) / max(1, stages)
        heads = [later[int(step * k)] for k in range(1, stages)] if len(later) >= stages else []
        return "|".join([REST, *(f"{path},{REST}" for path in heads)])

    def _named(self, parts: Sequence[Sequence[str]]) -> dict[str, int]:
        """The stages of the layers that a layout's patterns match."""
        at: dict[str, int] = {}
        by: dict[str, str] = {}
        for stage, patterns in enumerate(parts):
            for pattern in patterns:
                if pattern == REST:
                    continue
                matched = [path for path in self.order if _matches(path, pattern)]
                if not matched:
                    raise UserError(
                        f"layout: the pattern {pattern!r} matches no layer; the layers are "
                        f"{_listed(self.order)} (functions in between, such as relu, are not named)"
                    )
                for path in matched:
                    if at.setdefault(path, stage) != stage:
                        raise UserError(
                            f"layout: {by[path]!r} in stage {at[path]} and {pattern!r} in stage {stage} both "
                            f"match the layer {path!r}; name it in one of them"
                        )
                    by[path] = pattern
        named = [path for path in self.order if path in at]
        for before, path in itertools.pairwise(named):
            if at[path] < at[before]:
                raise UserError(
                    f"layout: the layer {before!r} runs before {path!r} but is in the later stage "
                    f"{at[before]}; stages take the layers in the order {_listed(self.order)}"
                )
        return at

    def _fill(self, parts: Sequence[Sequence[str]], at: dict[str, int]) -> None:
        """The stages of the layers that `...` stands for."""
        order, i = self.order, 0
        while i < len(order):
            j = i
            while j < len(order) and order[j] not in at:
                j += 1
            if j > i:
                low = at[order[i - 1]] if i else 0
                high = at[order[j]] if j < len(order) else len(parts) - 1
                open_ = [
                    k
                    for k in range(low, high + 1)
                    if REST in parts[k]
                    and (k > low or i == 0 or k == high or parts[k][-1] == REST)
                    and (k < high or j == len(order) or k == low or parts[k][0] == REST)
                ]
                if len(open_) != 1:
                    raise UserError(self._unclear(order[i:j], low, open_))
                at |= dict.fromkeys(order[i:j], open_[0])
            i = j + 1

    def _unclear(self, missing: Sequence[str], stage: int, taking: Sequence[int]) -> str:
        if taking:
            return (
                f"layout: {_listed(missing)} could be in any of the stages {', '.join(map(str, taking))}; "
                f"name the first layer of each, as in {self.example(len(taking))!r}"
            )
        return (
            f"layout: {_listed(missing)} are in no stage; name them, for example in stage {stage}, or write "
            f"'{REST}' there for all layers in between"
        )

    def _place(self, path: str, at: dict[str, int]) -> int:
        """Where the stage begins whose first layer is `path`."""
        i = self.first[path]
        together = [p for p in self.order if self.first[p] == i and at[p] < at[path]]
        if together:
            raise UserError(
                f"layout: {together[0]!r} and {path!r} run in one operation (a loop, or a block that is "
                f"computed again), which is not cut; put them into one stage"
            )
        for position, behind in self.begins.items():
            if behind == i:
                return position
        shared = (name for name, (a, b) in self.spans.items() if a < i <= b and self._holder(name) != path)
        name = next(shared, None)
        if name is None:
            raise UserError(
                f"layout: no stage can begin with {path!r}, which runs in between the operations of another "
                f"layer; put the two into one stage"
            )
        raise UserError(
            f"layout: a stage that begins with {path!r} would divide the uses of the parameter {name!r} "
            f"between two stages; put {_listed(self.within(self.spans[name]))} into one"
        )


def _pairs(flow: OperationGraph) -> Iterator[tuple[Any, list[Any]]]:
    """Each main operation with the variables that it uses, and those of which it makes the new value."""
    moving: dict[int, list[Any]] = {}
    for v, i in flow.moving().items():
        moving.setdefault(i, []).append(v)
    for i, (equation, uses) in enumerate(zip(flow.main, flow.uses, strict=True)):
        yield equation, [*uses, *moving.get(i, ())]


def _holders(names: Sequence[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names} - {""}


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def _shortest(path: str, others: Sequence[str]) -> str:
    """The shortest part of a path that begins no other."""
    parts = path.split(".")
    for n in range(1, len(parts)):
        head = ".".join(parts[:n])
        if not any(other == head or other.startswith(f"{head}.") for other in others):
            return head
    return path


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
