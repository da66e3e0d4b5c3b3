"""Every optimizer of optax: the numbers of a plain loop on one device, a checkpoint, stages; or a sentence."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax._src import alias
from pipelined_models import Deep, batches, close, trainer
from unchecked import made

import shardtrain as st
from shardtrain import UserError

pytestmark = pytest.mark.filterwarnings('ignore:"seed" is deprecated:DeprecationWarning')

DATA = batches()
RATE = 0.01

WRAPPED = {
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(7)), optax.sgd(RATE)),
    "add_noise, legacy key": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.PRNGKey(7)), optax.sgd(RATE)
    ),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(RATE), optax.contrib.reduce_on_plateau(patience=0, factor=0.5, rtol=0.9)
    ),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(RATE)),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(RATE), RATE),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(RATE)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(RATE)),
    "skip_not_finite": lambda: optax.MultiSteps(
        optax.sgd(RATE), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(RATE),
}
"""Transformations that are no optimizers by themselves, and wrappers around one."""

REFUSED = {
    "lbfgs": "a line search",
    "sophia": "does not take these parameters",
    "dpsgd": "does not take these parameters",
}
"""Optimizers that ask for what a training step does not have: the loss elsewhere, gradients by example."""


def makers():
    """All functions of optax that take a learning rate and return a transformation, and the wrappers above."""
    found = dict(WRAPPED)
    for module, names in ((optax, dir(alias)), (optax.contrib, dir(optax.contrib))):
        for name in names:
            make = getattr(module, name, None)
            if name.startswith(("_", "scale_by", "schedule_free_eval")) or not inspect.isfunction(make):
                continue
            if "learning_rate" in (given := inspect.signature(make).parameters) and name not in found:
                found[name] = lambda make=make, given=given: make(**arguments(given))
    return found


def arguments(given):
    """The learning rate, and what has no default."""
    known = {"learning_rate": RATE, "noise_multiplier": 0.1, "l2_norm_clip": 1.0, "seed": 0}
    known |= {"key": jax.random.key(0)}
    needed = {n for n, p in given.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    return {n: value for n, value in known.items() if n in needed | ({"learning_rate", "key"} & {*given})}


MAKERS = makers()
QUICK = ["adam", "polyak_sgd", "clip_by_global_norm", "add_noise", "reduce_on_plateau"]
TAKEN = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in MAKERS
    if name not in REFUSED
]


def plain(make, steps):
    """The parameters after a loop that is written out, on one device."""
    optimizer = optax.with_extra_args_support(make())
    graph, variables, rest = nnx.split(Deep(), nnx.Param, ...)
    paths = [path for path, _ in nnx.to_flat_state(variables)]
    params = {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(variables)}

    def loss(params, x, y):
        state = nnx.from_flat_state([(p, nnx.Param(params[".".join(map(str, p))])) for p in paths])
        return st.losses.cross_entropy(nnx.merge(graph, state, rest)(x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(grads, state, params, value=value.astype(jnp.float32), grad=grads)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for at in range(steps):
        params, state = step(params, state, *DATA[at % 3])
    return params


@pytest.mark.parametrize("name", TAKEN)
def test_an_optimizer_is_what_optax_says_and_goes_on_from_a_checkpoint(name, tmp_path):
    expected = plain(MAKERS[name], 4)
    first = trainer("data=2,channel=2", MAKERS[name](), Deep(), accumulate=1)
    first.fit(iter(DATA[:2]), steps=2, progress=False)
    first.save(tmp_path)
    ours = trainer("data=4", MAKERS[name](), Deep(), accumulate=1, parameters="data")
    ours.restore(tmp_path)
    ours.fit(iter([DATA[2], DATA[0]]), steps=4, progress=False)
    close(dict(ours.state.params), expected, 1e-7)  # momo and others compute in float32 in places


@pytest.mark.parametrize("name", TAKEN)
def test_an_optimizer_in_stages_is_that_of_one_device(name):
    ours = trainer("pipe=2,data=2", MAKERS[name](), Deep())
    ours.fit(iter(DATA), steps=3, progress=False)
    close(ours._named().params, plain(MAKERS[name], 3), 1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_step_cannot_serve_is_refused_at_construction(name):
    with pytest.raises(UserError, match=REFUSED[name]):
        trainer("data=2", MAKERS[name](), Deep())


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("adam", r"the optimizer is 'adam'; give one of optax, such as optax.adam\(1e-3\)"),
        (nnx.Optimizer(Deep(), optax.sgd(0.1), wrt=nnx.Param), "the optimizer is an nnx.Optimizer"),
        (optax.adam, "the optimizer is adam, which has no init and update"),
        (None, "the optimizer is NoneType"),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer, words):
    with pytest.raises(UserError, match=words):
        made(st.Trainer, Deep(), optimizer, mesh=st.make_mesh("data=2"))


class Waves(nnx.Module):
    """Complex parameters, of which one is used after the other."""

    def __init__(self):
        self.a = nnx.Param(jnp.array([1 + 1j, 2 - 1j]))
        self.b = nnx.Param(jnp.array([0.5 - 2j, 1 + 0.5j]))

    def __call__(self, x):
        return jnp.sin(x * self.a[...]) * self.b[...]


def squares(outputs, targets):
    return (jnp.abs(outputs - targets) ** 2).sum(-1)


@pytest.mark.parametrize("make", [lambda: optax.sgd(0.05), lambda: optax.adam(0.05)])
@pytest.mark.parametrize("options", [{"mesh": "data=2"}, {"mesh": "pipe=2"}])
def test_complex_parameters_descend(make, options):
    """The reference is the same descent by real and imaginary parts, in numpy's terms."""
    random = np.random.default_rng(0)
    x, y = (0.5 * (random.normal(size=(8, 2)) + 1j * random.normal(size=(8, 2))) for _ in range(2))
    expected = {"a": Waves().a[...], "b": Waves().b[...]}
    optimizer, losses = make(), []
    state = optimizer.init(expected)

    def loss(parts):
        a, b = (parts[n][0] + 1j * parts[n][1] for n in ("a", "b"))
        return squares(jnp.sin(x * a) * b, y).mean()

    for _ in range(6):
        parts = {n: (v.real, v.imag) for n, v in expected.items()}
        losses.append(float(loss(parts)))
        grads = {n: re + 1j * im for n, (re, im) in jax.grad(loss)(parts).items()}
        updates, state = optimizer.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    mesh, more = options["mesh"], {k: v for k, v in options.items() if k != "mesh"}
    ours = trainer(mesh, make(), Waves(), loss=squares, accumulate=2, **more)
    rows = ours.fit([(x, y)] * 6, steps=6, progress=False)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert losses[-1] < losses[0]
