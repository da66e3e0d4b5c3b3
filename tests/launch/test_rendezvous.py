"""Processes meet over real sockets; here each is a thread."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress

import pytest

from shardtrain import UserError
from shardtrain.errors import StartError
from shardtrain.launch import Cluster, rendezvous
from shardtrain.launch.identity import own_identity, refuse_unequal
from shardtrain.launch.local import free_port
from shardtrain.launch.rendezvous import loopback, meet, refuse_elsewhere, split_address

IDENTITY = own_identity()
TOKEN = b"a secret of thirty-two characters"


def job(processes, port, **more):
    return [Cluster("flags", f"127.0.0.1:{port}", processes, rank, **more) for rank in range(processes)]


class Refused(str):
    """What an error says, and whether a new start may succeed."""

    def __new__(cls, text, *, may_pass):
        error_text = super().__new__(cls, text)
        error_text.may_pass = may_pass
        return error_text


def all_meet(clusters, limit=5.0, late=0.0):
    """What each process gets or raises; `late` seconds between their starts."""

    def one(cluster):
        time.sleep(late * cluster.process_id)
        try:
            return meet(cluster, IDENTITY | {"mine": cluster.process_id}, limit)
        except UserError as error:
            return Refused(str(error), may_pass=isinstance(error, StartError))

    with ThreadPoolExecutor(len(clusters)) as pool:
        return list(pool.map(one, clusters))


def report(token=b"", start=0, **more):
    """What a process sends that knows the token."""
    return rendezvous._Line(token, start).write("report", IDENTITY | {"time": time.time()} | more)


def dial(cluster):
    """A connection to process 0, as soon as it is there."""
    end = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(split_address(cluster.coordinator), 5)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize("backwards", [False, True])
def test_all_get_the_identities_of_all(backwards):
    clusters = job(5, free_port())
    results = all_meet(clusters[::-1] if backwards else clusters, late=0.05)
    for identities in results:
        assert [identity["mine"] for identity in identities] == [0, 1, 2, 3, 4]
        assert max(abs(identity["skew"]) for identity in identities) < 1


def test_they_can_meet_again_at_once_at_the_same_port():
    port = free_port()
    for _ in range(10):
        assert all(len(identities) == 3 for identities in all_meet(job(3, port)))


def test_missing_processes_are_named_to_all():
    start = time.monotonic()
    first, second = all_meet(job(4, free_port())[:2], limit=1.0)
    assert first == second
    assert "of 4 processes 2 did not come to process 0" in first
    assert "within 1 s: 2, 3;" in first
    assert first.may_pass
    assert second.may_pass  # the others learn of it from process 0
    assert time.monotonic() - start < 3


def test_no_coordinator():
    start = time.monotonic()
    (error_text,) = all_meet(job(2, free_port(), source="SHARDTRAIN_COORDINATOR")[1:], limit=1.0)
    assert error_text.startswith("SHARDTRAIN_COORDINATOR=127.0.0.1:")
    assert "process 1 on" in error_text
    assert "nothing answers at the coordinator 127.0.0.1:" in error_text
    assert "within 1 s (Connection refused, and 127.0.0.1 is this host itself)" in error_text
    assert error_text.may_pass
    assert time.monotonic() - start < 3


def test_a_coordinator_that_dies_while_others_wait():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        (error_text,) = all_meet(job(2, port)[1:])
        thread.join()
    assert "broke off before all processes were there" in error_text
    assert error_text.may_pass


def test_someone_else_at_the_port():
    port = free_port()

    def web_server():
        peer, _ = server.accept()
        peer.recv(100)
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        peer.close()

    with socket.create_server(("127.0.0.1", port)) as server:
        thread = threading.Thread(target=web_server)
        thread.start()
        (error_text,) = all_meet(job(2, port)[1:])
        thread.join()
    assert "is no process of this job; name another port" in error_text


def test_strangers_do_not_disturb(monkeypatch, caplog):
    """Forged, oversized, slow and half messages are left out and logged; nobody who sends them gets an answer."""
    monkeypatch.setenv("SHARDTRAIN_TOKEN", TOKEN.decode())
    monkeypatch.setattr(rendezvous, "LONGEST_MESSAGE_BYTES", 10_000)
    monkeypatch.setattr(rendezvous, "MESSAGE_SECONDS", 0.4)
    monkeypatch.setattr(rendezvous, "MOST_STRANGERS", 100)
    clusters = job(3, free_port())
    forged = {"process_id": 1, "processes": 3}
    whole = report(TOKEN, **forged)
    messages = [
        json.dumps(IDENTITY | forged).encode() + b"\n",  # as it was before there were tokens
        report(b"another token, a long one", **forged),
        report(b"", process_id=1, processes=7),  # of another number of processes: once the end of the job
        report(TOKEN, start=1, **forged),  # recorded in an earlier start of the job
        rendezvous._Line(TOKEN, 0).write("answer", IDENTITY | forged),  # reflected
        whole.replace(b'"processes": 3', b'"processes": 4'),  # changed on its way
        report(TOKEN, process_id="1", processes=3),
        b"x" * 10_001,
        whole[: len(whole) // 2],
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"process_id": 1}\n',
        b"\xff\xfe\n",
        b"",
    ]

    def attack(message, *, leaves):
        with dial(clusters[0]) as peer, suppress(ConnectionError):
            peer.sendall(message)
            if leaves:
                peer.shutdown(socket.SHUT_WR)
            return peer.recv(100)  # a slow one only waits
        return b""

    with ThreadPoolExecutor(2 * len(messages) + 1) as pool:
        attacks = [pool.submit(attack, m, leaves=leaves) for m in messages for leaves in (False, True)]
        results = all_meet(clusters, late=0.7)
        answers = [done.result() for done in attacks]
    assert [len(identities) for identities in results] == [3, 3, 3]
    assert set(answers) == {b""}
    for why in (
        "no message of this job",
        "more than 10000 bytes",
        "half a message",
        "no whole message in 0.4 s",
    ):
        assert why in caplog.text
    assert TOKEN.decode() not in caplog.text


def test_many_that_send_nothing_do_not_keep_a_process_out(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "MOST_WAITING", 3)
    clusters = job(2, free_port())
    with ThreadPoolExecutor(1) as pool, ExitStack() as connections:
        meeting = pool.submit(all_meet, clusters, late=1.0)
        for _ in range(30):
            connections.enter_context(dial(clusters[0]))
        assert [len(identities) for identities in meeting.result()] == [2, 2]
    assert len(caplog.records) == rendezvous.MOST_STRANGERS  # and not one for each


def test_a_process_with_another_token_is_told(monkeypatch):
    clusters, tokens = job(2, free_port()), iter([TOKEN, b"another token, a long one"])
    monkeypatch.setattr(rendezvous, "job_token", lambda env: next(tokens))
    first, second = all_meet(clusters, limit=1.5, late=0.2)
    assert "1 did not come" in first
    assert "does not know this one (another SHARDTRAIN_TOKEN)" in second
    assert second.may_pass


@pytest.mark.parametrize(
    ("coordinator", "local"),
    [
        ("127.0.0.1:5", True),
        ("127.1:5", True),
        ("localhost:5", True),
        ("[::1]:5", True),
        ("[::ffff:127.0.0.1]:5", True),
        ("192.0.2.1:5", False),
        ("node1:5", False),
        (f"{socket.gethostname()}:5", False),  # other hosts may know it by another address
        ("", False),
    ],
)
def test_jobs_of_one_host(coordinator, local):
    assert Cluster("flags", coordinator, 2, 0).is_local is local


def test_a_port_of_one_host_is_closed_to_others(monkeypatch):
    port = free_port()
    with rendezvous.listen(port, loopback(job(2, port)[0])) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with rendezvous.listen(port, loopback(Cluster("flags", f"[::1]:{port}", 2, 0))) as server:
        assert server.getsockname()[0] == "::1"
    assert loopback(Cluster("Slurm", f"node1:{port}", 2, 0)) == ""
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{port}")
    assert loopback(job(2, port)[0]) == ""  # somebody knows better


def test_a_process_that_leaves_is_missing():
    clusters = job(4, free_port())

    def leave():
        with dial(clusters[0]) as peer:
            peer.sendall(report(process_id=2, processes=4))
            time.sleep(0.3)

    thread = threading.Thread(target=leave)
    thread.start()
    error_text = all_meet(clusters[:2], limit=1.5)
    thread.join()
    assert all("2 did not come to process 0" in text and "within 1.5 s: 2, 3;" in text for text in error_text)


def test_a_stranger_that_never_ends_is_left(monkeypatch):
    monkeypatch.setattr(rendezvous, "LONGEST_MESSAGE_BYTES", 1000)
    clusters = job(2, free_port())
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(all_meet, clusters[:1], limit=4.0)
        with dial(clusters[0]) as peer:
            peer.settimeout(2)
            peer.sendall(b"x" * 1001)
            assert peer.recv(1) == b""
        assert "1 did not come" in meeting.result()[0]


def test_a_coordinator_that_hangs():
    with socket.create_server(("127.0.0.1", free_port())) as server, ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        meeting = pool.submit(all_meet, job(2, server.getsockname()[1])[1:], limit=0.5)
        with server.accept()[0]:
            wait([meeting], timeout=5)
            took = time.monotonic() - start
        assert "broke off before all processes were there" in meeting.result()[0]
    assert took < 4


def test_a_process_that_takes_its_time_to_leave_and_has_another_clock(monkeypatch):
    monkeypatch.setattr(rendezvous, "CLOSE_SECONDS", 0.3)
    clusters = job(2, free_port())
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(all_meet, clusters[:1])
        with dial(clusters[0]) as peer:
            peer.sendall(report(process_id=1, processes=2, time=time.time() + 100))
            assert peer.recv(1 << 16).endswith(b"\n")
            done, _ = wait([meeting], timeout=4)
            assert done
        (identities,) = meeting.result()
    assert identities[0]["skew"] == 0
    assert 95 < identities[1]["skew"] < 101


def test_a_port_that_is_taken():
    with socket.create_server(("", free_port())) as server:
        (error_text,) = all_meet(job(2, server.getsockname()[1])[:1])
    assert "cannot be used (Address already in use)" in error_text
    assert "JAX_COORDINATOR_PORT" in error_text
    assert error_text.may_pass


def test_two_of_the_same_number_and_two_sizes():
    port = free_port()
    zero, one, _ = job(3, port)
    refused = all_meet([zero, one, one])
    assert all(
        "two processes with the number 1" in error_text and not error_text.may_pass for error_text in refused
    )
    other = Cluster("flags", f"127.0.0.1:{port}", 2, 1)
    assert all(
        "was told of 2 processes, process 0 of 3" in error_text for error_text in all_meet([zero, other])
    )


def test_a_wrong_name_is_said_at_once_but_in_kubernetes(monkeypatch):
    monkeypatch.setattr("shardtrain.launch.rendezvous.NAME_LIMIT_SECONDS", 0.5)
    start = time.monotonic()
    (error_text,) = all_meet([Cluster("Slurm", "no-such-node:62000", 2, 1)], limit=60.0)
    assert "the coordinator's name 'no-such-node' does not resolve" in error_text
    assert time.monotonic() - start < 20  # a resolver without a network takes its time
    assert error_text.may_pass  # Slurm knows its nodes
    named = Cluster("Slurm", "no-such-node:62000", 2, 1, source="JAX_COORDINATOR_ADDRESS")
    (error_text,) = all_meet([named], limit=60.0)
    assert error_text.startswith("JAX_COORDINATOR_ADDRESS=no-such-node:62000: the coordinator's name")
    assert not error_text.may_pass
    start = time.monotonic()
    all_meet([Cluster("Kubernetes", "no-such-pod.a:62000", 2, 1)], limit=2.0)
    assert time.monotonic() - start >= 2


def test_a_loopback_coordinator_of_another_host():
    (error_text,) = all_meet([Cluster("Slurm", "localhost:62000", 2, 1, hosts=2, apart=True)])
    assert (
        "'localhost' is 127.0.0.1 here, which is this host itself" in error_text
        or "'localhost' is ::1" in error_text
    )


def test_process_0_on_another_host_than_the_coordinator(monkeypatch):
    named = Cluster("Slurm", "192.0.2.1:62000", 2, 0, source="JAX_COORDINATOR_ADDRESS")  # of nobody
    (error_text,) = all_meet([named])
    assert error_text.startswith("JAX_COORDINATOR_ADDRESS=192.0.2.1:62000: process 0 is the coordinator")
    assert "but '192.0.2.1' is 192.0.2.1, another host" in error_text
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:62000")  # of someone who knows of a router
    refuse_elsewhere("192.0.2.1", "192.0.2.1")


@pytest.mark.parametrize("address", ["node1", "node1:", ":5", "node1:0", "node1:70000", "node1:x"])
def test_what_is_no_address(address):
    with pytest.raises(UserError, match="write HOST:PORT"):
        split_address(address)


def test_ipv6():
    assert split_address("[::1]:5") == ("::1", 5)


def test_unequal_versions():
    own = own_identity()
    assert refuse_unequal([own, own]) == []
    other = own | {"versions": own["versions"] | {"jax": "0.1"}, "host": "b"}
    with pytest.raises(UserError, match=r"jax is 0.1 in process 1 \(b\) and .* in process 0"):
        refuse_unequal([own, other])
    other = own | {"versions": own["versions"] | {"nvidia-nccl-cu13": "2.31.2"}, "host": "b"}
    (error_text,) = refuse_unequal([own, other, other])  # nobody knows that it does harm
    assert error_text.startswith("nvidia-nccl-cu13 is 2.31.2 in process 1 (b) and missing in process 0 (")
