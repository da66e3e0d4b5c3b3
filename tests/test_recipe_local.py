"""The locally connected recipe in processes of its own."""

import json

import pytest
from recipe_process import PNG, check_refused, gaps, run


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of 40 steps on 8 simulated devices, compared with one."""
    out = tmp_path_factory.mktemp("local") / "run"
    done = run("train_local.py", "--steps", 40, "--batch-size", 64, "--compare", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done, json.loads((out / "result.json").read_text())


def test_a_run_leaves_what_it_promises(short):
    out, done, result = short
    assert result["mesh"] == {"height": 2, "width": 2, "channel": 2}
    assert (result["model"], result["data"], len(result["losses"])) == ("LocalNet", "digits", 40)
    assert result["test_accuracy"] > 0.6  # chance is 0.1
    for name in ("curve.png", "predictions.png"):
        assert (out / name).read_bytes()[:8] == PNG
    assert list((out / "checkpoints").iterdir())
    assert list((out / "tensorboard").glob("events.out.*"))
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_each_device_holds_its_share_of_the_weights_and_sums_none_across_pixels(short):
    _, done, result = short
    weights = result["local_weights"]
    assert weights["bytes"] == 8 * weights["bytes_per_device"] > 0
    assert result["gradient_bytes_across_pixels"] == 0
    assert "(1/8)" in done.stdout
    assert "0 bytes summed across height and width" in done.stdout


def test_the_comparison_with_one_device_is_close(short):
    found = gaps(short[1])
    assert len(found) >= 4
    assert max(found) < 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "16", "0"], "--features 16 0: use 1 or more"),
        (["--data", "nowhere"], "data 'nowhere' is neither a known data set nor a folder"),
        (["--mesh", "height=2,depth=2"], "depth=2"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, message, tmp_path):
    out = tmp_path / "run"
    check_refused(run("train_local.py", *flags, "--out", out), message, out)
