"""The pipeline recipe in processes of its own."""

import json

import pytest
from recipe_process import PNG, check_refused, gaps, run

from shardtrain.pipeline import make

SHAPE = ("--model", "resnet8", "--batch-size", 32, "--microbatches", 4)
SMALL = (*SHAPE, "--lr-schedule", "constant", "--steps", 6, "--x64")


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
    assert result["schedule"] in ("zb-h1", "zb-h1 fused")
    assert result["bubble"] == pytest.approx(3 / (3 * 4 + 3))  # (p-1) / (3m+p-1)
    assert result["bubble"] < result["lockstep_bubble"] < 1
    assert len(result["peak_in_flight"]) == 4
    assert max(result["peak_in_flight"]) <= 4
    for name in ("curve.png", "timeline.png"):
        assert (out / name).read_bytes()[:8] == PNG
    assert list((out / "checkpoints").iterdir())
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_losses_are_those_of_one_device(short):
    found = gaps(short[1])
    assert len(found) >= 3
    assert max(found) < 1e-10


def test_messages_are_permuted_once_a_tick(short):
    _, _, result = short
    permutes = [row for row in result["census"] if row["kind"] == "collective-permute"]
    assert {tuple(row["axes"]) for row in permutes} == {("pipe",)}
    assert sum(row["count"] for row in permutes) == 2 * result["ticks"]  # one up and one down


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
        (["--accumulate", "2"], "here it is --microbatches 2"),
        (["--schedule", "none", "--overlap"], "--schedule none has no stages"),
        (["--schedule", "none", "--in-flight", "0"], "--schedule none has no stages"),
        (
            ["--schedule", "none", "--mesh", "replica=2,pipe=2"],
            "leave replica out of --mesh, or choose a schedule such as 1f1b",
        ),
        (["--parameters", "pipe"], "parameters='pipe', but a mesh with pipe keeps each stage's parameters"),
        (["--model", "lenet", "--stages", "conv1|head"], "has 2 stages, 4 are asked for"),
        (["--model", "lenet", "--microbatches", "7"], "does not divide by"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, message, tmp_path):
    out = tmp_path / "run"
    check_refused(run("train_pipeline.py", *flags, "--out", out), message, out)
