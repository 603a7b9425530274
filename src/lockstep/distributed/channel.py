"""Connections between the agents of a job: one from each node to node 0, whose agent leads.

Both ends prove that they know the job's key. Messages are JSON objects, so that receiving one cannot run code.
"""

import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from lockstep.core import PeerError, UsageError, World
from lockstep.distributed.process_group import listen, parse_rendezvous
from lockstep.runs import host_name

Message = dict[str, Any]

_CONNECT_SECONDS = 600.0
"""How long the leader waits for the other agents, and they for it: imports from a cold shared file system take minutes."""

_HANDSHAKE_SECONDS = 5


class Channel:
    """The connections of this agent, by the node at the other end: on node 0 one to each other node, elsewhere one to node 0.

    Args:
        silent_seconds: Time without a message or heartbeat after which the agent at the other end counts as gone.

    Attributes:
        hosts: Names of the machines at the other ends, as far as they are known.
        silent: Nodes whose agents are gone because they were silent for too long.
    """

    def __init__(self, connections: dict[int, Connection], silent_seconds: float) -> None:
        self.connections, self.silent_seconds = connections, silent_seconds
        self.hosts: dict[int, str] = {}
        self.silent: set[int] = set()
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._next_heartbeat = 0.0

    @classmethod
    def open(cls, agents: World, key: bytes, silent_seconds: float) -> "Channel":
        """Connect the agents of all nodes.

        Args:
            agents: This agent among those of all nodes; its rendezvous is that of the agents.
            key: The secret of the job.

        Raises:
            PeerError: An agent did not connect in time.
            UsageError: The key is not set.
        """
        if agents.size == 1:
            return cls({}, silent_seconds)
        if not key:
            raise UsageError("LOCKSTEP_KEY is not set, so the agents of this job cannot authenticate; export it to them.")
        connect = _accept if agents.is_rank_zero else _connect
        return cls(connect(agents, key, time.monotonic() + _CONNECT_SECONDS), silent_seconds)

    def send(self, message: Message) -> None:
        """Send a message over each connection; ``receive`` notices those that are gone."""
        _send(self.connections.values(), message)

    def receive(self, ready: Sequence[Any]) -> list[tuple[int, Message | None]]:
        """The messages of the connections that are ``ready``, each with the node that sent it; None: that agent is gone.

        Call it at least every few seconds, because it also sends heartbeats.
        """
        now = time.monotonic()
        if now > self._next_heartbeat:
            self._next_heartbeat = now + self.silent_seconds / 10
            self.send(_heartbeat())
        received: list[tuple[int, Message | None]] = []
        for node, connection in list(self.connections.items()):
            message: Message | None = {}
            if connection in ready:
                self._heard[node] = now
                try:
                    message = json.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    message = None
            elif now - self._heard[node] > self.silent_seconds:
                self.silent.add(node)
                message = None
            if message is None:
                connection.close()
                del self.connections[node]
            elif "host" in message:
                self.hosts[node] = message.pop("host")
            if message != {}:
                received.append((node, message))
        return received

    def close(self) -> None:
        """Close all connections. A forked rank calls it too: its copies would otherwise keep those of a killed agent open."""
        for connection in self.connections.values():
            connection.close()


def _heartbeat() -> Message:
    return {"host": host_name()}


def _send(connections: Iterable[Connection], message: Message) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.send_bytes(json.dumps(message).encode())


def _accept(agents: World, key: bytes, deadline: float) -> dict[int, Connection]:
    address, port = parse_rendezvous(agents.rendezvous)
    connections: dict[int, Connection] = {}
    next_heartbeat = 0.0
    with listen(address, port, agents.size) as server:
        server.settimeout(1.0)
        while len(connections) < agents.size - 1:
            if time.monotonic() > next_heartbeat:  # or these agents would count this one as gone while it waits for others
                next_heartbeat = time.monotonic() + 1.0
                _send(connections.values(), _heartbeat())
            if time.monotonic() > deadline:
                missing = ", ".join(str(node) for node in range(1, agents.size) if node not in connections)
                raise PeerError(
                    f"The agents of these nodes have not connected to {agents.rendezvous} within {_CONNECT_SECONDS:.0f} s: "
                    f"{missing}. They still import, or cannot reach it; see their output in the folder slurm of the run."
                )
            try:
                accepted, _ = server.accept()
            except (TimeoutError, ConnectionAbortedError):
                continue
            connection = _keep_alive(accepted)
            try:
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
                connections[json.loads(connection.recv_bytes())["node"]] = connection
            except (OSError, EOFError, ValueError, AuthenticationError):  # not an agent of this job
                connection.close()
                continue
            _set_read_timeout(connection, 0)
    return connections


def _connect(agents: World, key: bytes, deadline: float) -> dict[int, Connection]:
    address, port = parse_rendezvous(agents.rendezvous)
    while True:
        try:
            connection = _keep_alive(socket.create_connection((address, port), timeout=_HANDSHAKE_SECONDS))
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            connection.send_bytes(json.dumps({"node": agents.rank}).encode())
            _set_read_timeout(connection, 0)
            return {0: connection}
        except (OSError, EOFError, AssertionError, AuthenticationError) as error:  # still importing, or not the port of node 0
            if time.monotonic() > deadline:
                raise PeerError(
                    f"The agent of node {agents.rank} cannot reach that of node 0 at {agents.rendezvous} ({error})."
                ) from None
            time.sleep(0.1)


def _keep_alive(connected: socket.socket) -> Connection:
    """A connection that breaks within a minute after the other node has lost power."""
    connected.setblocking(True)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not on every system
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connection = Connection(connected.detach())
    _set_read_timeout(connection, _HANDSHAKE_SECONDS)
    return connection


def _set_read_timeout(connection: Connection, seconds: int) -> None:
    """Let reads of ``connection`` time out after ``seconds``; 0: never."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
