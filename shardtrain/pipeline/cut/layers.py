"""The layers of a model among its operations, and stages written as text: the layers that each has."""

import fnmatch
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardtrain import jaxprs
from shardtrain.errors import UserError
from shardtrain.nn.base import layer_of
from shardtrain.pipeline.cut.graph import OperationGraph
from shardtrain.pipeline.cut.operation_costs import size_of

REST = "..."
"""Stands for the layers in between, where users write the layers of each stage."""


def allowed_starts(graph: OperationGraph) -> list[int]:
    """Returns the main operations with which a stage may begin: no parameter is used on both sides."""
    shut = {c for first, last in graph.spans().values() for c in range(first + 1, last + 1)}
    return [c for c in range(1, len(graph.main)) if c not in shut]


def incoming_bytes(graph: OperationGraph) -> list[int]:
    """Returns, for each main operation, the bytes sent to a stage that begins with it."""
    bytes_at = [0] * (len(graph.main) + 1)
    for v, (made, used) in graph.lives().items():
        for c in range(made + 1, min(used, len(graph.main)) + 1):
            bytes_at[c] += size_of([v])
    return bytes_at


class Layers:
    """Which main operations of a graph belong to which layer.

    An operation belongs to the layer in whose scope it was traced. Without a scope it belongs to the layers
    whose parameters or running statistics it uses. Without any it lies between layers: a cut that separates
    the layers around it is made where the fewest bytes cross, and as late as possible among equals.

    Args:
        graph: of a traced model.

    Attributes:
        order: the paths of the layers that run, in the order in which they do.
        first: for each of them its first operation.
        begins: the starts of stages that have whole layers, each with the operation behind it that is the
            first of a layer.
        spans: see `OperationGraph.spans`.
    """

    def __init__(self, graph: OperationGraph) -> None:
        self.spans = graph.spans()
        self._known = {p for p in graph.traced.layers if p} or _holders(graph.traced.params)
        self._layer_of_scope: dict[str, str] = {}
        members = self._members(graph)
        self.first: dict[str, int] = {}
        for i, layers in enumerate(members):
            for path in layers:
                self.first.setdefault(path, i)
        self.order = tuple(self.first)
        self.begins = self._begins(graph, self._covered(members))

    def _members(self, graph: OperationGraph) -> list[tuple[str, ...]]:
        """Returns the layers to which each main operation belongs."""
        params, state, _ = graph.traced.groups()
        names = (*graph.traced.params, *graph.traced.state)
        layer_of_variable = {v: self._holder(n) for v, n in zip((*params, *state), names, strict=True)}
        updated: dict[int, list[Any]] = {}
        for v, i in graph.updated().items():
            updated.setdefault(i, []).append(v)
        members = []
        for i, (equation, uses) in enumerate(zip(graph.main, graph.uses, strict=True)):
            scoped = dict.fromkeys(self._layers_traced_in(equation))
            homes = {layer_of_variable.get(v, "") for v in (*uses, *updated.get(i, ()))} - {""}
            members.append(tuple(scoped or sorted(homes)))
        return members

    def _covered(self, members: Sequence[tuple[str, ...]]) -> list[set[str]]:
        """As `members`, where a layer whose variables have one home has all operations between its own."""
        last = {path: i for i, layers in enumerate(members) for path in layers}
        covered = [set(layers) for layers in members]
        for path in {self._holder(name) for name in self.spans} & self.first.keys():
            for i in range(self.first[path], last[path]):
                covered[i].add(path)
        return covered

    def _begins(self, graph: OperationGraph, covered: Sequence[set[str]]) -> dict[int, int]:
        free, bytes_at = frozenset(allowed_starts(graph)), incoming_bytes(graph)
        firsts = frozenset(self.first.values())
        begins: dict[int, int] = {}
        inside = [i for i, layers in enumerate(covered) if layers]
        for before, i in itertools.pairwise(inside):
            places = [c for c in range(before + 1, i + 1) if c in free]
            if places and i in firsts and not covered[before] & covered[i]:
                begins[min(places, key=lambda c: (bytes_at[c], -c))] = i
        return begins

    def _holder(self, name: str) -> str:
        """Returns the layer that has a variable, `""` for none."""
        parts = name.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        return next((path for path in above if path in self._known), "")

    def _layers_traced_in(self, equation: Any) -> Iterator[str]:
        """Yields the layers in whose scopes an equation, or what it runs, was traced."""
        scope = str(equation.source_info.name_stack)
        if scope not in self._layer_of_scope:
            self._layer_of_scope[scope] = layer_of(scope, self._known) if scope else ""
        if self._layer_of_scope[scope]:
            yield self._layer_of_scope[scope]
            return
        for inner in jaxprs.inner_jaxprs(equation):
            for e in inner.eqns:
                yield from self._layers_traced_in(e)

    def of_stages(self, starts: Sequence[int]) -> list[tuple[str, ...]]:
        """Returns the layers of each stage; a layer that several stages share is in the first of them."""
        firsts = [self.begins.get(start, start) for start in starts]
        stage_of = {path: bisect_right(firsts, i) for path, i in self.first.items()}
        return [tuple(p for p in self.order if stage_of[p] == k) for k in range(len(starts) + 1)]

    def names_of_stages(self, starts: Sequence[int]) -> list[tuple[str, ...]]:
        """As `of_stages`, each path as short as it may be: `blocks.0` for all layers in it."""
        parts = self.of_stages(starts)
        names = []
        for own in parts:
            others = [path for part in parts if part is not own for path in part]
            names.append(tuple(dict.fromkeys(_shortest(path, others) for path in own)))
        return names

    def text(self, starts: Sequence[int]) -> str:
        """Returns the text that says where stages begin: the layers of each, with `|` in between.

        Raises:
            UserError: a stage that does not begin between layers; the message has the nearest stages that do.
        """
        for stage, start in enumerate(starts, 1):
            if start not in self.begins:
                near = self._nearest(starts)
                raise UserError(
                    f"pipeline: stage {stage} begins inside a layer, behind all of them, or with one that "
                    f"ran before, which cannot be written as layers; use stages={len(starts) + 1}, "
                    f"or "
                    + (f"the nearest that can be written, {self._short(near)!r}" if near else "fewer stages")
                )
        return "|".join(",".join(names) for names in self.names_of_stages(starts))

    def _nearest(self, starts: Sequence[int]) -> list[int]:
        """Returns the starts between layers that are nearest to `starts`; none if there are too few."""
        free = sorted(self.begins)
        found: list[int] = []
        if len(free) < len(starts):
            return []
        for number, start in enumerate(starts, 1):
            some = free[: len(free) - len(starts) + number]  # leaves as many as later stages need
            found.append(min(some, key=lambda c: abs(c - start)))
            free = [c for c in free if c > found[-1]]
        return found

    def _short(self, starts: Sequence[int]) -> str:
        """Returns a text that names just the first layer of each later stage."""
        heads = (names[0] for names in self.names_of_stages(starts)[1:])
        return "|".join([REST, *(f"{head},{REST}" for head in heads)])

    def starts(self, text: str, stages: int) -> list[int]:
        """Returns where the stages begin that a text names, see `split`.

        Raises:
            UserError: another number of stages, a pattern that matches nothing, layers that are left out,
                named twice or not in the order in which they run, a cut through a layer or a parameter.
        """
        parts = [[name.strip() for name in part.split(",") if name.strip()] for part in text.split("|")]
        if len(parts) != stages:
            raise UserError(
                f"stages={text!r} has {len(parts)} stages, {stages} are asked for; write the layers of "
                f"{stages} stages with | between them, such as {self.example(stages)!r}"
            )
        if not self.order:
            raise UserError(
                "stages: the model has no layers with paths of their own; leave stages out, or build the "
                "model from layers that are attributes of it"
            )
        stage_of = self._named(parts)
        self._fill(parts, stage_of)
        starts = []
        for stage in range(stages):
            own = [path for path in self.order if stage_of[path] == stage]
            if not own:
                raise UserError(
                    f"stages={text!r}: no layer is left for stage {stage}; name one, such as "
                    f"{self.example(stages)!r}"
                )
            starts += [self._start(own[0], stage_of)] if stage else []
        return starts

    def within(self, span: tuple[int, int]) -> list[str]:
        """Returns the layers that begin between two operations."""
        return [path for path in self.order if span[0] <= self.first[path] <= span[1]]

    def example(self, stages: int) -> str:
        """Returns some text that names so many stages, for messages."""
        later = [path for path in self.order if self.first[path] in self.begins.values()]
        step = len(later) / max(1, stages)
        heads = [later[int(step * k)] for k in range(1, stages)] if len(later) >= stages else []
        return "|".join([REST, *(f"{path},{REST}" for path in heads)])

    def _named(self, parts: Sequence[Sequence[str]]) -> dict[str, int]:
        """Returns the stages of the layers that the patterns match."""
        stage_of: dict[str, int] = {}
        pattern_of: dict[str, str] = {}
        patterns = [(p, k) for k, part in enumerate(parts) for p in part if p != REST]
        for pattern, stage in patterns:
            matched = [path for path in self.order if _matches(path, pattern)]
            if not matched:
                raise UserError(
                    f"stages: the pattern {pattern!r} matches no layer; the layers are "
                    f"{_listed(self.order)} (functions in between, such as relu, are not named)"
                )
            for path in matched:
                if stage_of.setdefault(path, stage) != stage:
                    raise UserError(
                        f"stages: {pattern_of[path]!r} in stage {stage_of[path]} and {pattern!r} in stage "
                        f"{stage} both match the layer {path!r}; name it in one of them"
                    )
                pattern_of[path] = pattern
        self._refuse_disorder(stage_of)
        return stage_of

    def _refuse_disorder(self, stage_of: Mapping[str, int]) -> None:
        named = [path for path in self.order if path in stage_of]
        for before, path in itertools.pairwise(named):
            if stage_of[path] < stage_of[before]:
                raise UserError(
                    f"stages: the layer {before!r} runs before {path!r} but is in the later stage "
                    f"{stage_of[before]}; stages take the layers in the order {_listed(self.order)}"
                )

    def _fill(self, parts: Sequence[Sequence[str]], stage_of: dict[str, int]) -> None:
        """Adds the stages of the layers that `...` stands for, one run of unnamed layers at a time."""
        named = frozenset(stage_of)
        end = 0
        for known, run in itertools.groupby(self.order, key=lambda path: path in named):
            layers = list(run)
            begin, end = end, end + len(layers)
            if known:
                continue
            before = stage_of[self.order[begin - 1]] if begin else None
            behind = stage_of[self.order[end]] if end < len(self.order) else None
            takers = _takers(parts, before, behind)
            if len(takers) != 1:
                raise UserError(self._unclear(layers, before or 0, takers))
            stage_of |= dict.fromkeys(layers, takers[0])

    def _unclear(self, missing: Sequence[str], stage: int, takers: Sequence[int]) -> str:
        if takers:
            return (
                f"stages: {_listed(missing)} could be in any of the stages {', '.join(map(str, takers))}; "
                f"name the first layer of each, as in {self.example(len(takers))!r}"
            )
        return (
            f"stages: {_listed(missing)} are in no stage; name them, for example in stage {stage}, or write "
            f"'{REST}' there for all layers in between"
        )

    def _start(self, path: str, stage_of: Mapping[str, int]) -> int:
        """Returns where the stage begins whose first layer is `path`."""
        i = self.first[path]
        together = [p for p in self.order if self.first[p] == i and stage_of[p] < stage_of[path]]
        if together:
            raise UserError(
                f"stages: {together[0]!r} and {path!r} run in one operation (a loop, or a block that is "
                f"computed again), which is not cut; put them into one stage"
            )
        for start, first in self.begins.items():
            if first == i:
                return start
        shared = (name for name, (a, b) in self.spans.items() if a < i <= b and self._holder(name) != path)
        name = next(shared, None)
        if name is None:
            raise UserError(
                f"stages: no stage can begin with {path!r}, which runs in between the operations of another "
                f"layer; put the two into one stage"
            )
        raise UserError(
            f"stages: a stage that begins with {path!r} would divide the uses of the parameter {name!r} "
            f"between two stages; put {_listed(self.within(self.spans[name]))} into one"
        )


def _takers(parts: Sequence[Sequence[str]], before: int | None, behind: int | None) -> list[int]:
    """Returns the stages whose `...` can stand for a run of unnamed layers.

    Args:
        parts: the patterns of each stage.
        before: the stage of the named layer before the run, None if there is none.
        behind: the stage of the named layer behind the run, None if there is none.
    """
    low, high = before or 0, len(parts) - 1 if behind is None else behind

    def takes(k: int) -> bool:
        if REST not in parts[k] or low == high:
            return REST in parts[k]
        # Next to a named layer of the same stage, `...` must stand at that edge of the stage's text.
        return (k != before or parts[k][-1] == REST) and (k != behind or parts[k][0] == REST)

    return [k for k in range(low, high + 1) if takes(k)]


def _holders(names: Sequence[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names} - {""}


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def _shortest(path: str, others: Sequence[str]) -> str:
    """Returns the shortest part of a path that begins no other."""
    parts = path.split(".")
    for n in range(1, len(parts)):
        head = ".".join(parts[:n])
        if not any(other == head or other.startswith(f"{head}.") for other in others):
            return head
    return path


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
