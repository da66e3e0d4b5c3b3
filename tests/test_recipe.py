"""The recipe as a user runs it: real processes, real files, real exit codes."""

import functools
import gzip
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import recipe_process
from recipe_process import ROOT, environment

from shardtrain.cli.start import lock_folder
from shardtrain.errors import FAULT, StartError

RECIPE = ROOT / "recipes" / "train_cnn.py"


run = functools.partial(recipe_process.run, RECIPE.name)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of 12 steps on 8 simulated devices."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    done = run("--steps", 12, "--batch-size", 64, "--compare", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_what_it_promises(short):
    out, done = short
    result = json.loads((out / "result.json").read_text())
    assert result["mesh"] == {"data": 2, "height": 2, "channel": 2}
    assert (result["model"], result["data"], result["steps"]) == ("resnet8", "digits", 12)
    assert len(result["losses"]) == 12
    assert result["final_loss"] == result["losses"][-1] < result["losses"][0]
    assert 0 < result["test_accuracy"] <= 1
    assert result["images_per_second"] > 0
    assert {row["kind"] for row in result["census"]} >= {"all-reduce", "collective-permute", "all-gather"}
    assert all(row["count"] > 0 and row["bytes"] > 0 for row in result["census"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == result["losses"]
    assert (out / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((out / "tensorboard").glob("events.out.*"))
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_comparison_with_one_device_is_close(short):
    gaps = re.findall(r"│\s+(\d\.\de[-+]\d\d) │", short[1].stdout)
    assert len(gaps) >= 4
    assert max(map(float, gaps)) < 1e-4


@pytest.mark.slow
def test_resume_on_another_mesh_goes_on_as_if_never_stopped(tmp_path):
    flags = ("--batch-size", 64, "--x64", "--lr", 0.05, "--lr-schedule", "constant")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert run("--steps", 10, *flags, "--mesh", "data=2", "--out", straight).returncode == 0
    assert run("--steps", 6, *flags, "--mesh", "data=4,height=2", "--out", parts).returncode == 0
    done = run("--steps", 10, *flags, "--resume", "auto", "--mesh", "channel=2", "--out", parts)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6 of 10" in done.stderr
    losses = [json.loads((out / "result.json").read_text())["losses"] for out in (straight, parts)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)


def test_a_killed_run_goes_on_by_the_same_command(tmp_path):
    """Killed while it trains and saves; the losses are those of a run that was not."""
    shape = ("--batch-size", 32, "--mesh", "data=2", "--model", "lenet", "--x64", "--lr", 0.02)
    flags = (*shape, "--steps", 60, "--checkpoint-every", 3, "--resume", "auto")
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    out = tmp_path / "killed"
    command = [sys.executable, str(RECIPE), *map(str, flags), "--out", str(out)]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (out / "checkpoints" / "6").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.kill()
    job.wait()
    assert not (out / "result.json").exists()
    done = run(*flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"resumed at step (\d+) of 60", done.stderr)[1]) >= 6
    losses = [json.loads((f / "result.json").read_text())["losses"] for f in (tmp_path / "whole", out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    other = run(*flags, "--out", out, "--seed", 1)
    assert other.returncode == 2
    assert "was made with --seed 0, not --seed 1" in other.stderr


@pytest.mark.slow
def test_a_run_taken_up_elsewhere_knows_the_losses_before(tmp_path):
    """A spike is measured by the steps before it; none is one until there are 8 of them."""
    shape = (
        "--batch-size",
        32,
        "--mesh",
        "data=1",
        "--model",
        "lenet",
        "--lr",
        1e-6,
        "--lr-schedule",
        "constant",
    )
    assert run(*shape, "--steps", 12, "--out", tmp_path / "a").returncode == 0
    done = run(*shape, "--steps", 19, "--spike", 1.0001, "--resume", tmp_path / "a", "--out", tmp_path / "b")
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"error: step 1\d, .* is above 1.0001 times 2\.\d+, the median of the last 1\d steps", done.stderr
    )


def test_the_best_checkpoint_is_kept_too(tmp_path):
    flags = ("--batch-size", 32, "--mesh", "data=1", "--model", "lenet", "--lr", 0.3, "--steps", 12)
    # Neither the table nor the picture may read it as their own language; it is longer than a line, and not cut.
    out = tmp_path / "[/odd] $x^$" / ("long" * 25)
    done = run(*flags, "--checkpoint-every", 2, "--keep", 1, "--best", "loss", "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"{out}/checkpoints/12".replace(" ", "") in re.sub(r"[\s│]", "", done.stdout)
    result = json.loads((out / "result.json").read_text())
    best = min(range(2, 13, 2), key=lambda step: result["losses"][step - 1])
    assert result["best_checkpoint"] == best
    assert {f.name for f in (out / "checkpoints").iterdir()} == {str(best), "12"}
    assert "best by loss" in done.stdout


@pytest.mark.slow
def test_an_earlier_run_is_kept(short, tmp_path):
    out = tmp_path / "run"
    flags = ("--steps", 2, "--batch-size", 8, "--mesh", "data=1", "--model", "lenet", "--out", out)
    assert run(*flags).returncode == 0
    first = (out / "result.json").read_text()
    second = run(*flags, "--seed", 1)
    assert second.returncode == 0
    (kept,) = out.glob("earlier-*")
    assert (kept / "result.json").read_text() == first
    assert f"is kept in {kept.name}/" in second.stderr


def bad_idx(folder):
    """idx files of which the training images are cut short."""
    folder.mkdir()
    for part, count in (("train", 20), ("t10k", 5)):
        pixels = np.zeros((count, 4, 4), np.uint8)
        head = bytes([0, 0, 8, 3]) + np.array([count, 4, 4], ">u4").tobytes()
        body = (head + pixels.tobytes())[: -7 if part == "train" else None]
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(body))
        labels = bytes([0, 0, 8, 1]) + np.array([count], ">u4").tobytes() + bytes(count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "data=2,hight=2"], "no axis 'hight'"),
        (["--mesh", "data:2"], "'data:2' is not axis=number"),
        (["--best", "speed"], "--best speed: there is no such metric; there are loss, accuracy"),
        (["--mesh", "data=16", "--devices", "8"], "needs 16 devices, there are 8; data=8 would fit"),
        (["--mesh", "data=3"], "a batch of 128 does not divide by data=3; use 126 or 129"),
        (
            ["--mesh", "data=2,pipe=2"],
            "mesh pipe=2,data=2 with --accumulate 1: its stages would work one at a time",
        ),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--data", "IDX"], "train-images-idx3-ubyte.gz"),
        (["--model", "resnet19"], "no such model; there are resnet8, resnet18"),
        (["--optimizer", "sdg"], "there are sgd, adam"),
        (["--steps", "0"], "--steps 0: use 1 or more"),
        (["--batch-size", "100000", "--mesh", "data=1"], "100000"),
        (["--parameters", "width"], "--parameters width: --mesh data=2,height=2,channel=2 has no such axis"),
        (["--x64", "--dtype", "bfloat16"], "--x64 computes in float64"),
        (["--out", "FILE/run"], "cannot be written"),
        (["--out", "FULL"], "holds files that are no run of ours"),
        (["--resume", "nowhere"], "--resume nowhere: there is no checkpoint in"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0: use 1 or more"),
        (["--keep", "0"], "--keep 0: use 1 or more"),
        (["--devices", "0"], "--devices 0"),
        (["--mesh", "data=1", "--accumulate", "3"], "times 3 microbatches; use 129"),
        (["--mesh", "data=--5"], "'data=--5' is not axis=number"),
        (["--mesh", "data=200000"], "at most 512 can be simulated"),
        (["--lr", "nan"], "--lr nan"),
        (["--weight-decay", "nan"], "--weight-decay nan: use 0 for none"),
        (["--start-limit", "inf"], "--start-limit inf: use seconds above 0, and 86400 (a day) at most"),
        (["--resume", "auto", "--compare"], "leave out --resume or --compare"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, message, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "full" / "checkpoints").mkdir()
    names = {"FILE/run": tmp_path / "file" / "run", "FULL": tmp_path / "full", "IDX": tmp_path / "idx"}
    if "IDX" in flags:
        bad_idx(tmp_path / "idx")
    given = [str(names.get(flag, flag)) for flag in flags]
    done = run(*given, *([] if "--out" in flags else ["--out", out]))
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(re.escape(message), errors[0])
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not out.exists()
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"


@pytest.mark.slow
def test_a_folder_in_which_another_run_writes_is_left_alone(tmp_path):
    out = tmp_path / "run"
    flags = ("--mesh", "data=1", "--model", "lenet", "--batch-size", 32, "--steps", 2, "--out", out)
    with lock_folder(out, wait=0.0):
        (out / "metrics.jsonl").write_text("the other's")
        done = run(*flags)
        assert done.returncode == FAULT
        assert f"error: --out {out}: another run is writing there" in done.stderr
        assert "Traceback" not in done.stderr
        assert (out / "metrics.jsonl").read_text() == "the other's"
        assert not (out / "checkpoints").exists()
        with pytest.raises(StartError), lock_folder(out, wait=0.1):
            pass
    assert run(*flags).returncode == 0
    (out / "metrics.jsonl").unlink()
    done = run(*flags, "--resume", "auto")
    assert done.returncode == 2
    assert "metrics.jsonl is not there any more" in done.stderr


def test_help_names_every_flag():
    done = run("--help")
    assert done.returncode == 0
    names = [
        "mesh",
        "model",
        "data",
        "steps",
        "batch-size",
        "seed",
        "optimizer",
        "lr",
        "dtype",
        "x64",
        "out",
        "devices",
        "resume",
        "checkpoint-every",
        "keep",
        "parameters",
    ]
    assert all(f"--{name}" in done.stdout for name in names)


@pytest.mark.slow
def test_the_readme_example_runs():
    """The README's own lines, word for word, on this process's devices."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "class Net" in block]
    assert len(example.strip().splitlines()) <= 24
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.8
