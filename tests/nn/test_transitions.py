"""Which layers' outputs reach which layer, and which of them are redistributed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardtrain import Layout, Trainer, make_mesh, models, nn, ops
from shardtrain.nn import partition, transitions
from shardtrain.nn.base import LayoutChanges
from shardtrain.plan.census import census

LATE = {"batch": ("data", "height"), "height": ()}
EARLY, AFTER = Layout(), Layout(batch=("data", "height"), height=())


class Branches(nnx.Module):
    """Two convolutions side by side and one after their sum."""

    def __init__(self, rngs):
        kinds = {"param_dtype": jnp.float64, "rngs": rngs}
        self.left, self.right = (nn.Conv(4, 4, (3, 3), **kinds) for _ in range(2))
        self.last = nn.Conv(4, 4, (3, 3), **kinds)

    def __call__(self, x):
        y = nnx.relu(self.left(x)) + jax.checkpoint(lambda x: jnp.tanh(self.right(x)))(x)
        return jax.jit(lambda y: self.last(2 * y))(y)


def branches(table):
    model, mesh = Branches(nnx.Rngs(0)), make_mesh("data=2,height=4")
    partition.assign(model, mesh, EARLY, table)
    return model, mesh


FIRST = "__call__.0"
X = jax.ShapeDtypeStruct((8, 8, 8, 4), jnp.float64)


def test_origins_go_through_elementwise_operators_and_branches():
    calls = {call.path: call for call in transitions.trace(branches({})[0], X)}
    assert calls["left"].origins == calls["right"].origins == {""}
    assert calls["last"].origins == {"left", "right"}
    assert calls["last"].shape_out == (8, 8, 8, 4)


class Loops(nnx.Module):
    """A layer in a branch and one in a loop, between two others."""

    def __init__(self, rngs):
        kinds = {"param_dtype": jnp.float64, "rngs": rngs}
        self.first, self.maybe, self.turn, self.last = (nn.Conv(4, 4, (3, 3), **kinds) for _ in range(4))

    def __call__(self, x):
        x = self.first(x)
        x = jax.lax.cond(x.sum() > 0, self.maybe, lambda x: 2 * x, x)
        x, _ = jax.lax.scan(lambda x, _: (self.turn(x), None), x, length=3)
        return self.last(x)


def test_origins_go_through_branches_and_loops():
    model, mesh = Loops(nnx.Rngs(0)), make_mesh("data=2,height=4")
    partition.assign(model, mesh, EARLY, {})
    arriving = {call.path: call.origins for call in transitions.trace(model, X)}
    assert arriving["maybe"] == {"first"}
    assert arriving["turn"] == {"first", "maybe", "turn"}
    assert arriving["last"] == {"turn"}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, ({}, {})),
        ({"last": LATE}, ({("last", FIRST): EARLY}, {}, AFTER)),
        (
            {"left": LATE, "right": LATE, "last": LATE},
            ({("left", FIRST): EARLY, ("right", FIRST): EARLY}, {}, AFTER),
        ),
        # `last` would get two layouts: one of its inputs leaves as the other does.
        ({"left": LATE}, ({("left", FIRST): EARLY}, {"left": EARLY})),
        ({"left": LATE, "last": LATE}, ({("left", FIRST): EARLY}, {"right": AFTER}, AFTER)),
    ],
)
def test_what_is_moved(table, expected):
    assert transitions.layout_changes(branches(table)[0], EARLY, X) == LayoutChanges(*expected)


@pytest.mark.parametrize(
    "table", [{}, {"last": LATE}, {"left": LATE}, {"*": LATE}, {"right": {"height": ()}}]
)
def test_numbers_do_not_depend_on_layouts(table):
    model, mesh = branches(table)
    x = jax.random.normal(jax.random.key(0), X.shape, X.dtype)

    def loss(model, x):
        with nn.resharded(model, EARLY, x):
            return jnp.sin(model(x)).sum()

    expected = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(model, x)
    with jax.set_mesh(mesh):
        found = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(model, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)


def test_the_trainer_moves_activations_by_all_to_all_only():
    """Batch cut late: what the cut of pixels would send later on is gone, for two all-to-alls."""
    import optax

    mesh = make_mesh("data=2,height=4")
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((8, 16, 16, 1)), np.arange(8) % 10
    table = dict.fromkeys(("conv2", "pool2", "flatten", "linear*", "head"), LATE)
    losses, kinds = [], []
    for layout in ({}, table):
        model = models.LeNet(image=(16, 16, 1), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        trainer = Trainer(model, optax.sgd(0.1), mesh=mesh, layout=layout)
        losses.append([row["loss"] for row in trainer.fit([batch] * 3, steps=3, progress=False)])
        kinds.append({(c.kind, c.axes) for c in census(trainer.compiled_text(), mesh)})
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)
    assert ("all-gather", ("height",)) in kinds[0]  # flatten
    assert ("all-to-all", ("height",)) not in kinds[0]
    assert ("all-to-all", ("height",)) in kinds[1]
    assert ("all-gather", ("height",)) not in kinds[1]


def test_a_wrong_origin_costs_bytes_and_no_numbers():
    mesh = make_mesh("data=2,height=4")
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 4), jnp.float64)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(lambda x: ops.reshard(x, AFTER, EARLY))(x), x)
