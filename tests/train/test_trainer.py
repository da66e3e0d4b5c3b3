"""The trainer: the numbers of one device on every mesh, and of the big batch whatever its parts."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardtrain import data, models, nn
from shardtrain.errors import UserError
from shardtrain.mesh import make_mesh
from shardtrain.ops import flatten
from shardtrain.plan import census
from shardtrain.train import Trainer, losses
from shardtrain.train.extra import on_devices

# nnx.BatchNorm keeps float32 statistics in a float64 model.
pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")

MESHES = ["data=1", "data=8", "height=4,width=2", "data=2,height=2,channel=2", "channel=8"]


class Small(nnx.Module):
    """One of everything that a residual network has, on images of odd size."""

    def __init__(self, seed=0, norm=True, rate=0.3):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(seed)}
        self.conv = nn.Conv(1, 8, (3, 3), 2, **kinds)
        self.norm = nn.BatchNorm(8, momentum=0.9, **kinds) if norm else None
        self.pool = nn.MaxPool((2, 2))
        self.dropout = nn.Dropout(rate, rngs=nnx.Rngs(seed + 1))
        self.head = nn.Linear(8 * 3 * 3, 5, **kinds)

    def __call__(self, x):
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return self.head(flatten(self.dropout(self.pool(nnx.relu(x)))))


class Plain(nnx.Module):
    """A user's model of plain nnx layers."""

    def __init__(self, groups=1, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        kinds = {"param_dtype": jnp.float64, "rngs": rngs}
        self.conv = nnx.Conv(1, 8, (3, 3), **kinds)
        self.conv2 = nnx.Conv(8, 8, (3, 3), feature_group_count=groups, **kinds)
        self.norm = nnx.BatchNorm(8, **kinds)
        self.head = nnx.Linear(8, 5, **kinds)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv2(nnx.relu(self.conv(x))))).mean((1, 2)))


class WithParam(Small):
    """Has one more parameter."""

    def __init__(self, value):
        super().__init__()
        self.extra = nnx.Param(value)


class WithArray(Small):
    def __init__(self):
        super().__init__()
        self.extra = nnx.data(jnp.ones(3))


class Sowing(Small):
    def __call__(self, x):
        with warnings.catch_warnings(action="ignore"):  # nnx warns of it, too
            self.sow(nnx.Intermediate, "seen", x)
        return super().__call__(x)


class WithScale(Small):
    def __init__(self):
        super().__init__()
        self.scale = nnx.LoRA(8, 2, 8, rngs=nnx.Rngs(0))


def images(count, seed=0, rows=7):
    r = np.random.default_rng(seed)
    return r.standard_normal((count, rows, rows, 1)), r.integers(0, 5, count).astype(np.int32)


def feed(batch=16, count=64, seed=0):
    x, y = images(count, seed)
    for start in itertools.cycle(range(0, count, batch)):
        yield x[start : start + batch], y[start : start + batch]


def curve(trainer, steps=6, batch=16):
    return [row["loss"] for row in trainer.fit(feed(batch), steps=steps, progress=False)]


def small_trainer(spec="data=2,height=2,channel=2", *, model=None, **kwargs):
    return Trainer(model or Small(), optax.sgd(0.1, momentum=0.9), mesh=make_mesh(spec), **kwargs)


@pytest.fixture(scope="module")
def reference():
    trainer = small_trainer("data=1")
    return curve(trainer), trainer


@pytest.mark.parametrize("spec", MESHES[1:])
def test_losses_and_weights_are_those_of_one_device(spec, reference):
    trainer = small_trainer(spec)
    np.testing.assert_allclose(curve(trainer), reference[0], rtol=1e-11)
    for name, value in reference[1].state.params.items():
        np.testing.assert_allclose(trainer.state.params[name], value, rtol=1e-8, atol=1e-11, err_msg=name)
    for name, value in reference[1].state.model_state.items():
        np.testing.assert_allclose(trainer.state.model_state[name], value, rtol=1e-5, err_msg=name)
    x, y = images(50, seed=1)
    assert trainer.evaluate([(x, y)]) == pytest.approx(reference[1].evaluate([(x, y)]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("spec", MESHES[1:])
def test_the_residual_network_on_digits_in_float64(spec):
    """The criterion of the main job: 20 steps within 1e-9 of one device."""
    digits = data.load("digits")

    def run(spec):
        model = models.ResNet(8, 10, 1, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        trainer = Trainer(model, optax.sgd(0.05, momentum=0.9), mesh=make_mesh(spec))
        return [
            r["loss"]
            for r in trainer.fit(data.train_batches(digits.train, 64, seed=0), steps=20, progress=False)
        ]

    np.testing.assert_allclose(run(spec), run("data=1"), rtol=1e-9)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(parts, reference):
    """Dropout included, batch norm left out: its statistics are those of a microbatch."""
    whole = small_trainer(model=Small(norm=False))
    split = small_trainer("data=4,height=2", model=Small(norm=False), accumulate=parts)
    np.testing.assert_allclose(curve(split), curve(whole), rtol=1e-11)


def test_sharded_parameters_change_no_number(reference):
    trainer = small_trainer("data=4,channel=2", parameters="data")
    np.testing.assert_allclose(curve(trainer), reference[0], rtol=1e-11)
    kernel = trainer.state.params["head.kernel"]
    assert kernel.sharding.spec == P(("channel", "data"), None)
    momentum = jax.tree.leaves(trainer.state.opt_state)
    assert {m.sharding.spec for m in momentum if m.shape == kernel.shape} == {kernel.sharding.spec}
    whole = sum(p.nbytes for p in trainer.state.params.values())
    held = sum(p.addressable_shards[0].data.nbytes for p in trainer.state.params.values())
    assert held < whole / 4


def test_sharded_parameters_are_gathered_again_in_the_backward_pass():
    """As the program asks; XLA's CPU compiler merges the two gathers, which is its right."""
    trainer = small_trainer("data=8", parameters="data", model=Small(norm=False))
    batch = trainer.place(*next(feed()))
    with jax.set_mesh(trainer.mesh):
        lowered = jax.jit(trainer._program.train_step).lower(on_devices(trainer.state), batch).as_text()
    gathers = [line for line in lowered.splitlines() if '"stablehlo.all_gather"' in line]
    assert sum("tensor<72x5xf64>" in line for line in gathers) == 2


def test_ragged_batches_mean_over_real_examples():
    """A last batch of 5 of 16: the same as training on those 5 alone, on one device."""
    x, y = images(21)
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    mesh = small_trainer("data=2,height=2,channel=2", model=Small(rate=0.0))
    found = [r["loss"] for r in mesh.fit(batches, steps=2, progress=False)]
    one = small_trainer("data=1", model=Small(rate=0.0))
    expected = [r["loss"] for r in one.fit([batches[0]], steps=1, progress=False)]
    one._batch_size = None
    expected += [r["loss"] for r in one.fit([batches[1]], steps=2, progress=False)]
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    for name, value in one.state.params.items():
        np.testing.assert_allclose(mesh.state.params[name], value, rtol=1e-8, atol=1e-11, err_msg=name)


def test_an_empty_microbatch_leaves_the_running_statistics_alone():
    """One real row of 8 in 4 microbatches, three of which hold no example: as one batch of that row."""
    x, y = images(9)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]

    def statistics(accumulate):
        trainer = small_trainer("data=2", accumulate=accumulate)
        trainer.fit(batches[:1], steps=1, progress=False)
        state = dict(trainer.state.model_state)
        before = {key: np.array(state[key]) for key in ("norm.mean", "norm.var")}
        trainer.fit(batches[1:], steps=2, progress=False)
        return before, {key: np.array(trainer.state.model_state[key]) for key in before}

    (start, end), (whole_start, whole_end) = statistics(4), statistics(1)
    for key in start:
        # Each moved once towards the statistics of the same row, by a tenth of the way.
        target, whole_target = (
            (e - 0.9 * s) / 0.1 for s, e in ((start[key], end[key]), (whole_start[key], whole_end[key]))
        )
        np.testing.assert_allclose(target, whole_target, rtol=0.2, atol=0.05)


def test_layers_that_stay_whole_are_said(caplog):
    small_trainer("channel=3")
    assert "channels do not divide by channel=3 in conv:" in caplog.text
    caplog.clear()
    small_trainer("data=8", parameters="data")
    assert "not spread, since no dimension divides by 8: head.bias" in caplog.text


def test_evaluation_over_ragged_batches_is_no_mean_of_means():
    trainer = small_trainer()
    x, y = images(21)
    whole = trainer.evaluate([(x, y)])
    parts = [(x[:16], y[:16]), (x[16:], y[16:])]
    assert trainer.evaluate(parts) == pytest.approx(whole, rel=1e-12)
    mutant = np.mean([trainer.evaluate([part])["loss"] for part in parts])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(mutant, whole["loss"], rtol=1e-6)


def test_predict_gives_every_row_on_the_host():
    trainer = small_trainer()
    x, y = images(21)
    outputs = trainer.predict(x)
    assert outputs.shape == (21, 5)
    np.testing.assert_allclose(outputs, trainer.model(jnp.asarray(x)), rtol=1e-10)
    assert trainer.evaluate([(x, y)])["accuracy"] == pytest.approx((outputs.argmax(-1) == y).mean())


def test_clipping_is_by_the_global_norm():
    """Against optax on one device, with a norm that clips every step."""
    found = curve(small_trainer("height=2,channel=2", clip_norm=0.05))
    one = Trainer(
        Small(),
        optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1, momentum=0.9)),
        mesh=make_mesh("data=1"),
    )
    np.testing.assert_allclose(found, curve(one), rtol=1e-11)


def test_low_precision_computes_in_it_and_keeps_the_parameters():
    trainer = small_trainer(dtype="bfloat16")
    full, low = curve(small_trainer()), curve(trainer)
    np.testing.assert_allclose(low, full, rtol=0.05)
    assert low != full
    assert {p.dtype for p in trainer.state.params.values()} == {jnp.dtype("float64")}
    text = trainer.compiled_text()
    assert "bf16[" in text


@pytest.mark.parametrize("remat", ["contractions", "nothing", jax.checkpoint_policies.dots_saveable])
def test_remat_changes_no_number(remat, reference):
    np.testing.assert_allclose(curve(small_trainer(remat=remat)), reference[0], rtol=1e-11)


@pytest.mark.slow
def test_remat_keeps_less():
    def temporary(remat):
        model = models.ResNet(8, 10, 1, width=8, rngs=nnx.Rngs(0))
        trainer = Trainer(model, optax.sgd(0.1), mesh=make_mesh("data=2"), remat=remat)
        x = np.zeros((256, 8, 8, 1), np.float32)
        step = trainer.prepare(x, np.zeros(256, np.int32))
        return step.memory_analysis().temp_size_in_bytes

    assert temporary("contractions") < 0.75 * temporary(None)


def test_layout_table_moves_the_cut(reference):
    trainer = small_trainer(layout={"head": {"channels": ()}})
    assert trainer.state.params["head.kernel"].sharding.spec == P(None, None)
    np.testing.assert_allclose(curve(trainer), reference[0], rtol=1e-11)


@pytest.mark.parametrize("parameters", ["", "data"])
def test_a_model_of_plain_layers_trains_data_parallel(parameters):
    def run(spec, **kwargs):
        return curve(small_trainer(spec, model=Plain(), **kwargs))

    np.testing.assert_allclose(run("data=8", parameters=parameters or ()), run("data=1"), rtol=1e-10)


def test_the_users_model_keeps_its_own_arrays():
    model = Small()
    before = np.array(model.conv.kernel[...])
    curve(small_trainer(model=model), steps=2)
    np.testing.assert_array_equal(model.conv.kernel[...], before)


@pytest.mark.parametrize(
    "other",
    [*(pytest.param(m, marks=pytest.mark.slow) for m in ("data=1", "height=4,width=2")), "data=4,channel=2"],
)
def test_a_restored_run_goes_on_as_if_never_stopped(other, reference, tmp_path):
    first = small_trainer()
    curve(first, steps=3)
    first.save(tmp_path / "run")
    second = small_trainer(other, parameters="data" if "data=4" in other else ())
    assert second.restore(tmp_path / "run") == 3
    rest = [r["loss"] for r in second.fit(itertools.islice(feed(), 3, None), steps=6, progress=False)]
    np.testing.assert_allclose(rest, reference[0][3:], rtol=1e-11)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    small_trainer().save(tmp_path / "run")
    with pytest.raises(UserError, match="does not fit this model"):
        small_trainer(model=Small(norm=False)).restore(tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint in"):
        small_trainer().restore(tmp_path / "nothing")


def test_every_parameter_gradient_is_summed_once():
    trainer = small_trainer("data=2,height=2,width=2", model=Small(norm=False, rate=0.0))
    trainer.fit(feed(), steps=1, progress=False)
    rows = census.census(trainer.compiled_text(), trainer.mesh)
    sums = [row for row in rows if row.kind == "all-reduce" and row.axes == ("data", "height", "width")]
    payloads = sorted(row.payload for row in sums)
    expected = [trainer.state.params[name].nbytes for name in ("conv.kernel", "conv.bias")]
    assert all(payloads.count(size) == 1 for size in expected)
    heads = [row for row in rows if row.payload == trainer.state.params["head.kernel"].nbytes]
    assert len(heads) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: small_trainer("pipe=2"),
            "mesh pipe=2 with accumulate=1: its stages would work one at a time; .* such as accumulate=8",
        ),
        (lambda: small_trainer("channel=7"), r"channel=7 cuts nothing .*1, 5, 8, 72 channels"),
        (lambda: small_trainer("depth=2"), "depth=2 cuts nothing"),
        (
            lambda: small_trainer(model=Plain()),
            "'conv' is a plain nnx.Conv.* use shardtrain.nn.Conv with the same",
        ),
        (
            lambda: small_trainer("height=8", parameters="data"),
            "parameters='data': the mesh has no such axis",
        ),
        (lambda: small_trainer(layout={"neck": {}}), "'neck' matches no layer"),
        (
            lambda: small_trainer("height=2,width=4", layout={"head": {"channels": "width", "width": ()}}),
            "'head' has 5 channels, which do not divide by width=4",
        ),
        (
            lambda: small_trainer("data=2", model=Plain(), layout={"conv": {"batch": ()}}),
            "'conv' is a plain Conv, which has no layout",
        ),
        (
            lambda: small_trainer(remat="everything"),
            "remat='everything'; there are None, 'contractions', 'nothing'",
        ),
        (lambda: small_trainer(accumulate=0), "accumulate=0"),
        (lambda: small_trainer(clip_norm=0.0), "clip_norm=0.0"),
        (lambda: small_trainer(clip_norm=float("nan")), "clip_norm=nan"),
        (lambda: small_trainer("data=8").rows(12), "batch of 12 does not divide by data=8; use 8 or 16"),
        (
            lambda: curve(small_trainer("data=8"), batch=20),
            "batch of 20 does not divide by the 8 shards .* use 16",
        ),
        (lambda: curve(small_trainer("data=8", accumulate=4)), "times 4 microbatches; use 32"),
        (lambda: small_trainer().evaluate([]), "there are no examples"),
        (
            lambda: small_trainer().fit([(np.ones((8, 7, 7, 1)), np.ones(7, int))], steps=1),
            "disagree on its rows",
        ),
        (
            lambda: small_trainer(loss=lambda y, t: losses.cross_entropy(y, t).mean()).fit(feed(), steps=1),
            "loss returned shape \\(\\) for 16 examples",
        ),
        (
            lambda: small_trainer("data=2", model=Plain(groups=2)).fit(feed(), steps=1),
            "convolution outside.*groups",
        ),
        (
            lambda: small_trainer().evaluate([(np.ones((0, 7, 7, 1)), np.ones(0, int))]),
            "there are no examples",
        ),
        (
            lambda: small_trainer().fit([(np.ones((0, 7, 7, 1)), np.ones(0, int))], steps=1),
            "batch has no rows",
        ),
        (lambda: small_trainer(dtype="bf16"), "dtype='bf16'; compute in 'bfloat16'"),
        (lambda: small_trainer(dtype="int32"), "dtype='int32'"),
        (
            lambda: small_trainer("data=2,replica=2", parameters="replica"),
            "parameters='replica', but replicas have parameters of their own",
        ),
        (lambda: small_trainer("data=7", parameters="data"), "so nothing would be spread"),
        (
            lambda: small_trainer("data=2", model=WithParam(jnp.ones((2, 0)))),
            r"'extra' has the shape \(2, 0\), no elements",
        ),
        (
            lambda: small_trainer("data=2", model=WithParam(jnp.arange(3))),
            "'extra' is an nnx.Param of int64, which has no gradient",
        ),
        (
            lambda: small_trainer("data=2", model=WithArray()),
            "'extra' is a bare array, of which nothing says whether it is trained; make it an nnx.Param",
        ),
        (
            lambda: small_trainer("data=2", model=Sowing()).fit(feed(), steps=1),
            "the model sows 'seen', which a training step has no place for",
        ),
        (
            lambda: small_trainer("channel=2", model=WithScale()),
            "'scale', a plain LoRA, would be kept whole",
        ),
        (lambda: small_trainer().compiled_text(), "no compiled step yet"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_windows_outside_the_operators_are_refused_where_pixels_are_cut():
    class Mixed(Small):
        def __call__(self, x):
            return super().__call__(nnx.max_pool(x, (1, 1)))

    with pytest.raises(
        UserError, match=r"max pooling outside .*test_trainer.py:\d+.*use shardtrain.ops.max_pool"
    ):
        curve(small_trainer("height=2", model=Mixed()))
    assert curve(small_trainer("data=2", model=Mixed()), steps=1)


def test_a_ragged_batch_and_a_plain_batch_norm_do_not_go_together():
    x, y = images(21)
    trainer = small_trainer("data=2", model=Plain())
    with pytest.raises(UserError, match=r"'norm' is a plain nnx.BatchNorm.*use shardtrain.nn.BatchNorm"):
        trainer.fit([(x[:16], y[:16]), (x[16:], y[16:])], steps=2, progress=False)


def test_batches_that_end_early_are_said(caplog):
    rows = small_trainer("data=2").fit(itertools.islice(feed(), 2), steps=5, progress=False)
    assert len(rows) == 2
    assert "batches ended after step 2 of 5" in caplog.text
