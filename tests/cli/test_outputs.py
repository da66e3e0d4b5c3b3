"""What the command line reads and writes: regular files, new or its own, and text that can be shown."""

import json
import os
from pathlib import Path

import pytest

from shardtrain import UserError
from shardtrain.cli import command
from shardtrain.cli.outputs import printable
from shardtrain.cli.start import check_out
from shardtrain.files import expanded, parsed, whole
from shardtrain.pipeline import make

SLURM = ["launch", "slurm", "--out"]
K8S = ["launch", "k8s", "--image", "me/cnn:1", "--out"]
SHOW = ["pipeline", "show"]


def refused(words, capsys):
    """The sentence by which a command is refused."""
    with pytest.raises(SystemExit) as end:
        command.main([*map(str, words)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("words", [SLURM, K8S], ids=["slurm", "k8s"])
def test_a_job_file_is_new_or_ours(words, tmp_path, capsys):
    path = tmp_path / "new folder" / "job"
    command.main([*words, str(path), "--", "python", "a.py"])
    assert "in place" not in capsys.readouterr().err
    first = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    command.main([*words, str(path), "--", "python", "b.py"])
    assert capsys.readouterr().err == f"wrote {path} in place of another job\n"
    assert path.read_text() == first.replace("a.py", "b.py")
    assert [file.name for file in path.parent.iterdir()] == ["job"]
    mine = tmp_path / "notes"
    mine.write_text("mine\n")
    assert "is not one that this command wrote; name a new file, or remove it" in refused(
        [*words, mine, "--", "true"], capsys
    )
    assert mine.read_text() == "mine\n"
    assert "is a folder" in refused([*words, tmp_path, "--", "true"], capsys)
    os.mkfifo(tmp_path / "pipe")
    assert "it is no regular file" in refused([*words, tmp_path / "pipe", "--", "true"], capsys)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "cannot be replaced" in refused([*words, tmp_path / "link", "--", "true"], capsys)
    assert "there is no such user" in refused([*words, "~no such user/job", "--", "true"], capsys)


def _umask():
    before = os.umask(0)
    os.umask(before)
    return before


def test_pictures_and_schedules_are_new_or_ours(tmp_path, capsys):
    runs = tmp_path / "runs"
    (runs / "a").mkdir(parents=True)
    (runs / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    cases = [
        (["runs", runs, "--plot"], ".png", b"\x89PNG\r\n\x1a\nof another program"),
        ([*SHOW, "--png"], ".png", b"\x89PNG\r\n\x1a\nof another program"),
        ([*SHOW, "--csv"], ".csv", b"name,price\napples,3\n"),
    ]
    for k, (words, ending, other) in enumerate(cases):
        ours, theirs, pipe = (tmp_path / f"{name} {k}{ending}" for name in ("ours", "theirs", "pipe"))
        for _ in range(2):
            command.main([*map(str, words), str(ours)])
        capsys.readouterr()
        theirs.write_bytes(other)
        os.mkfifo(pipe)
        for path in (theirs, pipe):
            assert "name a new file" in refused([*words, path], capsys)
        assert theirs.read_bytes() == other
    for name in ("curves.jpg", "curves", "curves.png.pdf"):
        for words in (cases[0][0], cases[1][0]):
            assert "name a file that ends in .png" in refused([*words, tmp_path / name], capsys)
            assert not (tmp_path / name).exists()


def test_a_schedule_is_read_from_a_file_of_sane_size(tmp_path, capsys):
    pipe, large = tmp_path / "pipe.csv", tmp_path / "large.csv"
    os.mkfifo(pipe)
    with large.open("w") as file:
        file.truncate(1 << 30)
    assert "it is no regular file" in refused([*SHOW, "--schedule", pipe], capsys)
    assert "it has more than" in refused([*SHOW, "--schedule", large], capsys)
    make("1f1b", 2, 4).save(tmp_path / "good.csv")
    command.main([*SHOW, "--schedule", str(tmp_path / "good.csv")])


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", ".run-lock", "result.json"])
def test_a_pipe_in_the_folder_of_a_run_is_refused(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"holds a pipe or a device, .*; name a new or empty folder"):
        check_out(tmp_path)


def test_what_can_be_shown():
    assert printable("a\x1b[31mb\x07\u202e\udcff\u00e9\n") == r"a\x1b[31mb\x07\u202e\udcffé\n"
    assert printable("a\nb", keep="\n") == "a\nb"


def test_a_sentence_shows_no_escapes(tmp_path, capsys):
    assert "\x1b" not in refused(["runs", tmp_path / "\x1b[31mred"], capsys)


def test_files(tmp_path):
    for content in ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "", "{"):
        with pytest.raises(ValueError, match=r"nested too deeply|Expecting|Exceeds the limit"):
            parsed(content)
    file = tmp_path / "file"
    file.write_text(json.dumps({"a": 1}))
    assert parsed(whole(file, 100)) == {"a": 1}
    with pytest.raises(OSError, match="it has more than 3 bytes"):
        whole(file, 3)
    with pytest.raises(OSError, match="it has more than 3 bytes"):
        whole("/proc/self/status", 3)  # says that it is empty
    assert expanded("~/a") == Path.home() / "a"
