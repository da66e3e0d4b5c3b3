"""The pipeline recipe in processes of its own."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from recipe_process import PNG, ROOT, check_refused, gaps, run

import shardtrain as st
from shardtrain.pipeline import lockstep, make

sys.path.append(str(ROOT / "recipes"))

from train_pipeline import Flags, make_task, report

SHAPE = ("--model", "resnet8", "--batch-size", 32, "--microbatches", 4)
SMALL = (*SHAPE, "--lr-schedule", "constant", "--steps", 6, "--x64")


pytestmark = pytest.mark.timeout(900)  # whole recipes, beside whatever else the machine does


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Six steps in four stages, compared with one device in float64."""
    out = tmp_path_factory.mktemp("pipeline") / "run"
    done = run(
        "train_pipeline.py",
        *SMALL,
        "--mesh",
        "pipe=4,data=2",
        "--schedule",
        "zb-h1",
        "--compare",
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    return out, done, json.loads((out / "result.json").read_text())


def test_a_run_leaves_what_it_promises(short):
    out, done, result = short
    assert (result["mesh"], len(result["losses"])) == ({"pipe": 4, "data": 2}, 6)
    assert result["schedule"] == "zb-h1"
    assert result["runs_as"] in ("zb-h1", "zb-h1 fused")
    assert result["bubble"] == pytest.approx(3 / (3 * 4 + 3))  # (p-1) / (3m+p-1)
    assert result["bubble"] < result["lockstep_bubble"] < 1
    assert len(result["peak_in_flight"]) == 4
    assert max(result["peak_in_flight"]) <= 4
    for name in ("curve.png", "timeline.png"):
        assert (out / name).read_bytes()[:8] == PNG
    assert list((out / "checkpoints").iterdir())
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_what_the_flags_say_reaches_the_trainer():
    asked = {"schedule": "zb-v", "stages": "stem,...|head", "in_flight": 3, "overlap": True}
    expected = {"pipeline": st.Pipeline(**asked), "statistics": "batch"}
    assert make_task(Flags(**asked, statistics="batch")).trainer == expected
    assert make_task(Flags(schedule="none")).trainer == {"statistics": "microbatch"}


def test_the_losses_are_those_of_one_device(short):
    found = gaps(short[1])
    assert len(found) >= 3
    assert max(found) < 1e-10


def test_messages_are_permuted_once_a_tick(short):
    _, _, result = short
    permutes = [row for row in result["census"] if row["kind"] == "collective-permute"]
    assert {tuple(row["axes"]) for row in permutes} == {("pipe",)}
    assert sum(row["count"] for row in permutes) == 2 * result["ticks"]  # one up and one down


def test_the_report_is_of_the_schedule_that_runs(tmp_path):
    layers = [
        st.nn.Linear(a, b, param_dtype=jnp.float64, rngs=nnx.Rngs(0)) for a, b in ((4, 8), (8, 9), (9, 5))
    ]
    options = {"accumulate": 4, "pipeline": st.Pipeline("1f1b", "layers.0|layers.1,...")}
    one = st.Trainer(nnx.Sequential(*layers), optax.sgd(0.1), mesh=st.make_mesh("pipe=2"), **options)
    one.prepare(np.ones((8, 4)), np.zeros(8, np.int32))
    said, asked = report(one, tmp_path).result, make("1f1b", 2, 4)
    (runs,) = (way for way in (asked, asked.with_split()) if way.name == said["runs_as"])
    ticks = lockstep(runs, one.pipeline.costs)
    assert said == {
        "schedule": "1f1b",
        "bubble": pytest.approx(1 / 5),  # (p-1) / (m+p-1)
        "runs_as": runs.name,
        "ticks": len(ticks.table),
        "lockstep_bubble": float(ticks.idle),
        "peak_in_flight": [2, 1],
        "parameter_bytes_per_device": 8 * ((8 + 1) * 9 + (9 + 1) * 5),  # of the last stage, the larger one
    }
    assert said["lockstep_bubble"] != said["bubble"]


@pytest.mark.slow
def test_none_is_the_same_run_without_stages_and_takes_up_the_pipelines_checkpoint(short, tmp_path):
    out = tmp_path / "none"
    done = run("train_pipeline.py", *SMALL, "--mesh", "pipe=4,data=2", "--schedule", "none", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["mesh"] == {"data": 2}
    assert (result["schedule"], result["bubble"]) == ("none", 0.0)
    assert result["losses"] == pytest.approx(short[2]["losses"], rel=1e-10)
    assert result["test_accuracy"] == short[2]["test_accuracy"]
    assert result["parameter_bytes_per_device"] > short[2]["parameter_bytes_per_device"]
    for steps, mesh, schedule in ((8, "pipe=2,height=2", "interleaved"), (10, "data=4,pipe=2", "none")):
        more = (*SHAPE, "--lr-schedule", "constant", "--steps", steps, "--x64", "--resume", "auto")
        done = run("train_pipeline.py", *more, "--mesh", mesh, "--schedule", schedule, "--out", short[0])
        assert f"resumed at step {6 if steps == 8 else 8} of {steps}" in done.stderr, done.stderr
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_schedule_of_ones_own(tmp_path):
    csv = tmp_path / "mine.csv"
    csv.write_text(make("1f1b", 2, 4).to_csv())
    out = tmp_path / "run"
    done = run("train_pipeline.py", *SMALL, "--mesh", "pipe=2", "--schedule", csv, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "result.json").read_text())["ticks"] > 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "data=2"], "--mesh data=2 has no pipe axis to cut the layers by"),
        (["--schedule", "2f2b"], "there is no schedule '2f2b'"),
        (["--microbatches", "0"], "--microbatches 0: use 1 or more"),
        (["--microbatches", "1"], "use for example --microbatches 8"),
        (["--mesh", "data=2,pipe=-1", "--devices", "2"], "leaves one device to pipe"),
        (["--microbatches", "1", "--schedule", "mine.csv"], "use for example --microbatches 8"),
        (["--accumulate", "2"], "here it is --microbatches 2"),
        (["--schedule", "none", "--overlap"], "--schedule none has no stages"),
        (["--schedule", "none", "--in-flight", "0"], "--schedule none has no stages"),
        (
            ["--schedule", "none", "--mesh", "replica=2,pipe=2"],
            "leave replica out of --mesh, or choose a schedule such as 1f1b",
        ),
        (["--parameters", "pipe"], "--parameters 'pipe', but a mesh with pipe keeps each stage's parameters"),
        (["--model", "lenet", "--stages", "conv1|head"], "has 2 stages, 4 are asked for"),
        (
            ["--model", "lenet", "--microbatches", "7"],
            "does not divide by the 2 shards of the batch on mesh pipe=4,data=2 times 7 microbatches; use 126",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, message, tmp_path):
    out = tmp_path / "run"
    check_refused(run("train_pipeline.py", *flags, "--out", out), message, out)
