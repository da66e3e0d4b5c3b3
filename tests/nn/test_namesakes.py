"""Every argument of every layer that has a namesake in nnx: honoured with nnx's value, or refused by name.

A later flax that adds an argument fails `test_every_argument_is_decided` until there is a row for it here.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.sharding import PartitionSpec as P

from shardtrain import nn, ops
from shardtrain.errors import UserError

X = jax.random.normal(jax.random.key(0), (2, 4, 4, 4), jnp.float32)
FAR = X + 300  # where a variance in one pass has no digits left
SOME = X[..., :1] > -0.5


@dataclass(frozen=True)
class Honoured:
    """A value of an argument, which changes what nnx returns or stores.

    Attributes:
        value: of the argument.
        beside: other arguments of the constructor, without which the value changes nothing.
        inputs: arguments of the call by position, instead of the namesake's.
        call: arguments of the call by name.
        changes: whether nnx's result changes; where it does not, a value is only accepted.
    """

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    inputs: tuple | None = None
    call: dict[str, Any] = field(default_factory=dict)
    changes: bool = True


@dataclass(frozen=True)
class Refused:
    """A value of an argument that raises a `UserError` with the argument's name."""

    value: Any


@dataclass(frozen=True)
class Traced:
    """A value that changes no number on a CPU, but an operation: `text` is in the jaxpr."""

    value: Any
    text: str


GIVEN = Honoured(None, changes=False)
"""Of an argument that every row gives, such as the input."""

OWN = Honoured(None, changes=False)
"""Of an argument by which random numbers differ from those of nnx on purpose: other tests look at it."""


def doubled(args, *, dtype=None, **more):
    """A `promote_dtype` that shows whether it was called with all that nnx hands it."""
    return tuple(None if a is None else 2 * a for a in promote_dtype(args, dtype=dtype, **more))


def no_product(*args, **kwargs):
    raise AssertionError("never called")


ones = nnx.initializers.ones
tag = {"tag": "mine"}
NARROW = {"dtype": Honoured(jnp.bfloat16), "param_dtype": Honoured(jnp.float16)}
WEIGHTS = NARROW | {
    "rngs": Honoured(lambda: nnx.Rngs(1)),
    "precision": Traced("highest", "HIGHEST"),
    "preferred_element_type": Honoured(jnp.float64),
    "promote_dtype": Honoured(doubled),
    "kernel_init": Honoured(ones),
    "bias_init": Honoured(ones),
    "kernel_metadata": Honoured(tag),
    "bias_metadata": Honoured(tag),
}
CONVOLUTION = WEIGHTS | {
    "in_features": GIVEN,
    "out_features": GIVEN,
    "kernel_size": GIVEN,
    "strides": Honoured(2),
    "padding": Honoured("VALID"),
    "kernel_dilation": Honoured(2),
    "use_bias": Honoured(False),
}
NORM = NARROW | {
    "num_features": GIVEN,
    "epsilon": Honoured(0.5),
    "use_scale": Honoured(False),
    "scale_init": Honoured(nnx.initializers.constant(2.0)),
    "scale_metadata": Honoured(tag),
    "axis_name": Refused("data"),
    "axis_index_groups": Refused([[0]]),
    "use_fast_variance": Honoured(False, inputs=(FAR,)),
    "promote_dtype": Honoured(doubled),
    "rngs": Honoured(lambda: nnx.Rngs(1), changes=False),
}
BIAS = {"use_bias": Honoured(False), "bias_init": Honoured(ones), "bias_metadata": Honoured(tag)}
MASKED = {"x": GIVEN, "mask": Honoured(SOME)}
SHARDED = {"inputs": GIVEN, "out_sharding": Refused(P())}


@dataclass(frozen=True)
class Namesake:
    """A layer of nnx, the arguments that every row gives, and a row for each of its arguments."""

    base: dict[str, Any]
    constructor: dict[str, Any]
    call: dict[str, Any]
    inputs: tuple = (X,)


ATTENTION = {
    "num_heads": GIVEN,
    "in_features": GIVEN,
    "qkv_features": Honoured(16),
    "out_features": Honoured(6),
    "num_kv_heads": Honoured(1),
    "in_kv_features": Honoured(4, changes=False),
    "broadcast_dropout": OWN,
    "dropout_rate": Honoured(0.5, {"deterministic": False}),
    "deterministic": Honoured(True, {"dropout_rate": 0.5}, changes=False),
    "out_kernel_init": Honoured(ones),
    "out_bias_init": Honoured(ones),
    "use_bias": Honoured(False),
    "attention_fn": Honoured(lambda query, key, value, **_: query + value),
    "decode": OWN,
    "normalize_qk": Honoured(True),
    "qkv_promote_dtype": Honoured(doubled),
    "out_promote_dtype": Honoured(doubled),
    "ln_promote_dtype": Honoured(doubled, {"normalize_qk": True}),
    "qkv_dot_general": Refused(no_product),
    "out_dot_general": Refused(no_product),
    "qkv_dot_general_cls": Refused(lambda: no_product),
    "out_dot_general_cls": Refused(lambda: no_product),
    "keep_rngs": Honoured(False, {"dropout_rate": 0.5, "deterministic": True}),
    "out_kernel_metadata": Honoured(tag),
    "out_bias_metadata": Honoured(tag),
    "query_ln_scale_metadata": Honoured(tag, {"normalize_qk": True}),
    "key_ln_scale_metadata": Honoured(tag, {"normalize_qk": True}),
} | {name: row for name, row in WEIGHTS.items() if name not in ("promote_dtype", "preferred_element_type")}

# Newer versions of flax have it, for attention functions with rotary embeddings.
POSITIONS = (
    {"input_positions": Refused(jnp.arange(4))}
    if "input_positions" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters
    else {}
)

NAMESAKES = {
    "BatchNorm": Namesake(
        {"num_features": 4},
        NORM | BIAS | {"use_running_average": Honoured(True), "axis": Refused(1), "momentum": Honoured(0.5)},
        MASKED | {"use_running_average": Honoured(True)},
    ),
    "Conv": Namesake(
        {"in_features": 4, "out_features": 6, "kernel_size": (3, 3)},
        CONVOLUTION
        | {
            "input_dilation": Honoured(2, {"padding": 1}),
            "feature_group_count": Honoured(2),
            "mask": Honoured(jnp.tril(jnp.ones((3, 3, 4, 6)))),
            "conv_general_dilated": Refused(no_product),
        },
        SHARDED,
    ),
    "ConvTranspose": Namesake(
        {"in_features": 4, "out_features": 4, "kernel_size": (3, 3)},
        CONVOLUTION
        | {"mask": Honoured(jnp.tril(jnp.ones((3, 3, 4, 4)))), "transpose_kernel": Honoured(True)},
        {"inputs": GIVEN},
    ),
    "Dropout": Namesake(
        {"rate": 0.5},
        {
            "rate": Honoured(1.0, {"rngs": lambda: nnx.Rngs(0)}),
            "broadcast_dims": OWN,
            "deterministic": Honoured(True, {"rngs": lambda: nnx.Rngs(0)}),
            "rng_collection": OWN,
            "rngs": OWN,
        },
        {"inputs": GIVEN, "deterministic": Honoured(True, {"rngs": lambda: nnx.Rngs(0)}), "rngs": OWN},
    ),
    "Einsum": Namesake(
        {"einsum_str": "nhwa,bac->nhwbc", "kernel_shape": (3, 4, 5), "bias_shape": (3, 5)},
        WEIGHTS
        | {
            "einsum_str": GIVEN,
            "kernel_shape": GIVEN,
            "bias_shape": Honoured(None),
            "einsum_op": Honoured(lambda *args, **kwargs: 2 * jnp.einsum(*args, **kwargs)),
        },
        SHARDED | {"einsum_str": Honoured("nhwa,bac->nhbwc")},
    ),
    "Embed": Namesake(
        {"num_embeddings": 5, "features": 4},
        NARROW
        | {
            "num_embeddings": GIVEN,
            "features": GIVEN,
            "embedding_init": Honoured(ones),
            "promote_dtype": Honoured(doubled),
            "rngs": Honoured(lambda: nnx.Rngs(1)),
            "embedding_metadata": Honoured(tag),
        },
        SHARDED,
        (jnp.array([[0, 4], [-1, 2]]),),
    ),
    "GroupNorm": Namesake(
        {"num_features": 4, "num_groups": 2},
        NORM
        | BIAS
        | {
            "num_groups": Honoured(1),
            "group_size": Honoured(1, {"num_groups": None}, changes=False),
            "reduction_axes": Refused((1, -1)),
        },
        MASKED | {"mask": Honoured(jnp.broadcast_to(SOME, X.shape))},
    ),
    "InstanceNorm": Namesake({"num_features": 4}, NORM | BIAS | {"feature_axes": Refused(1)}, MASKED),
    "LayerNorm": Namesake(
        {"num_features": 4},
        NORM | BIAS | {"feature_axes": Refused(1), "reduction_axes": Refused((1, 2))},
        MASKED | {"mask": Honoured(X.min(-1, keepdims=True) < X)},
    ),
    "Linear": Namesake(
        {"in_features": 4, "out_features": 6},
        WEIGHTS
        | {
            "in_features": GIVEN,
            "out_features": GIVEN,
            "use_bias": Honoured(False),
            "dot_general": Refused(no_product),
        },
        SHARDED,
    ),
    "LinearGeneral": Namesake(
        {"in_features": 4, "out_features": (3, 2)},
        WEIGHTS
        | {
            "in_features": GIVEN,
            "out_features": GIVEN,
            "axis": Honoured(-2),
            "batch_axis": Refused({0: 2}),
            "use_bias": Honoured(False),
            "dot_general": Refused(no_product),
            "dot_general_cls": Refused(lambda: no_product),
        },
        SHARDED,
    ),
    "MultiHeadAttention": Namesake(
        {"num_heads": 2, "in_features": 4, "decode": False},
        ATTENTION,
        {
            "inputs_q": GIVEN,
            "inputs_k": Honoured(X + 1),
            "inputs_v": Honoured(X + 1, call={"inputs_k": X}),
            "mask": Honoured(jnp.tril(jnp.ones((4, 4), bool))[None, None]),
            "deterministic": Honoured(True, {"dropout_rate": 0.5, "deterministic": False}),
            "rngs": Honoured(lambda: nnx.Rngs(7), {"dropout_rate": 0.5, "deterministic": False}),
            "sow_weights": Honoured(True),
            "decode": OWN,
            "is_causal": Honoured(True),
            "out_sharding": Refused(P()),
            "qkv_sharding": Refused(P()),
        }
        | POSITIONS,
        (X,),
    ),
    "PReLU": Namesake(
        {},
        NARROW
        | {
            "negative_slope_init": Honoured(0.5),
            "promote_dtype": Honoured(doubled, {"dtype": jnp.float32}),
            "negative_slope_metadata": Honoured(tag),
        },
        {"inputs": GIVEN},
    ),
    "RMSNorm": Namesake(
        {"num_features": 4},
        NORM
        | {
            "feature_axes": Refused(1),
            "reduction_axes": Refused((1, 2)),
            "use_fast_variance": Honoured(False, changes=False),
        },
        MASKED | {"mask": Honoured(X.min(-1, keepdims=True) < X)},
    ),
}


def made(value):
    """A row's value: random keys are made anew, since a call advances them."""
    return (
        value() if inspect.isfunction(value) and value.__name__ == "<lambda>" and not _takes(value) else value
    )


def _takes(function):
    return bool(inspect.signature(function).parameters)


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def outcome(library, name, given, inputs, call):
    """What a layer returns and what it stores then, as arrays and metadata by name."""
    kind = getattr(library, name)
    rngs = {"rngs": nnx.Rngs(0)} if "rngs" in arguments(getattr(nnx, name).__init__) else {}
    layer = kind(**rngs | {key: made(value) for key, value in given.items()})
    found = {"output": layer(*inputs, **{key: made(value) for key, value in call.items()})}
    for path, variable in nnx.to_flat_state(nnx.state(layer)):
        key = ".".join(map(str, path))
        if isinstance(variable, jax.Array):  # the mask of a convolution
            continue
        for i, leaf in enumerate(jax.tree.leaves(variable.get_value())):
            is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            found[f"{key} {i}"] = jax.random.key_data(leaf) if is_key else leaf
        found[f"{key} tag"] = variable.get_metadata().get("tag")
    return found


def same(a, b):
    """Whether two outcomes agree to the digits of their types."""
    return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)


def alike(a, b):
    if not isinstance(a, jax.Array):
        return a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    error = 0.03 if a.dtype in (jnp.bfloat16, jnp.float16) else 1e-4
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.allclose(a, b, rtol=error, atol=error)


def test_all_namesakes_have_a_table():
    layers = {name for name in nn.__all__ if isinstance(getattr(nn, name), type) and hasattr(nnx, name)}
    assert layers == {*NAMESAKES, "WeightNorm"}  # which has tests of its own
    assert all(issubclass(getattr(nn, name), getattr(nnx, name)) for name in layers)


@pytest.mark.parametrize("name", NAMESAKES)
def test_every_argument_is_decided(name):
    theirs, ours, rows = getattr(nnx, name), getattr(nn, name), NAMESAKES[name]
    assert set(arguments(theirs.__init__)) == set(rows.constructor)
    assert set(arguments(theirs.__call__)) == set(rows.call)
    taken = inspect.signature(ours.__call__).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in taken):  # by the same position or name
        positions = [n for n in arguments(ours.__call__) if n in rows.call]
        assert positions == arguments(theirs.__call__)


COMMON = [id(row) for rows in (WEIGHTS, NORM, BIAS) for row in rows.values()]
CHEAP = ("qkv_dot_general", "out_sharding", "qkv_sharding", "mask")


def checks():
    for name, rows in NAMESAKES.items():
        for place in ("constructor", "call"):
            for argument, row in getattr(rows, place).items():
                if row is not GIVEN and row is not OWN:
                    often = (
                        name in ("BatchNorm", "Linear") or id(row) not in COMMON or isinstance(row, Refused)
                    )
                    often = often and (name != "MultiHeadAttention" or argument in CHEAP)
                    marks = [] if often else pytest.mark.slow
                    yield pytest.param(
                        name, place, argument, row, id=f"{name}-{place}-{argument}", marks=marks
                    )


@pytest.mark.filterwarnings("ignore:.*sow")  # deprecated in flax, and not yet away
@pytest.mark.parametrize(("name", "place", "argument", "row"), list(checks()))
def test_an_argument_is_honoured_or_refused(name, place, argument, row):
    rows = NAMESAKES[name]
    base, call, inputs = dict(rows.base), {}, rows.inputs
    if isinstance(row, Honoured):
        base, call, inputs = base | row.beside, dict(row.call), row.inputs or inputs
    given, called = (
        (base | {argument: row.value}, call)
        if place == "constructor"
        else (base, call | {argument: row.value})
    )
    if isinstance(row, Refused):
        with pytest.raises(UserError, match=rf"\b{argument}="):
            outcome(nn, name, given, inputs, called)
        return
    if isinstance(row, Traced):
        layer = getattr(nn, name)(**given, rngs=nnx.Rngs(0))
        assert row.text in str(jax.make_jaxpr(lambda x: layer(x))(*inputs))
        return
    expected = outcome(nnx, name, given, inputs, called)
    assert same(outcome(nn, name, given, inputs, called), expected)
    if row.changes:
        assert not same(outcome(nnx, name, base, inputs, call), expected), "the row changes nothing in nnx"


POOLS = {
    "max_pool": {},
    "min_pool": {},
    "avg_pool": {"count_include_pad": {"count_include_pad": False, "padding": "SAME"}},
}


@pytest.mark.parametrize("name", POOLS)
def test_arguments_of_pools(name):
    theirs, ours = getattr(nnx, name), getattr(ops, name)
    own = {"strides": {"strides": (2, 2)}, "padding": {"padding": "SAME"}} | POOLS[name]
    assert set(arguments(theirs)) == {"inputs", "window_shape", *own}
    assert arguments(ours)[: len(arguments(theirs))] == arguments(theirs)
    for more in own.values():
        expected = theirs(inputs=X, window_shape=(3, 3), **more)
        np.testing.assert_allclose(ours(inputs=X, window_shape=(3, 3), **more), expected, rtol=1e-5)


def test_rows_notice_an_argument_that_is_ignored(monkeypatch):
    """The mutant: as it was, without a word."""
    right = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda *args, use_fast_variance, **more: right(*args, **more))
    row = NAMESAKES["LayerNorm"].constructor["use_fast_variance"]
    with pytest.raises(AssertionError):
        test_an_argument_is_honoured_or_refused("LayerNorm", "constructor", "use_fast_variance", row)


def test_a_product_of_ones_own_is_refused():
    """`lax.dot_general` itself is not."""
    nn.Linear(4, 4, dot_general=lax.dot_general, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"nn\.Linear: dot_general=no_product, but the layer brings its own"):
        nn.Linear(4, 4, dot_general=no_product, rngs=nnx.Rngs(0))


def test_attend_takes_what_nnx_takes():
    layer, plain = (library.Embed(5, 4, rngs=nnx.Rngs(0)) for library in (nn, nnx))
    assert set(arguments(nnx.Embed.attend)) == {"query", "out_sharding"}
    np.testing.assert_allclose(layer.attend(X[0, 0, 0], None), plain.attend(X[0, 0, 0], None), rtol=1e-5)
    with pytest.raises(UserError, match="out_sharding="):
        layer.attend(X, out_sharding=P())


def test_the_only_row_of_a_table_is_that_of_every_index():
    layer, plain = (library.Embed(1, 4, rngs=nnx.Rngs(0)) for library in (nn, nnx))
    np.testing.assert_array_equal(layer(jnp.array([[0, 3]])), plain(jnp.array([[0, 3]])))
    layer, plain = (library.Embed(3, 4, rngs=nnx.Rngs(0)) for library in (nn, nnx))
    np.testing.assert_array_equal(layer(jnp.array(-1)), plain(jnp.array(-1)))


def test_dropout_shares_masks_along_dimensions_counted_from_the_end():
    layer = nn.Dropout(0.5, broadcast_dims=(-2, 1), rngs=nnx.Rngs(0))
    kept = np.asarray(layer(jnp.ones((8, 5, 6, 7)))) > 0
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:, :1, :1], kept.shape))
    assert 0.3 < kept.mean() < 0.7
