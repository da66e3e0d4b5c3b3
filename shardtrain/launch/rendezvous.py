"""The processes of a job meet at the coordinator's port before jax uses it, and exchange their identities.

jax ends a process without an exception if the coordinator or a peer is missing. Here every process raises an
exception that names what is missing, within a time limit.

Every message is one line, signed with the token of the job. What a stranger sends is left out and logged; it
gets no answer.
"""

import errno
import ipaddress
import json
import logging
import os
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shardtrain.errors import StartError, UserError
from shardtrain.guard.token import TOKEN, authentic, job_token, signed
from shardtrain.launch.cluster import JAX_BIND_ADDRESS, Cluster, restarts
from shardtrain.launch.identity import ProcessIdentity

log = logging.getLogger(__name__)

NAME_LIMIT_SECONDS = 10.0
"""How long a name may fail to resolve before it is refused. In Kubernetes names appear with their pods."""

LONGEST_MESSAGE_BYTES = 1 << 20
"""A longer message does not come from a process of this job."""

MESSAGE_SECONDS = 10.0
"""A connection that has not sent its whole message after this time is not from a process of this job."""

MOST_WAITING = 512
"""So many connections may wait to send their messages; after that the oldest is closed."""

MOST_STRANGERS = 20
"""So many strangers are logged; more must not fill the log."""

CLOSE_SECONDS = 5.0
"""How long a process has to read the answer of process 0 and to close the connection."""

RETRY_SECONDS = 0.2
"""Time between two attempts to connect or to resolve a name."""

DAY_SECONDS = 86400.0
"""The longest limit of waiting; sockets cannot wait for ever."""


def meet(cluster: Cluster, identity: ProcessIdentity, limit: float) -> list[ProcessIdentity]:
    """Waits until all processes of the job have come, and exchanges their identities.

    Args:
        cluster: the place of this process.
        identity: of this process; JSON must be able to represent it.
        limit: seconds to wait.

    Returns:
        The identities in the order of the processes. Each has an entry `"skew"`: by how many seconds its
        clock is ahead of that of process 0, up to the time that a message takes.

    Raises:
        StartError: if a process or the coordinator is missing after `limit` seconds, or if the port is in
            use; a new start may succeed.
        UserError: if a name, number or address is wrong, which no new start changes.
    """
    line = _Line(job_token(os.environ), restarts(os.environ))
    end = time.monotonic() + limit
    in_kubernetes = cluster.scheduler == "Kubernetes"  # where names appear with their pods
    name_end = end if in_kubernetes else min(end, time.monotonic() + NAME_LIMIT_SECONDS)
    with naming(cluster):
        host, port = split_address(cluster.coordinator)
        try:
            address = resolve(host, name_end)
        except UserError as error:
            if cluster.source and not in_kubernetes:  # a user wrote it; the names of schedulers are right
                raise
            raise StartError(str(error)) from error
        if cluster.apart and ipaddress.ip_address(address).is_loopback:
            raise UserError(
                f"the coordinator {host!r} is {address} here, which is this host itself "
                f"({socket.gethostname()}), but process 0 runs on another; give it its real address in "
                f"/etc/hosts or in DNS"
            )
        if cluster.process_id == 0:
            refuse_elsewhere(host, address)
        else:
            here = f"process {cluster.process_id} on {socket.gethostname()}"
            connection = _connect(cluster, here, address, port, limit, end)
    if cluster.process_id == 0:
        server = listen(port, loopback(cluster))
        return _gather(_Gathering(cluster, identity, line, server), limit, end)
    return _report(cluster, identity, connection, here, line, limit, end)


def refuse_endless(name: str, limit: float) -> None:
    """Refuses a limit of waiting that is not above 0 and at most a day.

    Raises:
        UserError: if it is not; names the flag.

    Example:
        >>> refuse_endless("--start-limit", 1e9)
        Traceback (most recent call last):
        shardtrain.errors.UserError: --start-limit 1e+09: use seconds above 0, and 86400 (a day) at most
    """
    if not 0 < limit <= DAY_SECONDS:
        raise UserError(f"{name} {limit:g}: use seconds above 0, and {DAY_SECONDS:.0f} (a day) at most")


@contextmanager
def naming(cluster: Cluster | None) -> Iterator[None]:
    """Adds the flag or variable that gave the coordinator to the message of a `UserError` about it."""
    try:
        yield
    except UserError as error:
        if cluster is None or not cluster.given:
            raise
        raise type(error)(f"{cluster.given}: {error}") from error


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of an address `host:port`.

    Raises:
        UserError: if the text is not of this form.

    Example:
        >>> split_address("node1:62000")
        ('node1', 62000)
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{address!r} is no address; write HOST:PORT of process 0, such as node1:62000")
    return host.strip("[]"), int(port)


def resolve(host: str, end: float) -> str:
    """Returns the address of a host name; asks again until `end` while the name does not resolve.

    Raises:
        UserError: if the name still does not resolve.
    """
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"the coordinator's name {host!r} does not resolve on {socket.gethostname()} "
                    f"({error.strerror}); give the address of process 0's host, or add the name to /etc/hosts"
                ) from error
        time.sleep(RETRY_SECONDS)


class _Line:
    """Writes and reads the lines that processes send each other, signed with the token of the job.

    Args:
        token: of the job.
        start: how often the job was restarted; a line of an earlier start is that of a stranger.
    """

    def __init__(self, token: bytes, start: int) -> None:
        self._token, self._start = token, start

    def write(self, kind: str, content: Any) -> bytes:
        """Returns the line of a kind, `"report"` to process 0 or `"answer"` from it."""
        return signed(self._token, f"{kind} {self._start}", json.dumps(content)).encode() + b"\n"

    def read(self, kind: str, line: bytes | bytearray) -> Any:
        """Returns the content of a line; None if it is not of this kind, or if a stranger wrote it."""
        text = authentic(self._token, f"{kind} {self._start}", line.decode(errors="replace").strip("\n"))
        return None if text is None else json.loads(text)


def _gather(gathering: "_Gathering", limit: float, end: float) -> list[ProcessIdentity]:
    """Process 0: collects the identities of all others, then sends the whole list to each."""
    with gathering:
        try:
            while not gathering.is_complete and (left := end - time.monotonic()) > 0:
                gathering.turn(min(left, 1.0))
            gathering.refuse_missing(limit)
        except UserError as error:
            gathering.answer({"error": str(error), "may_pass": isinstance(error, StartError)})
            raise
        gathering.close()  # before a process that has the answer connects again
        gathering.answer(gathering.all)
        return gathering.all


class _Gathering:
    """The connections and identities that process 0 has so far.

    Args:
        cluster: the place of process 0.
        identity: of process 0.
        line: how messages are written.
        server: the socket at which process 0 listens.
    """

    def __init__(
        self, cluster: Cluster, identity: ProcessIdentity, line: _Line, server: socket.socket
    ) -> None:
        self.cluster = cluster
        self._identities: dict[int, ProcessIdentity] = {0: identity | {"skew": 0.0}}
        self._line, self._server = line, server
        self._selector = selectors.DefaultSelector()
        self._waiting: dict[socket.socket, tuple[bytearray, float, str]] = {}  # message, since, from
        self._members: dict[socket.socket, int] = {}  # processes of this job
        self._strangers = 0

    def __enter__(self) -> "_Gathering":
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._selector.close()

    def close(self) -> None:
        """Listens no more, and closes the connections that are not of this job."""
        self._server.close()
        for peer in list(self._waiting):
            self._drop(peer)

    @property
    def is_complete(self) -> bool:
        """Whether the identities of all processes are there."""
        return len(self._identities) == self.cluster.processes

    @property
    def all(self) -> list[ProcessIdentity]:
        """The identities in the order of the processes."""
        return [self._identities[rank] for rank in range(self.cluster.processes)]

    def turn(self, seconds: float) -> None:
        """Takes what comes within some seconds: connections, messages and ends."""
        for key, _ in self._selector.select(seconds):
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            if peer is self._server:
                self._accept()
            elif peer in self._waiting:
                self._receive(peer)
            elif peer in self._members and not _receive(peer):  # a member sends nothing more, it leaves
                self._identities.pop(self._members[peer], None)
                self._drop(peer)
        late = time.monotonic() - MESSAGE_SECONDS
        for peer in [peer for peer, (_, since, _) in self._waiting.items() if since < late]:
            self._drop(peer, f"sent no whole message in {MESSAGE_SECONDS:g} s")

    def answer(self, content: Any) -> None:
        """Sends an answer to all processes of this job."""
        _send_all(list(self._members), self._line.write("answer", content))

    def _accept(self) -> None:
        try:
            peer, address = self._server.accept()
        except OSError:  # it has left already
            return
        peer.setblocking(False)
        if len(self._waiting) >= MOST_WAITING:
            self._drop(next(iter(self._waiting)), f"is one of more than {MOST_WAITING} that send nothing")
        self._waiting[peer] = bytearray(), time.monotonic(), str(address[0])
        self._selector.register(peer, selectors.EVENT_READ)

    def _receive(self, peer: socket.socket) -> None:
        received = self._waiting[peer][0]
        received += (data := _receive(peer))
        if len(received) > LONGEST_MESSAGE_BYTES:
            self._drop(peer, f"sent more than {LONGEST_MESSAGE_BYTES} bytes")
        elif received.endswith(b"\n"):
            self._admit(peer, received)
        elif not data:
            self._drop(peer, "sent half a message" if received else "")

    def _admit(self, peer: socket.socket, message: bytearray) -> None:
        """Takes the process of this job that sent a message; drops whoever else sent it."""
        found = _as_identity(self._line.read("report", message))
        if found is None:
            self._drop(peer, f"sent no message of this job (it has no {TOKEN}, or another one)")
            return
        del self._waiting[peer]
        rank = self._members[peer] = found.pop("process_id")
        self._refuse_impostor(rank, found)
        self._identities[rank] = found | {"skew": found["time"] - time.time()}

    def _drop(self, peer: socket.socket, why: str = "") -> None:
        """Closes a connection, and logs why it is not one of this job."""
        host = self._waiting.pop(peer, (b"", 0.0, ""))[2]
        self._members.pop(peer, None)
        self._selector.unregister(peer)
        peer.close()
        if why and (number := self._strangers) < MOST_STRANGERS:
            self._strangers = number + 1
            log.warning("a stranger at the coordinator's port, from %s, %s: it is left out", host, why)

    def _refuse_impostor(self, rank: int, identity: ProcessIdentity) -> None:
        expected = self.cluster.processes
        if (processes := identity.pop("processes")) != expected or not 0 <= rank < processes:
            raise UserError(
                f"process {rank} on {identity['host']} was told of {processes} processes, process 0 of "
                f"{expected}; give all the same --processes"
            )
        if rank in self._identities:
            raise UserError(
                f"there are two processes with the number {rank}, on {self._identities[rank]['host']} and on "
                f"{identity['host']}; give each its own --process-id"
            )

    def refuse_missing(self, limit: float) -> None:
        """Raises a `StartError` that names the processes that did not come."""
        missing = sorted(set(range(self.cluster.processes)) - set(self._identities))
        if missing:
            raise StartError(
                f"of {self.cluster.processes} processes {len(missing)} did not come to process 0 at "
                f"{self.cluster.coordinator} within {limit:g} s: {', '.join(map(str, missing))}; see what "
                f"they say, and whether their hosts reach this port"
            )


def _report(
    cluster: Cluster,
    identity: ProcessIdentity,
    connection: socket.socket,
    here: str,
    line: _Line,
    limit: float,
    end: float,
) -> list[ProcessIdentity]:
    """Every other process: sends its identity to process 0, and waits for those of all."""
    with connection as server:
        message = identity | {
            "process_id": cluster.process_id,
            "processes": cluster.processes,
            "time": time.time(),
        }
        try:
            server.sendall(line.write("report", message))
            # Process 0 may have started later, and says who is missing when its own limit is over.
            last = max(end, time.monotonic()) + limit
            answer = _receive_line(server, last, cluster.processes * LONGEST_MESSAGE_BYTES)
        except OSError:
            answer = b""
    if not answer.endswith(b"\n"):
        raise StartError(
            f"{here}: process 0 at {cluster.coordinator} broke off before all processes were there, or does "
            f"not know this one (another {TOKEN}); see what it says"
        )
    identities = line.read("answer", answer)
    if identities is None:
        raise StartError(
            f"{here}: what answers at {cluster.coordinator} is no process of this job; name another port"
        )
    if "error" in identities:
        raise (StartError if identities["may_pass"] else UserError)(identities["error"])
    return identities


def _receive_line(server: socket.socket, end: float, most: int) -> bytes:
    """Returns what comes until a line is complete, `most` bytes are there, or the other end has closed.

    Raises:
        TimeoutError: if that takes longer than until `end`.
    """
    answer = bytearray()
    while not answer.endswith(b"\n") and len(answer) <= most:
        server.settimeout(max(0.001, end - time.monotonic()))
        if not (data := server.recv(1 << 16)):
            break
        answer += data
        if time.monotonic() > end:
            raise TimeoutError
    return bytes(answer)


def _connect(cluster: Cluster, here: str, address: str, port: int, limit: float, end: float) -> socket.socket:
    """Connects to process 0, as soon as it listens."""
    while True:
        left = end - time.monotonic()
        try:
            return socket.create_connection((address, port), timeout=max(0.1, min(5.0, left)))
        except OSError as error:
            if left <= 0:
                loopback = ipaddress.ip_address(address).is_loopback
                itself = f", and {address} is this host itself" if loopback else ""
                raise StartError(
                    f"{here}: nothing answers at the coordinator {cluster.coordinator} within {limit:g} s "
                    f"({error.strerror or error}{itself}); see whether process 0 runs there and lets this "
                    f"port through"
                ) from error
        time.sleep(RETRY_SECONDS)


def loopback(cluster: Cluster) -> str:
    """Returns the loopback address at which all ports of a job listen that runs on one host.

    It is empty for a job that may have several hosts, and where `JAX_COORDINATOR_BIND_ADDRESS` says at which
    address to listen. The ports of such a job are open to other hosts.

    Example:
        >>> loopback(Cluster("flags", "127.0.0.1:62000", 2, 0))
        '127.0.0.1'
    """
    if not cluster.is_local or os.environ.get(JAX_BIND_ADDRESS):
        return ""
    return resolve(split_address(cluster.coordinator)[0], 0.0)


def refuse_elsewhere(host: str, address: str) -> None:
    """Refuses a coordinator address that this host, which runs process 0, does not have.

    With `JAX_COORDINATOR_BIND_ADDRESS` nothing is refused: there may be a router in between.

    Raises:
        UserError: if the address belongs to another host.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and not os.environ.get(JAX_BIND_ADDRESS):
            raise UserError(
                f"process 0 is the coordinator and runs on {socket.gethostname()}, but {host!r} is "
                f"{address}, another host; name process 0's own host, or start it there"
            ) from error


def listen(port: int, address: str = "") -> socket.socket:
    """Returns a server socket.

    Args:
        port: its port.
        address: the only address at which it listens; by default it listens at all addresses of this host.

    Raises:
        StartError: if the port is in use.
        UserError: if this user may not use the port.
    """
    try:
        if address:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return socket.create_server((address, port), family=family, backlog=1024)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise (StartError if error.errno == errno.EADDRINUSE else UserError)(
            f"port {port} of {socket.gethostname()}, the coordinator, cannot be used "
            f"({os.strerror(error.errno or 0)}); another job may have it: give another in --coordinator or "
            f"JAX_COORDINATOR_PORT"
        ) from error


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1 << 16)
    except OSError:
        return b""


def _as_identity(found: Any) -> ProcessIdentity | None:
    """Returns what a process has sent if it is an identity, otherwise None."""
    wanted = {"process_id": int, "processes": int, "host": str, "time": float, "versions": dict}
    good = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in wanted.items())
    return found if good else None


def _send_all(peers: Sequence[socket.socket], message: bytes) -> None:
    """Sends a message to all, who close first: a port whose server closes first is not free at once."""
    for peer in peers:
        peer.settimeout(CLOSE_SECONDS)
        try:
            peer.sendall(message)
        except OSError:
            continue
    for peer in peers:
        _receive(peer)
        peer.close()
