"""What a run writes of itself can be read again."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from shardtrain.errors import UserError
from shardtrain.train.metrics import Recorder, read, writing


def events(folder):
    """Records of the event files: length, its checksum, an event, its checksum."""
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def test_a_recorder_goes_on_where_a_checkpoint_was(tmp_path):
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder(step, {"loss": 1.0 / step})
    with Recorder(tmp_path, start=2) as recorder:
        recorder(3, {"loss": 0.25, "accuracy": 0.5})
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25, "accuracy": 0.5},
    ]
    found = list(events(tmp_path))
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert scalars[-2:] == [(3, "loss", 0.25), (3, "accuracy", 0.5)]
    assert [e.step for e in found if e.session_log.status == SessionLog.START] == [3]


def test_what_a_file_system_refuses_is_a_sentence_and_nothing_else_is(tmp_path):
    with (
        pytest.raises(UserError, match=r"could not be written to \(No space left on device\)"),
        writing(tmp_path),
        open("/dev/full", "w") as file,
    ):
        file.write("one more row")
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "none" / "file").read_text()
