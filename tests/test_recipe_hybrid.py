"""The hybrid recipe: AlexNet in processes of its own, and its closed form against compiled programs."""

import json
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from recipe_process import PNG, ROOT, check_refused, gaps, run

sys.path.append(str(ROOT / "recipes"))

from train_alexnet_hybrid import Flags, Network, Variant, closed_form, measured, plans, sent_as

import shardtrain as st

pytestmark = pytest.mark.timeout(900)  # whole recipes, beside whatever else the machine does

SMALL = ("--hidden", 128, "--steps", 60, "--batch-size", 64)
NET = Network((64, 64, 1), 10, 128, width=8, hidden=64, dtype=jnp.float64, sent_as=jnp.float64)
SELDOM = [plan for plan in plans(2, 4) if plan.scheme] + [plan for plan in plans(1, 8) if plan.recompute]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of 60 steps in rounds, in float64, compared with one device."""
    out = tmp_path_factory.mktemp("hybrid") / "run"
    done = run("train_alexnet_hybrid.py", *SMALL, "--scheme", "spread", "--x64", "--compare", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done, json.loads((out / "result.json").read_text())


def test_a_run_leaves_what_it_promises(short):
    out, done, result = short
    assert (result["mesh"], result["model"], len(result["losses"])) == ({"channel": 8}, "AlexNet", 60)
    assert result["final_loss"] < 1.5 < 2.2 < result["losses"][0]
    assert (out / "curve.png").read_bytes()[:8] == PNG
    assert list((out / "checkpoints").iterdir())
    share = result["hybrid"]["share_of_pure_data"]
    assert f"sends {100 * share:.0f} % of pure data parallel" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_losses_are_those_of_one_device(short):
    assert max(gaps(short[1])) < 1e-10


def test_the_step_sends_what_the_closed_form_says_and_labels_and_scalars(short):
    _, _, result = short
    sent = sum(row["bytes"] for row in result["census"])
    labels = 7 * 8 * 4  # each device passes 7 times the 8 labels that it holds
    scalars = sent - labels - sum(result["hybrid"]["closed_form"].values())
    assert 0 < scalars < 200  # loss, accuracy, the gradient's norm


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(
            plan,
            id=f"{plan.name} on data={plan.data},channel={plan.channel}",
            marks=[pytest.mark.slow] if plan in SELDOM else [],
        )
        for plan in [*plans(1, 8), *plans(2, 4)[:-2]]
    ],
)
def test_the_compiled_step_sends_the_closed_form(plan):
    row = measured(NET, plan)
    assert row["bytes"] == row["closed_form"] > 0
    assert row["temporaries"] > 0


@pytest.mark.parametrize(
    ("plan", "microbatches", "dtype"),
    [
        (Variant("hybrid spread", 2, 4, "spread"), 2, "bfloat16"),
        pytest.param(Variant("hybrid turns", 1, 8, "turns"), 4, "float16", marks=pytest.mark.slow),
        pytest.param(Variant("pure data", 8, 1), 4, "float32", marks=pytest.mark.slow),
    ],
)
def test_the_trainers_step_in_microbatches_sends_the_closed_form(plan, microbatches, dtype):
    sends = sent_as(Flags(dtype=dtype))
    net = replace(NET, batch=256, microbatches=microbatches, dtype=jnp.float32, sent_as=sends)
    model = nnx.eval_shape(lambda: net.make(nnx.Rngs(0), partial(st.nn.Rounds, plan.scheme or "gather")))
    options = {"layout": plan.layout, "accumulate": microbatches, "dtype": dtype}
    one = st.Trainer(model, optax.adam(1e-3), mesh=plan.mesh(), **options)
    images, labels = ((*net.image,), jnp.float32), ((), jnp.int32)
    batch = one.shapes_of(*(jax.ShapeDtypeStruct((net.batch, *n), kind) for n, kind in (images, labels)))
    found = st.census.census(one.compiled_step(batch), plan.mesh())
    sent = sum(row.bytes for row in found if "[]" not in row.shape and not row.shape.startswith("s32"))
    assert sent == sum(closed_form(net, plan).values())  # the others are labels and scalars


def test_full_size_is_what_the_readme_says():
    full = Network((224, 224, 3), 1000, 1024)

    def sent(*plan):
        return sum(closed_form(full, Variant("", *plan)).values())

    pure, model = sent(8, 1), sent(1, 8)
    assert [round(n / 2**20) for n in (sent(1, 8, "gather"), pure, model)] == [87, 408, 1258]
    assert sent(1, 8, "spread") == sent(1, 8, "gather")
    # Eight turns: the examples go eight times as far, and once more within each turn.
    examples = closed_form(full, Variant("", 1, 8, "gather"))["examples"]
    assert sent(1, 8, "turns") - sent(1, 8, "gather") == 8 * examples


@pytest.mark.slow
def test_the_table_of_all_plans(tmp_path):
    done = run("train_alexnet_hybrid.py", *SMALL, "--steps", 2, "--bytes", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["hybrid"]
    for key in ("this_network", "full_size"):
        assert [row["bytes"] for row in rows[key]] == [row["closed_form"] for row in rows[key]]
        assert len(rows[key]) == 7
    assert "full size" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--batch-size", 72, "--scheme", "turns"],
            "layer 'rounds': a batch of 72 does not divide into 8 rounds",
        ),
        (["--mesh", "height=8"], "height is not for this recipe; use data and channel"),
        (["--parameters", "channel"], "--parameters channel would send more than the closed form"),
        (["--remat", "nothing"], "use --remat contractions, or --recompute with --scheme turns or spread"),
        (["--bytes", "--accumulate", 2], "leave out --accumulate and --dtype, or leave out --bytes"),
        (["--hidden", 100], "9216 and 100 features do not divide by channel=8"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, message, tmp_path):
    out = tmp_path / "run"
    flags = [*flags, *(() if "--hidden" in flags else ("--hidden", 64)), "--width", 16]
    check_refused(run("train_alexnet_hybrid.py", *flags, "--out", out), message.replace("9216", "2304"), out)
