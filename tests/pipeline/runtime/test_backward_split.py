"""The programs of a stage: what each costs, what it leaves to the next, and that the fastest ticks are run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardtrain as st
from shardtrain import hlo, jaxprs
from shardtrain.pipeline import Costs, fastest, lockstep, make
from shardtrain.pipeline.schedules.tick_table import build

from ..parity import MICROBATCHES, Case

WIDTH = 16


class Wide(nnx.Module):
    """Six equal layers of which the products are all that counts."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.layers = nnx.List([st.nn.Linear(WIDTH, WIDTH, **kinds) for _ in range(6)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.fixture(scope="module")
def case():
    """Two layers, then four."""
    r = np.random.default_rng(0)
    batch = r.standard_normal((4 * MICROBATCHES, WIDTH)), r.integers(0, WIDTH, 4 * MICROBATCHES)
    schedule = make("1f1b", 2, MICROBATCHES)
    return Case.of(Wide(), "pipe=2", *batch, schedule, stages="layers.[01]|layers.[2345]")


def equations(jaxpr, kind=""):
    """All equations of a jaxpr, or those of a kind, what it calls among them."""
    for equation in jaxpr.eqns:
        if kind in ("", equation.primitive.name):
            yield equation
        for inner in jaxprs.inner_jaxprs(equation):
            yield from equations(inner, kind)


def loops(jaxpr):
    """The bodies of a jaxpr's own loops of unknown length."""
    return [e.params["body_jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "while"]


def products(jaxpr):
    return len(list(equations(jaxpr, "dot_general")))


@pytest.fixture(scope="module")
def step(case):
    return jax.make_jaxpr(case.pipeline.train_step(case.batch))(case.state, case.batch).jaxpr


def test_i_does_what_several_gradients_share(case):
    """The first stage's inputs need no gradient, but the way to its first layer is shared by two parameters."""
    counts = [
        tuple(products(closed.jaxpr) for closed in (p.forward, p.input_gradient, p.weight_gradient))
        for p in case.pipeline.programs
    ]
    assert counts == [(2, 1, 2), (4, 4, 4)]


def test_costs_are_those_of_the_stages(case):
    costs = case.pipeline.costs
    for row, counts in ((costs.forward, (2, 4)), (costs.input, (1, 4)), (costs.weight, (2, 4))):
        assert row[1] / row[0] == pytest.approx(counts[1] / counts[0], rel=0.15)
    assert costs != Costs.equal(2)


def test_the_fastest_ticks_are_those_that_run(case, step):
    pipe = case.pipeline
    asked = pipe.plan.schedule
    best = fastest(asked, pipe.costs)
    assert lockstep(best, pipe.costs).makespan < lockstep(asked, pipe.costs).makespan
    assert pipe.schedule.orders == best.orders != asked.orders
    (ticks,) = equations(step, "scan")
    assert ticks.params["length"] == len(lockstep(best).table) != len(lockstep(asked).table)


def test_an_idle_tick_computes_nothing(case, step):
    (ticks,) = equations(step, "scan")
    tick = ticks.params["jaxpr"].jaxpr
    *stages, _ = loops(tick)
    assert [[products(act) for act in loops(stage)] for stage in stages] == [[2, 1, 2], [4, 4, 4]]
    assert products(tick) == 2 + 1 + 2 + 4 + 4 + 4
    # nor does XLA move out of the loops what is the same in all their turns
    program = jax.jit(case.pipeline.train_step(case.batch)).lower(case.state, case.batch).compile()
    entry, computations = hlo.parse(program.as_text())
    found, todo = [], [(entry, ())]
    for name, outside in todo:
        for instruction in computations[name]:
            inside = (*outside, instruction.at_most_once) if instruction.op == "while" else outside
            found += [inside] if instruction.op == "dot" else []
            todo += [(call.name, inside) for call in instruction.calls]
    assert found == [(False, True, True)] * 17  # ticks, a stage's, an action's


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "zb-v"])
def test_what_is_sent_is_what_the_next_stage_needs(schedule):
    asked = make(schedule, 4, 8)
    ticks, last, ranks = lockstep(asked), asked.stages - 1, asked.ranks_of
    table = build(asked, ticks)
    expected = []
    for row in ticks.table:
        steps = [(a.stage, a.stage + (1 if a.kind == "F" else -1)) for a in row if a and a.kind != "W"]
        sent = {(ranks[to] - ranks[at]) % 4 for at, to in steps if 0 <= to <= last}
        expected.append([distance in sent for distance in table.routes])
    np.testing.assert_array_equal(table.travels(table.rows), expected)
    assert 0.25 < np.mean(expected) < 0.9


def test_messages_go_where_a_tick_has_any(step):
    (ticks,) = equations(step, "scan")
    tick = ticks.params["jaxpr"].jaxpr
    *_, route = loops(tick)
    assert len(list(equations(tick, "ppermute"))) == 1
    assert len(list(equations(route, "ppermute"))) == 1


class Flipped(nnx.Module):
    """Turns its images upside down."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.first, self.second = st.nn.Conv(2, 4, (3, 3), **kinds), st.nn.Conv(4, 4, (3, 3), **kinds)
        self.mean, self.head = st.nn.GlobalAvgPool(), st.nn.Linear(4, 5, **kinds)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        x = jnp.flip(x, 1)
        return self.head(self.mean(jnp.tanh(self.second(x))))


def test_what_stages_gather_is_logged_once(caplog):
    """Whatever programs it is in: of training, its gradient and evaluation."""
    r = np.random.default_rng(0)
    batch = r.standard_normal((8, 8, 8, 2)), r.integers(0, 5, 8)
    case = Case.of(Flipped(), "pipe=2,height=2", *batch, make("1f1b", 2, MICROBATCHES))
    case.pipeline.step("evaluate", case.batch)
    (text,) = (record.getMessage() for record in caplog.records if "gathers" in record.getMessage())
    assert re.match(
        r"rev \(.*test_backward_split.py:\d+\) gathers an operand of shape \(2, 8, 8, 4\) over height", text
    )
