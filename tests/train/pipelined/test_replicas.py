"""Several models in one program, each cut into stages and channels: DistBelief's composition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain import UserError


class Net(nnx.Module):
    def __init__(self, rngs):
        kinds = {"param_dtype": jnp.float64, "rngs": rngs}
        self.conv = st.nn.Conv(1, 8, (3, 3), **kinds)
        self.norm = st.nn.BatchNorm(8, momentum=0.9, **kinds)
        self.late = st.nn.Conv(8, 8, (3, 3), strides=2, **kinds)
        self.flatten = st.nn.Flatten()
        self.head = st.nn.Linear(128, 4, **kinds)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.flatten(nnx.relu(self.late(x))))


def batches(part=slice(None)):
    r = np.random.default_rng(0)
    given = [(r.standard_normal((16, 8, 8, 1)), r.integers(0, 4, 16).astype(np.int32)) for _ in range(3)]
    return [(x[part], y[part]) for x, y in given]


PARTS = slice(0, 8), slice(8, 16)  # the rows of each of two replicas


def trainer(mesh):
    return st.Trainer(Net(nnx.Rngs(0)), optax.adam(0.01), mesh=mesh, accumulate=2, clip_norm=0.5)


def weights(model):
    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_each_replica_is_a_model_of_its_own_on_its_own_examples():
    ours = trainer(st.make_mesh("replica=2,pipe=2,channel=2"))
    rows = ours.fit(batches(), steps=3, progress=False)
    alone = []
    for part in PARTS:
        one = trainer(st.make_mesh("data=1", devices=jax.devices()[:1]))
        alone.append((one, one.fit(batches(part), steps=3, progress=False)))
    for number, (one, _) in enumerate(alone):
        theirs = weights(one.model)
        for path, value in weights(ours.replica(number)).items():
            np.testing.assert_allclose(value, theirs[path], rtol=0, atol=1e-10)
    for step, row in enumerate(rows):
        assert row["loss"] == pytest.approx(np.mean([r[step]["loss"] for _, r in alone]), rel=1e-12)
    parts = [
        one.evaluate([tuple(v[part] for v in batches()[0])])
        for part, (one, _) in zip(PARTS, alone, strict=True)
    ]
    for name, value in ours.evaluate(batches()[:1]).items():
        assert value == pytest.approx(np.mean([part[name] for part in parts]), rel=1e-9), name
    first, second = (weights(ours.replica(number)) for number in (0, 1))
    assert any(np.abs(first[path] - second[path]).max() > 1e-3 for path in first)


@pytest.mark.slow
def test_replicas_survive_a_checkpoint(tmp_path):
    ours = trainer(st.make_mesh("replica=2,pipe=2"))
    ours.fit(batches(), steps=2, progress=False)
    ours.save(tmp_path)
    early = trainer(st.make_mesh("replica=2,pipe=2"))
    early.restore(tmp_path)  # no batch has been seen, so that there are no stages yet
    again = trainer(st.make_mesh("replica=2,pipe=2,channel=2"))
    again.prepare(*batches()[0])
    again.restore(tmp_path)
    for number in (0, 1):
        theirs = weights(ours.replica(number))
        for one in (again, early):
            for path, value in weights(one.replica(number)).items():
                np.testing.assert_array_equal(value, theirs[path])
    x, _ = batches()[0]
    x = jnp.asarray(x)  # a model called by hand takes arrays of jax
    np.testing.assert_allclose(early.model(x), ours.model(x), rtol=0, atol=1e-12)
    for one in (ours, early):  # whose stages are packed only now, each replica's own
        one.fit(batches()[2:], steps=3, progress=False)
    for number in (0, 1):
        theirs = weights(ours.replica(number))
        for path, value in weights(early.replica(number)).items():
            np.testing.assert_allclose(value, theirs[path], rtol=0, atol=1e-12)


def test_replicas_without_stages_are_refused():
    with pytest.raises(UserError, match="add pipe=2, or use data=2"):
        trainer(st.make_mesh("replica=2,channel=2"))
