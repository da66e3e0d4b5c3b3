"""Data parallel layers before model parallel ones: three ways for the examples to travel, one result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, Trainer, UserError, make_mesh, nn, ops
from shardtrain.nn import partition, rounds, transitions
from shardtrain.plan import lines

EXAMPLES = {"batch": ("data", "channel"), "channels": ()}
TABLE = dict.fromkeys(("", "conv", "flatten", "rounds"), EXAMPLES)
MESHES = "channel=8", "data=2,channel=4"
WAYS = [(s, remat) for s in ("gather", "turns", "spread") for remat in (False, True)]


class Net(nnx.Module):
    def __init__(self, scheme="gather", remat=False, norm=False):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv, self.flatten = nn.Conv(1, 4, (3, 3), **kinds), nn.Flatten()
        self.rounds = nn.Rounds(scheme, remat=remat)
        self.dropout = nn.Dropout(0.4, rngs=nnx.Rngs(1))
        self.hidden, self.head = nn.Linear(64, 16, **kinds), nn.Linear(16, 10, **kinds)
        self.norm = nn.BatchNorm(16, **kinds) if norm else None

    def __call__(self, x):
        return self.rounds(Net.classify, self, self.flatten(nnx.relu(self.conv(x))))

    def classify(self, x):
        x = nnx.relu(self.hidden(self.dropout(x)))
        return self.head(x if self.norm is None else self.norm(x))


def images(count=64):
    r = np.random.default_rng(0)
    return r.standard_normal((count, 4, 4, 1)), r.standard_normal((count, 10))


def pulled(model, x, cotangent, mesh=None):
    """Outputs, every gradient, and the random streams afterwards."""
    default = Layout()
    if mesh is not None:
        default = partition.assign(model, mesh, default, TABLE)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, x, cotangent):
        def forward(params, x):
            merged = nnx.merge(graph, params, rest, copy=True)
            with transitions.resharded(merged, default, x) as layout:
                assert mesh is None or layout == Layout()  # that of the head
                y = merged(x)
            return y, nnx.to_pure_dict(nnx.state(merged, nnx.RngCount))

        y, pull, counts = jax.vjp(forward, params, x, has_aux=True)
        return y, pull(cotangent), counts

    if mesh is None:
        return jax.jit(run)(params, x, cotangent)
    with jax.set_mesh(mesh):
        return jax.jit(run)(params, x, cotangent)


@pytest.fixture(scope="module")
def one_device():
    return pulled(Net(), *images())


def check(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1.0, np.abs(b).max()), err_msg=str(path))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("scheme", "remat"), WAYS)
def test_every_scheme_has_the_numbers_of_one_device(scheme, remat, mesh, one_device):
    check(pulled(Net(scheme, remat), *images(), make_mesh(mesh)), one_device)


def wrong_order(rows, outer, inner, right=rounds._swapped):
    """Examples are distributed to rounds, but the results stay in the order of the rounds."""
    return rows if rows.ndim == 2 and rows.shape[-1] == 10 else right(rows, outer, inner)


def next_in_turn(x, turn, right=ops.take_turn, **options):
    """In round k the examples of the device after k."""
    return right(x, (turn + 1) % 4, **options)


def own_index(index, real=None, right=rounds.examples):
    """Dropout draws for the rows of a round as for the first rows of the batch."""
    return right(jnp.arange(index.shape[0]), real)


@pytest.mark.parametrize(
    ("where", "name", "wrong", "scheme"),
    [
        (rounds, "_swapped", wrong_order, "turns"),
        (rounds, "_swapped", wrong_order, "spread"),
        (ops, "take_turn", next_in_turn, "turns"),
        (rounds, "examples", own_index, "spread"),
    ],
)
def test_wrong_rounds_are_seen(where, name, wrong, scheme, one_device, monkeypatch):
    monkeypatch.setattr(where, name, wrong)
    got = pulled(Net(scheme), *images(), make_mesh("data=2,channel=4"))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(got, one_device)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_turn_is_one_devices_block_and_its_gradient_goes_back_there(mesh):
    mesh = make_mesh(mesh)
    n, layout = mesh.shape["channel"], Layout(**EXAMPLES)
    x, cotangent = images(128)[1], images(128 // n)[1]

    def reference(x, turn):
        return x.reshape(8 // n, n, -1, 10)[:, turn].reshape(-1, 10)

    for turn in (0, n - 1):
        expected, pull = jax.vjp(lambda x: reference(x, turn), x)  # noqa: B023
        with jax.set_mesh(mesh):
            y, back = jax.vjp(lambda x: ops.take_turn(x, turn, layout=layout), x)  # noqa: B023
            (dx,) = back(cotangent)
        assert y.sharding.spec[0] == P(tuple(a for a in ("data", "channel") if a in mesh.shape))[0] or n == 8
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(dx, pull(cotangent)[0])


def trainer(mesh, scheme="spread", table=TABLE, **options):
    return Trainer(Net(scheme, **options), optax.sgd(0.1), mesh=make_mesh(mesh), layout=table)


def labelled(count):
    return images(count)[0], np.arange(count, dtype=np.int32) % 10


def test_evaluation_is_one_round_and_takes_what_does_not_divide():
    one, many = (
        Trainer(Net(), optax.sgd(0.1), mesh=make_mesh("data=1", devices=jax.devices()[:1])),
        trainer("channel=8"),
    )
    x, y = labelled(50)
    assert many.evaluate([(x, y)]) == pytest.approx(one.evaluate([(x, y)]), rel=1e-12)
    np.testing.assert_allclose(many.predict(x[:3]), one.predict(x[:3]), rtol=1e-10)


def test_inputs_arrive_where_the_first_layers_want_them():
    batch = trainer("data=2,channel=4").place(*labelled(64))
    assert {shard.data.shape for shard in batch.inputs.addressable_shards} == {(8, 4, 4, 1)}
    batch = trainer("data=2,channel=4", table={k: v for k, v in TABLE.items() if k}).place(*labelled(64))
    assert {shard.data.shape for shard in batch.inputs.addressable_shards} == {(32, 4, 4, 1)}


def test_the_summary_shows_the_change_of_layout():
    x = jax.ShapeDtypeStruct((64, 4, 4, 1), jnp.float64)
    rows = {line.path: line for line in lines(Net("turns"), make_mesh("channel=8"), x, layout=TABLE)}
    block = 8 * 64 * 8  # bytes of a device's examples
    assert {s.kind for s in rows["dropout"].sent} == {"all-to-all"}
    assert rows["dropout"].bytes == 2 * block * 7 // 8
    assert rows["rounds"].bytes == 8 * 2 * block * 7 // 8
    assert list(rows) == ["conv", "flatten", "rounds", "dropout", "hidden", "head"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Rounds("all"), "nn.Rounds: scheme='all'; use 'gather', 'turns', 'spread'"),
        (
            lambda: step(trainer("channel=8"), 40),
            "layer 'rounds': a batch of 40 does not divide into 8 rounds on channel=8 devices; use a multiple of 64",
        ),
        (
            lambda: step(trainer("channel=8", table={"conv": EXAMPLES}), 64),
            "layer 'rounds': its batch is cut by nothing, and the last axis must be 'channel'; put 'rounds' into",
        ),
        (
            lambda: step(trainer("channel=8", norm=True), 64),
            r"nn.Rounds: 'norm.\w+' changes in a round, as statistics of the batch do",
        ),
        (
            lambda: turned(60, Layout(**EXAMPLES)),
            "take_turn: 60 examples do not divide by channel=8 and by the 8",
        ),
        (
            lambda: turned(64, Layout()),
            "take_turn: the batch is cut by nothing, and its last axis must be 'channel'",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def step(trainer, rows):
    return trainer.prepare(*labelled(rows))


def turned(rows, layout):
    with jax.set_mesh(make_mesh("channel=8")):
        return ops.take_turn(jnp.ones((rows, 4)), 0, layout=layout)
