"""The rows that callbacks write to files can be read again."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from shardtrain.errors import UserError
from shardtrain.train.callbacks import JsonLines, TensorBoard
from shardtrain.train.callbacks.files import close, read_rows, writing


def events(folder):
    """Records of the event files: length, its checksum, an event, its checksum."""
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def write(folder, rows, start=0):
    """Writes rows by step, of a run of which `start` steps were done before."""
    lines, board = JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard")
    lines.open(start)
    board.open(start)
    for step, row in rows.items():
        lines.write(step, row)
        board.write(step, row)
    close(lines._file, folder, None)
    close(board._board, folder, None)


def test_files_go_on_where_a_checkpoint_was(tmp_path):
    write(tmp_path, {step: {"loss": 1.0 / step} for step in (1, 2, 3)})
    write(tmp_path, {3: {"loss": 0.25, "accuracy": 0.5}}, start=2)
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25, "accuracy": 0.5},
    ]
    found = list(events(tmp_path))
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert scalars[-2:] == [(3, "loss", 0.25), (3, "accuracy", 0.5)]
    assert [e.step for e in found if e.session_log.status == SessionLog.START] == [3]


def test_damaged_lines_are_left_out_and_no_others(tmp_path, caplog):
    """A kill cuts the last line short; a bad disk may spoil any."""
    path = tmp_path / "metrics.jsonl"
    rows = [
        b'{"step": 1, "loss": 1.0}',
        b'{"step": 2, "lo',
        b"[3]",
        b'{"step": 4}',
        b'\xff\xfe{"step": 5',
        b"6",
    ]
    path.write_bytes(b"\n".join([*rows, b'{"step": 7, "loss": NaN}', b'{"step": 8']))
    assert [row["step"] for row in read_rows(path)] == [1, 7]
    named = [record.getMessage() for record in caplog.records]
    assert named == [f"{path}: line {number} is damaged, and left out" for number in range(2, 7)]
    write(tmp_path, {8: {"loss": 0.5}}, start=7)
    assert [row["step"] for row in read_rows(path)] == [1, 7, 8]
    assert read_rows(tmp_path / "none") == []
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_rows(tmp_path)


def test_what_a_file_system_refuses_is_a_sentence_and_nothing_else_is(tmp_path):
    with (
        pytest.raises(UserError, match=r"could not be written to \(No space left on device\)"),
        writing(tmp_path),
        open("/dev/full", "w") as file,
    ):
        file.write("one more row")
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "none" / "file").read_text()
