"""Wrong pipelines, each of which the comparison with one device notices."""

import dataclasses

import jax
import numpy as np
import pytest

from shardtrain.pipeline import make
from shardtrain.pipeline.runtime.tick_loop import TickLoop, _Actions
from shardtrain.pipeline.schedules.tick_table import COLUMNS, POOLS

from ..parity import TOLERANCE, largest_difference
from ..tables import legal
from ..tiny import Runs

MICROBATCHES = 4


@pytest.fixture(scope="module")
def runs():
    named = [make(name, 3, MICROBATCHES) for name in ("gpipe", "1f1b", "zb-h1")]
    schedules = [*named, *(s.with_split() for s in named[:2])]
    random = [legal(seed, "IW", ((0, 1, 2), MICROBATCHES)) for seed in range(10)]
    found = Runs.of("pipe=3,data=2", [*schedules, *random])
    return found, {s.name + str(i): found.rows(s) for i, s in enumerate([*schedules, *random])}


def of_kind(runs, rows, kind):
    """Where (tick, rank) an action of a kind stands."""
    numbers = [i for i, b in enumerate(runs.together.branches) if b is not None and b[1] == kind]
    return np.isin(rows[:, :, 0], numbers)


def column(rows, name):
    return rows[:, :, COLUMNS.index(name)]


def slots_reused(pool):
    """The last slot of a pool is not there: who was to have it takes the first."""

    def mutate(runs, rows):
        values = column(rows, pool)
        values[values == values.max()] = 0
        return rows

    return mutate


def inbox_reused(runs, rows):
    """The same for messages."""
    last = runs.together.inbox - 1
    for values in (column(rows, "inbox"), rows[:, :, len(COLUMNS) :]):
        values[values == last] = 0
    return rows


def messages_moved(ticks):
    """Messages are taken so many ticks late; where there is no later tick, never."""

    def mutate(runs, rows):
        where = rows[:, :, len(COLUMNS) :]
        where[...] = np.roll(where, ticks, 0)
        return rows

    return mutate


def others_activations(runs, rows):
    """The `W` of two microbatches have their slots exchanged."""
    there = of_kind(runs, rows, "W")
    for rank in range(rows.shape[1]):
        ticks = np.flatnonzero(there[:, rank])
        if len(ticks) > 1:
            slots = column(rows, "lasting")
            slots[ticks[:2], rank] = slots[ticks[1::-1], rank]
    return rows


def others_examples(kind):
    """An action has the inputs and targets of another microbatch."""

    def mutate(runs, rows):
        last = len(runs.case.pipeline.programs) - 1
        at = np.isin(rows[:, :, 0], [runs.together.branches.index((0 if kind == "F" else last, kind))])
        column(rows, "microbatch")[at] = (column(rows, "microbatch")[at] + 1) % MICROBATCHES
        return rows

    return mutate


def action_dropped(kind):
    """The last action of a kind is not done."""

    def mutate(runs, rows):
        for tick, rank in np.argwhere(of_kind(runs, rows, kind))[-1:]:
            rows[tick, rank, 0] = 0
        return rows

    return mutate


ROWS = {
    "slots of saved reused": slots_reused("saved"),
    "slots of lasting reused": slots_reused("lasting"),
    "slots of between reused": slots_reused("between"),
    "slots of messages reused": inbox_reused,
    "messages a tick late": messages_moved(1),
    "messages a tick early": messages_moved(-1),
    "W with another microbatch's activations": others_activations,
    "F with another microbatch's examples": others_examples("F"),
    "no last W": action_dropped("W"),
    "no last I": action_dropped("I"),
}


@pytest.mark.parametrize("mutant", ROWS)
def test_wrong_rows_are_noticed(runs, mutant):
    found, tables = runs
    noticed = 0
    for name, rows in tables.items():
        wrong = ROWS[mutant](found, rows.copy())
        if (wrong != rows).any():
            assert found.gap(wrong) > 1e-6, name
            noticed += 1
    assert noticed >= len(tables) / 2


def test_the_right_rows_are_right(runs):
    found, tables = runs
    assert max(found.gap(rows) for rows in tables.values()) < TOLERANCE


def test_whatever_nothing_was_written_to_is_not_a_number(runs):
    """Messages of idle ranks, too; what leaks would be seen in the results."""
    pipe = runs[0].case.pipeline
    loop = dataclasses.replace(pipe._loop(pipe.schedule, pipe.programs, 1 + pipe.sums), filler=float("nan"))
    carry = _Actions(loop, {}, {}, lambda i: []).first_carry({})
    empty = [v for name in ("message", "inbox", *POOLS) for v in carry[name].values()]
    assert all(np.isnan(v).all() for v in empty if np.issubdtype(v.dtype, np.floating))
    assert min(len(carry[name]) for name in ("message", "inbox", *POOLS)) > 0


def silenced(closed, which):
    """A program one of whose results is zeros."""

    def run(*args):
        outs = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *args)
        return [0 * v if i == which else v for i, v in enumerate(outs)]

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(run, axis_env=[("data", 2)])(*shapes)


def changed_stage(k, **changes):
    def change(loop: TickLoop) -> TickLoop:
        program = loop.programs[k]
        new = {name: make(getattr(program, name)) for name, make in changes.items()}
        return dataclasses.replace(
            loop,
            programs=tuple(
                dataclasses.replace(p, **new) if i == k else p for i, p in enumerate(loop.programs)
            ),
        )

    return change


class Unsummed(TickLoop):
    def summed(self, grads):
        return grads


def unsummed(loop: TickLoop) -> TickLoop:
    return Unsummed(**{f.name: getattr(loop, f.name) for f in dataclasses.fields(loop)})


LOOPS = {
    "right": lambda loop: loop,
    "a skip is dropped": changed_stage(0, forward=lambda closed: silenced(closed, 1)),
    "a skip's gradient is dropped": changed_stage(1, input_gradient=lambda closed: silenced(closed, 1)),
    "gradients are not summed over data": unsummed,
}


@pytest.mark.parametrize("mutant", LOOPS)
def test_wrong_stages_are_noticed(mutant):
    schedule = make("1f1b", 3, MICROBATCHES)
    runs = Runs.of("pipe=3,data=2", [schedule], change=LOOPS[mutant])
    assert len(runs.case.pipeline.programs[0].outs) > 1
    gap = runs.gap(runs.rows(schedule))
    assert (gap < TOLERANCE) if mutant == "right" else (gap > 1e-6)


def test_every_array_counts_by_its_own_size():
    right = [np.ones(3), np.full(2, 1e-7), np.array([1e-16])]
    assert largest_difference(right, right) == 0
    assert largest_difference([right[0], np.array([1e-7, 1.1e-7]), right[2]], right) == pytest.approx(0.1)
    assert largest_difference([*right[:2], np.array([-3e-16])], right) == 0  # rounding of zero
    assert largest_difference([*right[:2], np.array([1e-7])], right) == float("inf")
    assert largest_difference([np.full(3, np.nan), *right[1:]], right) == float("inf")
