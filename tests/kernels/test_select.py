"""Which algorithm `auto` takes: by a table, by the model, and never what would lose digits or time."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from shardtrain import UserError
from shardtrain.kernels.conv import api, costs, select, tables
from shardtrain.kernels.conv.task import ALGORITHMS, PASSES, Passes, parse, refused

from .test_algorithms import compare, numbers

H100 = "NVIDIA H100 80GB HBM3"
LAYER = "4x28x28x64->64,window=3"


def table(seconds, layer=LAYER, kind="cpu", rates=None, **more):
    """A file with one row, which holds for all passes."""
    row = {"layer": layer, "seconds": dict.fromkeys(PASSES, seconds)}
    return json.dumps({"version": 1, "device_kind": kind, "rates": rates, "rows": [row]} | more)


@pytest.fixture
def measured(monkeypatch):
    """Puts a table in place of all others."""

    def put(text):
        found = tables.read(text, "test")
        monkeypatch.setattr(tables, "of", lambda kind: found if kind == found.kind else None)

    return put


def choice(layer, kind="cpu", **problem):
    task = parse(layer)
    return select._passes(
        dataclasses.replace(task, problem=dataclasses.replace(task.problem, **problem)), kind
    )


# --- by a table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "layer", "expected"),
    [
        ({"direct": 1.0, "winograd": 0.5, "im2col": 0.7}, LAYER, "winograd"),
        ({"direct": 1.0, "winograd": 0.99}, LAYER, "direct"),  # within the noise
        ({"direct": 1.0, "fft": 2.0}, LAYER, "direct"),
        ({"fft": 0.1}, LAYER, "direct"),  # nothing to compare with
        ({"direct": 1.0, "winograd": 0.5}, "8x28x28x64->64,window=3", "winograd"),  # twice the batch
        ({"direct": 1.0, "winograd": 0.5}, "9x28x28x64->64,window=3", "direct"),
        ({"direct": 1.0, "winograd": 0.5}, "4x30x30x64->64,window=3,padding=0", "winograd"),  # a halo
        ({"direct": 1.0, "winograd": 0.5}, "4x28x27x64->64,window=3", "direct"),
        ({"direct": 1.0, "winograd": 0.5}, LAYER + ",dtype=float64", "direct"),
        ({"direct": 1.0, "winograd": 0.5}, LAYER + ",strides=2", "direct"),
        ({"direct": 1.0, "winograd": 0.5}, LAYER + ",groups=2", "direct"),
        ({"direct": 1.0, "winograd": 0.5}, LAYER + ",dilation=2", "direct"),
    ],
)
def test_what_was_measured(measured, seconds, layer, expected):
    measured(table(seconds))
    assert choice(layer) == Passes(*(expected,) * 3)


def test_the_nearest_batch_counts(measured):
    rows = [
        {"layer": LAYER, "seconds": {"forward": {"direct": 4.0, "fft": 1.0}}},
        {"layer": LAYER.replace("4x", "8x", 1), "seconds": {"forward": {"direct": 1.0, "fft": 4.0}}},
    ]
    measured(json.dumps({"version": 1, "device_kind": "cpu", "rates": None, "rows": rows}))
    assert choice(LAYER.replace("4x", "5x", 1)).forward == "fft"
    assert choice(LAYER.replace("4x", "7x", 1)).forward == "direct"


def test_a_gradient_measured_is_the_dual_convolution_too(measured):
    """What ops computes a cut input's gradient by."""
    row = {"layer": "4x28x28x64->32,window=3", "seconds": {"input": {"direct": 1.0, "fft": 0.1}}}
    measured(json.dumps({"version": 1, "device_kind": "cpu", "rates": None, "rows": [row]}))
    assert choice("4x28x28x64->32,window=3") == ("direct", "fft", "direct")
    assert choice("4x28x28x32->64,window=3").forward == "fft"


@pytest.mark.parametrize(
    ("layer", "passes"),
    [
        (LAYER + ",strides=2", ("im2col", "direct", "im2col")),
        (LAYER + ",input=2", ("direct",) * 3),
        ("4x28x28x64->64,window=9", ("fft",) * 3),
        ("4x8x8x8x64->64,window=3", ("fft",) * 3),
        ("4x28x64->64,window=3", ("fft",) * 3),
    ],
)
def test_only_what_computes_it(measured, layer, passes):
    measured(
        table({"direct": 10.0, "im2col": 3.0, "fft": 1.0, "winograd": 0.5 if "9" in layer else 2}, layer)
    )
    assert choice(layer) == passes


# --- by the model -----------------------------------------------------------------------------------------

WIDE = "32x28x28x512->512,window=3"


@pytest.mark.parametrize(
    ("layer", "kind", "problem", "expected"),
    [
        (WIDE, H100, {"precision": lax.Precision.HIGHEST}, "winograd"),
        (WIDE, H100, {"precision": "float32"}, "winograd"),
        (WIDE, H100, {}, "direct"),  # TF32 holds F(4, 3) no better than float16
        ("32x56x56x64->64,window=3", H100, {"precision": lax.Precision.HIGHEST}, "direct"),  # moves too much
        (
            WIDE,
            "NVIDIA H100 PCIe",
            {"precision": lax.Precision.HIGHEST},
            "direct",
        ),  # no data sheet of it here
        (WIDE, "TPU v5e", {}, "direct"),
        (WIDE + ",dtype=float64", H100, {"precision": lax.Precision.HIGHEST}, "direct"),
        (WIDE + ",strides=2", H100, {"precision": lax.Precision.HIGHEST}, "direct"),
        (WIDE + ",groups=512", H100, {"precision": lax.Precision.HIGHEST}, "direct"),
        ("512x56x56x512->512,window=3", H100, {"precision": lax.Precision.HIGHEST}, "direct"),  # workspace
    ],
)
def test_what_the_model_says(layer, kind, problem, expected):
    assert choice(layer, kind, **problem) == Passes(*(expected,) * 3)


@st.composite
def tasks(draw):
    rank = draw(st.integers(1, 3))
    extents = "x".join(str(draw(st.integers(7, 60 // rank))) for _ in range(rank))
    groups = draw(st.sampled_from((1, 1, 2)))
    a, b = (groups * draw(st.sampled_from((1, 8, 64, 512))) for _ in range(2))
    return (
        f"{draw(st.sampled_from((1, 8, 128)))}x{extents}x{a}->{b},window={draw(st.sampled_from((1, 3, 5, 7)))},"
        f"strides={draw(st.sampled_from((1, 1, 1, 2)))},groups={groups},"
        f"dtype={draw(st.sampled_from(('float32', 'bfloat16', 'float16', 'float64')))}"
    )


def never_slower(layer, kind, precision):
    task = parse(layer)
    task = dataclasses.replace(task, problem=dataclasses.replace(task.problem, precision=precision))
    for name, rows in select.rows_of(task, kind).items():
        of = {row.algorithm: row for row in rows}
        found = of[getattr(select._passes(task, kind), name)]
        assert found.refused is None
        if found.algorithm != "direct":
            assert found.seconds < of["direct"].seconds
            assert found.source == of["direct"].source
            assert not refused(found.algorithm, task.problem.window, task.problem.strides)


kinds = st.sampled_from((H100, "NVIDIA B200", "NVIDIA A100-SXM4-40GB", "cpu", "unknown"))
precisions = st.sampled_from((None, lax.Precision.HIGHEST))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(tasks(), kinds, precisions)
def test_never_slower_than_direct(layer, kind, precision):
    never_slower(layer, kind, precision)


def test_a_choice_of_the_slowest_is_noticed(monkeypatch):
    def slowest(rows):
        known = [r for r in rows if r.seconds and not r.refused]
        return max(known, key=lambda r: r.seconds).algorithm if known else "direct"

    monkeypatch.setattr(select, "chosen", slowest)
    with pytest.raises(AssertionError):
        never_slower(WIDE, H100, None)


def test_model_of_the_roofline():
    """By hand: multiplications over tensor cores at 0.6 of their peak, or bytes over 0.85 of the memory."""
    rates = costs.sheet_rates(H100, "float32", None)
    task = parse("32x56x56x256->256,window=3")
    direct = costs.seconds(task, "direct", rates.by_pass["forward"]["direct"], 0.0)
    assert direct == pytest.approx(2 * 32 * 56 * 56 * 9 * 256 * 256 / (0.6 * 495e12))
    small = parse("32x56x56x256->256,window=1")
    moved = 4 * (2 * 32 * 56 * 56 * 256 + 256 * 256)
    assert costs.seconds(small, "direct", rates.by_pass["forward"]["direct"], 0.0) == pytest.approx(
        moved / (0.85 * 3.35e12)
    )
    assert costs.multiplications(task, "direct") / costs.multiplications(task, "winograd") == 4


# --- few digits -------------------------------------------------------------------------------------------


def nothing_beyond_f23(kind):
    for dtype in ("bfloat16", "float16"):
        for window in (2, 3, 4, 5, 7):
            text = f"4x28x28x64->64,window={window},dtype={dtype}"
            task = parse(text)
            if "winograd" in select._passes(task, kind):
                assert max(f.tile for f in costs.tiles(task)) <= 4, f"{text} by Winograd"


def test_few_digits_take_no_large_tiles(measured):
    windows = [f"4x28x28x64->64,window={w},dtype={d}" for w in (3, 5, 7) for d in ("bfloat16", "float16")]
    rows = [{"layer": w, "seconds": {"forward": {"direct": 9.0, "winograd": 1.0}}} for w in windows]
    measured(json.dumps({"version": 1, "device_kind": "cpu", "rates": None, "rows": rows}))
    nothing_beyond_f23("cpu")
    assert choice(windows[0]).forward == "winograd"  # F(2, 3)
    (row,) = [r for r in select.rows_of(parse(windows[2]), "cpu")["forward"] if r.algorithm == "winograd"]
    assert row.refused == "F(4, 5) in bfloat16 loses too many digits"


@pytest.mark.parametrize("wrong", ["no rule", "float32's tiles"])
def test_large_tiles_in_bfloat16_are_noticed(measured, monkeypatch, wrong):
    measured(table({"direct": 9.0, "winograd": 1.0}, LAYER + ",dtype=bfloat16"))
    tiles = api.tile_outputs
    monkeypatch.setattr(costs, "tile_outputs", lambda window, dtype: tiles(window, "float32"))
    select._rows.cache_clear()
    if wrong == "float32's tiles":  # F(4, 3) is refused all the same
        nothing_beyond_f23("cpu")
        assert choice(LAYER + ",dtype=bfloat16").forward == "direct"
        return
    monkeypatch.setattr(select, "_unwise", lambda *args: None)
    with pytest.raises(AssertionError, match="by Winograd"):
        nothing_beyond_f23("cpu")


@pytest.mark.parametrize(
    ("algorithm", "window", "dtype", "published"),
    [
        ("direct", 3, "float32", 7.4e-7),
        ("fft", 3, "float32", 4.4e-7),
        ("winograd", 3, "float32", 8.7e-7),
        ("winograd", 3, "float16", 5.1e-4),
        ("winograd", 3, "bfloat16", 4.1e-3),
        ("winograd", 5, "float32", 3.4e-6),
        ("winograd", 5, "bfloat16", 4.3e-2),
    ],
)
def test_errors_are_those_that_were_measured(algorithm, window, dtype, published):
    """Those of `docs/measurements.md`, up to a third."""
    task = parse(f"1x24x24x256->16,window={window},dtype={dtype}")
    assert 2 / 3 < costs.error(task, algorithm, "cpu") / published < 3 / 2


# --- the same everywhere, and quickly ---------------------------------------------------------------------


def test_deterministic_and_without_the_disk(monkeypatch):
    layers = ["1x64x64x16->16,window=31", LAYER, WIDE, "2x27x27x64->192,window=5"]
    first = [select.passes_of(parse(layer)) for layer in layers]
    monkeypatch.setattr(tables, "_shipped", lambda kind: pytest.fail("read again"))
    assert [select.passes_of(parse(layer)) for layer in layers] == first
    select._rows.cache_clear()
    assert [select._passes(parse(layer), "cpu") for layer in reversed(layers)] == first[::-1]


def test_the_table_that_comes_along():
    found = tables.of("cpu")
    assert found is not None
    assert found.rates is not None
    assert len(found.rows) > 100
    for by_batch in found.rows.values():
        for seconds in by_batch.values():
            assert "direct" in seconds
            assert set(seconds) <= set(ALGORITHMS)
    assert set(found.rates.margins) == set(found.rates.by_pass) == set(PASSES)


def test_a_table_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_loaded", {})
    tables.of.cache_clear()
    layer = "1x64x64x16->16,window=31"
    assert choice(layer).forward == "fft"
    file = tmp_path / "mine.json"
    file.write_text(table({"direct": 1.0, "fft": 1.0, "im2col": 0.1}, layer))
    tables.load(file)
    assert choice(layer).forward == "im2col"
    assert choice("1x64x64x16->16,window=23").forward == "fft"  # as before
    monkeypatch.setattr(tables, "_loaded", {})
    tables.of.cache_clear()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no table of tools/tune_conv.py: Expecting"),
        ("[]", "is no table"),
        ("{}", "no field 'version'"),
        (table({"direct": 1.0}, version=0), "its version is 0, not 1"),
        (table({"direct": 1.0}, layer="8x8"), "layer '8x8' is no convolution"),
        (table({"direct": 0.0}), "times that are no positive numbers"),
        (table({"direct": "fast"}), "times that are no positive numbers"),
        (table({"strassen": 1.0}), "an algorithm 'strassen'"),
        (table({"direct": 1.0}, rates={}), "no field 'by_pass'"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        tables.load(file)


def test_no_table(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json cannot be read .* tools/tune_conv\.py writes one"):
        tables.load(tmp_path / "missing.json")


# --- layers as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "32x56x56x64->128,window=3x3",
        "2x224x224x3->64,window=11x11,strides=4x4,padding=2x2",
        "1x9x8->4,window=3,padding=1:2",
        "1x9x8x7x4->8,window=3x1x3,dilation=2x1x1,groups=4,dtype=bfloat16",
        "1x9x8->4,window=3,input=2,padding=0",
    ],
)
def test_layers_are_written_as_they_are_read(text):
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8x8x3->4", "no convolution"),
        ("8x8x8x3->4,window=3x3x3", "3 numbers of window for 2 dimensions"),
        ("8x8x8x3->4,window=3,stride=2", "'stride' is none of its fields"),
        ("8x8x8x3->4,window=3,groups=2", "its sizes do not agree"),
        ("8x2x2x3->4,window=3,padding=0", "its sizes do not agree"),
        ("window=3", "write one like 32x56x56x64->128,window=3,strides=2"),
    ],
)
def test_bad_layers(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


# --- what is computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "strides", "input_dilation"),
    [
        (("winograd", "fft", "im2col"), (1, 1), (1, 1)),
        (("fft", "winograd", "direct"), (1, 1), (1, 1)),
        (("direct", "direct", "fft"), (1, 1), (1, 1)),
        (("im2col", "direct", "im2col"), (2, 1), (1, 1)),
        (("direct", "direct", "im2col"), (2, 3), (1, 1)),
    ],
)
def test_every_pass_by_another_algorithm(monkeypatch, passes, strides, input_dilation):
    monkeypatch.setattr(api, "passes_of", lambda task: Passes(*passes))
    static = {"strides": strides, "dilation": (1, 2), "padding": ((1, 1), (2, 0))}
    compare("auto", numbers(2, 9, 11, 4), numbers(3, 2, 2, 6), groups=2, **static)


def test_two_gradients_deep(monkeypatch):
    monkeypatch.setattr(api, "passes_of", lambda task: Passes("im2col", "fft", "direct"))
    x, kernel = jnp.asarray(numbers(1, 6, 6, 2)), jnp.asarray(numbers(3, 3, 2, 3))

    def curvature(algorithm):
        static = {"strides": (1, 1), "dilation": (1, 1), "padding": ((1, 1), (1, 1))}

        def f(x, k):
            return jnp.sin(api.conv(x, k, algorithm=algorithm, **static)).sum()

        return jax.grad(lambda x, k: (jax.grad(f)(x, k) ** 2).sum(), (0, 1))(x, kernel)

    for a, b in zip(curvature("auto"), curvature("direct"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9 * math.sqrt(b.size))


def test_integers_and_float64_are_computed_directly():
    assert select.passes_of(dataclasses.replace(parse(LAYER), dtype="int32")) == Passes(*("direct",) * 3)
    x, kernel = jnp.ones((1, 64, 64, 16)), jnp.ones((31, 31, 16, 16))
    static = {"strides": (1, 1), "dilation": (1, 1), "padding": ((15, 15), (15, 15))}
    text = str(jax.make_jaxpr(lambda x, k: api.conv(x, k, **static))(x, kernel))
    assert "conv_general_dilated" in text
    assert "custom_vjp" not in text
    jax.jvp(lambda x: api.conv(x, kernel[:3, :3], **static | {"padding": ((1, 1), (1, 1))}), (x,), (x,))
