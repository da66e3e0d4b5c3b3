"""Messages of a guard carry the job's token; what a stranger writes into the job's store is left out."""

import json
from pathlib import Path

import pytest
from jax._src.lib import _jax

from shardtrain import UserError
from shardtrain.guard.peers import Heartbeats, Peers
from shardtrain.guard.token import authentic, job_token, signed
from shardtrain.launch.local import free_port

TOKEN = b"a secret of thirty-two characters"


@pytest.fixture(scope="module")
def store():
    """A client of jax's real store, in which a stranger can write, too."""
    address = f"127.0.0.1:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0, init_timeout=10)
    client.connect()
    yield client
    client.shutdown()
    service.shutdown()


def test_a_message_is_of_its_token_place_and_text():
    message = signed(TOKEN, "notice/1", "stop")
    assert authentic(TOKEN, "notice/1", message) == "stop"
    assert TOKEN.decode() not in message
    for token, place, changed in [
        (b"another", "notice/1", message),
        (TOKEN, "notice/2", message),
        (TOKEN, "notice/1", message[:-1]),
        (TOKEN, "notice/1", message + " "),
        (TOKEN, "notice/1", message.replace(" ", "", 1)),
        (TOKEN, "notice/1", message.replace(" ", "\n", 1)),
        (TOKEN, "notice/1", message[1:]),
        (TOKEN, "notice/1", "stop"),
        (TOKEN, "notice/1", ""),
        (TOKEN, "notice/1", "\ud800é" * 50),
    ]:
        assert authentic(token, place, changed) is None, changed
    assert authentic(TOKEN, "a", signed(TOKEN, "a", "")) == ""
    assert authentic(TOKEN, "a b", signed(TOKEN, "a", "b c")) is None  # place and text do not flow together


def test_codes_are_compared_in_constant_time():
    source = (Path(__file__).parents[2] / "shardtrain" / "guard" / "token.py").read_text()
    assert "hmac.compare_digest(" in source


def test_the_token_of_a_job():
    assert job_token({"SHARDTRAIN_TOKEN": TOKEN.decode(), "SLURM_JOB_ID": "7"}) == TOKEN
    assert job_token({"SHARDTRAIN_JOB": "a/b/c", "SLURM_JOB_ID": "7"}) == b"a/b/c"
    assert job_token({"SHARDTRAIN_TOKEN": "", "SLURM_JOB_ID": "7"}) == b"7"
    assert job_token({}) == b""
    with pytest.raises(
        UserError, match=r"has 4 characters; give 16 or more, .* openssl rand -hex 16"
    ) as told:
        job_token({"SHARDTRAIN_TOKEN": "abcd"})
    assert "abcd" not in str(told.value)


def test_what_a_stranger_writes_is_left_out(store, caplog):
    """Forged, changed, moved, recorded and unreadable values; each key is logged once."""
    first, second = (Peers(store, rank, 2, "job", TOKEN) for rank in (0, 1))
    first.write("notice", "one")
    second.write("notice", "two")
    assert first.read("notice") == {0: "one", 1: "two"}
    recorded = store.key_value_try_get("job/notice/1")
    for key, value in {
        "job/notice/1": json.dumps({"kind": "failed", "text": "forged", "code": 2}).encode(),
        "job/notice/2": signed(TOKEN, "job/notice/2", "a rank that there is not").encode(),
        "job/notice/x": b"no rank",
        "job/notice/1/0": recorded.encode(),
        "job/notice/0": recorded.encode(),
        "job/notice/\u00e9": b"\xff\xfe",
    }.items():
        store.key_value_set_bytes(key, value, allow_overwrite=True)
        assert first.read("notice").get(1) in ("two", None)
    assert first.read("notice") == {}
    first.write("notice", "again")
    second.write("notice", "there")
    assert first.read("notice") == second.read("notice") == {0: "again", 1: "there"}
    store.key_value_set_bytes("job/notice/big", b"x" * (5 << 20), allow_overwrite=True)
    assert first.read("notice") == {0: "again", 1: "there"}
    for key in ("job/notice/1", "job/notice/2", "job/notice/x", "job/notice/1/0", "job/notice/0"):
        assert 1 <= caplog.text.count(f"'{key}' in the store") <= 2  # of two that read again and again


def test_a_heartbeat_that_is_recorded_and_written_again_is_no_life(store):
    now = 0.0
    peers, other = (Peers(store, rank, 2, "beats", TOKEN) for rank in (0, 1))
    beats, others = (Heartbeats(p, lambda: now) for p in (peers, other))
    others.send(1, "compute")
    recorded = store.key_value_try_get("beats/beat/1")
    others.send(2, "compute")
    beats.update()
    now = 100.0
    store.key_value_set("beats/beat/1", recorded, allow_overwrite=True)
    beats.update()
    assert beats.silent(50.0) == [1]
    assert beats.last[1]["step"] == 2
