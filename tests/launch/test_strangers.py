"""The ports of a job: where they listen, and what it does with messages that are not its own."""

import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from recipe_process import ROOT, environment

from shardtrain.launch.local import free_port

WORKER = Path(__file__).with_name("strangers_worker.py")

LISTENS = "0A"
"""The state of a socket in /proc/net/tcp that waits for connections."""

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

JUNK = (
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    HTTP2,
    HTTP2 + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff" * 100,
    HTTP2[:10],
    b'{"process_id": 1, "processes": 2, "host": "a", "time": 1.0, "versions": {}}\n',
    b"\x00" * 8,
    struct.pack("<Q", 1) + b"x",
    struct.pack("<q", -1),
    b"\xff" * 64,
    os.urandom(1 << 16),
    b"x" * (8 << 20),
)


def listening(pids):
    """The addresses at which processes wait for connections, from the kernel's own tables."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                inodes.add(descriptor.readlink().name.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, here, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and inode in inodes:
                address, port = here.split(":")
                words = [address[k : k + 8] for k in range(0, len(address), 8)]
                raw = b"".join(bytes.fromhex(word)[::-1] for word in words)  # of a little-endian machine
                found.add((socket.inet_ntop(family, raw), int(port, 16)))
    return found


def attack(address, message, *, leaves):
    """Sends something to a port; one that does not leave returns its connection."""
    with suppress(OSError):
        peer = socket.create_connection(address, 5)
        peer.settimeout(0.2)
        with suppress(OSError):
            for k in range(0, len(message), 1 << 20):
                peer.sendall(message[k : k + (1 << 20)])
        if not leaves:
            return peer
        peer.close()
    return None


def command(kind, folder):
    """How a user starts two processes here, and their environments."""
    worker = [sys.executable, str(WORKER), str(folder)]
    if kind == "launch local":
        return [([sys.executable, "-m", "shardtrain", "launch", "local", "-n", "2", "--", *worker], {})]
    shared = {"SHARDTRAIN_COORDINATOR": f"127.0.0.1:{free_port()}", "SHARDTRAIN_PROCESSES": "2"}
    return [(worker, shared | {"SHARDTRAIN_PROCESS_ID": str(rank)}) for rank in range(2)]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="ports are looked up in Linux' /proc")
@pytest.mark.parametrize("kind", ["launch local", pytest.param("environment", marks=pytest.mark.slow)])
def test_the_ports_of_a_job_here_are_closed_to_others_and_withstand_strangers(kind, tmp_path):
    """Every port is on loopback; forged, oversized, slow and half messages to each do not end the job."""
    jobs = []
    for k, (words, env) in enumerate(command(kind, tmp_path)):
        with (tmp_path / f"{k}.err").open("w") as err:
            jobs.append(subprocess.Popen(words, env=environment(**env), cwd=ROOT, stderr=err))
    end = time.monotonic() + 120
    places = [tmp_path / f"{rank}.pid" for rank in range(2)]
    with ExitStack() as slow:
        try:
            while not all(place.exists() and place.read_text() for place in places):
                assert time.monotonic() < end
                assert all(job.poll() is None for job in jobs)
                time.sleep(0.1)
            ports = listening([int(place.read_text()) for place in places])
            assert {address for address, _ in ports} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
            assert len(ports) >= 2  # jax's service, and the collectives of CPUs
            for port in ports:
                for message in JUNK:
                    attack(port, message, leaves=True)
                    if (peer := attack(port, message, leaves=False)) is not None:
                        slow.enter_context(peer)
            time.sleep(2)
        finally:
            (tmp_path / "end").touch()
            for job in jobs:
                job.wait(60)
    errors = [(tmp_path / f"{k}.err").read_text() for k in range(len(jobs))]
    assert [job.returncode for job in jobs] == [0] * len(jobs), errors
    assert all(int((tmp_path / f"{rank}.rounds").read_text()) > 10 for rank in range(2))
    assert ("no secret token" in "".join(errors)) is (kind == "environment")
