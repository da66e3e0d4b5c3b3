"""The programs of a stage: what each costs, what it leaves to the next, and that the fastest ticks are run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardtrain as st
from shardtrain import compat
from shardtrain.pipeline import Costs, fastest, lockstep, make

from .parity import MICROBATCHES, Case

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
        for inner in compat.inner_jaxprs(equation):
            yield from equations(inner, kind)


def products(closed):
    return len(list(equations(closed.jaxpr, "dot_general")))


@pytest.fixture(scope="module")
def step(case):
    return jax.make_jaxpr(case.pipeline.train_step(case.batch))(case.state, case.batch).jaxpr


def test_i_does_what_several_gradients_share(case):
    """The first stage's inputs need no gradient, but the way to its first layer is shared by two parameters."""
    counts = [
        tuple(map(products, (p.forward, p.input_gradient, p.weight_gradient))) for p in case.pipeline.programs
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


def test_an_idle_tick_computes_nothing(step):
    (ticks,) = equations(step, "scan")
    (acts,) = equations(ticks.params["jaxpr"].jaxpr, "cond")
    idle, *others = acts.params["branches"]
    assert {e.primitive.name for e in equations(idle.jaxpr)} == {"broadcast_in_dim"}
    assert len(others) == 6  # F, I and W of two stages
    assert all(map(products, others))


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
    case.pipeline.eval_step(case.batch)
    (text,) = (record.getMessage() for record in caplog.records if "gathers" in record.getMessage())
    assert re.match(
        r"rev \(.*test_passes.py:\d+\) gathers an operand of shape \(2, 8, 8, 4\) over height", text
    )
