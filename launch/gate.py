"""The gate: the only port of a run that other nodes can reach, with the nodes' seats and the run's store behind it.

torch's store listens on every interface without authentication. Here it listens on the head's loopback, and each other node has
a loopback port that is forwarded to it through this gate. The gate listens on one address; gate and node first prove to each
other that they know the run's secret:

    gate: erollout RUN_ID NONCE
    node: NONCE HMAC             of "node", the run id and both nonces, by SHA-256 with the secret as key
    gate: HMAC                   of "gate" and the same
    node: store                  from here on the bytes are the store's
       or: seat ADDRESS          the gate answers when all nodes have come: {"node": 1}

What follows is not encrypted: see docs/launching.md.
"""

import asyncio
import hmac
import json
import re
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from typing import Any

HELLO_SECONDS = 10
"""Time limit for the handshake."""
MOST_UNPROVEN = 1024
"""Limit of unauthenticated connections, so that they can't exhaust this process's file descriptors."""
_LONGEST_LINE = 1024
_CHUNK = 2**16
BACKLOG = 4096
_GREETING = re.compile(r"erollout (\S{1,200}) ([0-9a-f]{32})\n")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Stranger(Exception):
    """Raised if the other end does not belong to this run; the message says what it is."""


class Gate:
    """The gate on the head. Serves in its own thread until `close` or the end of the process."""

    def __init__(self, listener: socket.socket, run_id: str, secret: str, nodes: int, store_port: int) -> None:
        """
                Args:
                    listener: bound to the address that the other nodes connect to.
        nodes: number of seats.
                    store_port: port of the store on the loopback.
        """
        self._run_id, self._secret, self._nodes, self._store_port = run_id, secret, nodes, store_port
        self._seats: dict[asyncio.StreamWriter, str] = {}
        """Addresses of the waiting nodes, in order of arrival."""
        self._is_full = False
        self._unproven = 0
        """Number of connections that are not authenticated yet."""
        self.close = _serve(listener, self._answer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._unproven == MOST_UNPROVEN:  # nodes of this run retry
            return
        self._unproven += 1
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                wish = await self._wish(reader, writer)
        finally:
            self._unproven -= 1
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
        )  # a node may vanish without closing
        if wish == ["store"]:
            await _relay((reader, writer), await asyncio.open_connection("127.0.0.1", self._store_port))
        elif len(wish) == 2 and wish[0] == "seat":
            await self._give_seat(wish[1], reader, writer)

    async def _wish(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> list[str]:
        """Authenticate a connection and return its request; empty: it is not of this run."""
        own = secrets.token_hex(16)
        writer.write(f"erollout {self._run_id} {own}\n".encode())
        theirs, _, proof = (await reader.readline()).decode("ascii").strip().partition(" ")
        if not hmac.compare_digest(proof, _proof(self._secret, "node", self._run_id, own, theirs)):
            return []
        writer.write(f"{_proof(self._secret, 'gate', self._run_id, own, theirs)}\n".encode())
        return (await reader.readline()).decode("ascii").split()

    async def _give_seat(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_full:
            writer.write(b"full\n")
            await writer.drain()
            return
        self._seats[writer] = address
        if len(self._seats) == self._nodes:
            self._is_full = True
            for number, seat in enumerate(sorted(self._seats, key=lambda seat: ip_address(self._seats[seat]))):
                seat.write(f"{json.dumps({'node': number})}\n".encode())
        try:
            await reader.read()  # until it leaves
        finally:
            if not self._is_full:
                del self._seats[writer]


class GateEntry:
    """On a node without the store: a loopback port forwarded to it, until `close` or the end of the process."""

    def __init__(self, place: tuple[str, int], run_id: str, secret: str) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.port: int = listener.getsockname()[1]
        self._place, self._run_id, self._secret = place, run_id, secret
        self.close = _serve(listener, self._answer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.to_thread(ask, self._place, self._run_id, self._secret, "store")
        await _relay((reader, writer), await asyncio.open_connection(sock=there))


def ask(place: tuple[str, int], run_id: str, secret: str, wish: str) -> socket.socket:
    """Connect to the gate and send a request. Raises Stranger if something else listens there, OSError if nothing does."""
    with ExitStack() as failed:
        connection = failed.enter_context(socket.create_connection(place, timeout=HELLO_SECONDS))
        said = read_line(connection)
        if not said:
            raise ConnectionResetError("it hangs up without a greeting")
        greeting = _GREETING.fullmatch(said)
        if greeting is None:
            raise Stranger("something else")
        if greeting[1] != run_id:
            raise Stranger(f"run {greeting[1]}, and this is {run_id}")
        own = secrets.token_hex(16)
        connection.sendall(f"{own} {_proof(secret, 'node', run_id, greeting[2], own)}\n".encode())
        if not hmac.compare_digest(read_line(connection).strip(), _proof(secret, "gate", run_id, greeting[2], own)):
            raise Stranger("a run of this name that has another secret")
        connection.sendall(f"{wish}\n".encode())
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        failed.pop_all()
    return connection


def read_line(connection: socket.socket) -> str:
    """Read a line, and no byte beyond it; empty if the other end has closed. Raises OSError, and Stranger for other data."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return ""
        line += byte
        if len(line) > _LONGEST_LINE or not byte.isascii():
            raise Stranger("something else")
    return line.decode("ascii")


def _proof(secret: str, role: str, run_id: str, gates: str, nodes: str) -> str:
    message = "\0".join((role, run_id, gates, nodes))
    return hmac.new(secret.encode(), message.encode(), "sha256").hexdigest()


def _serve(
    listener: socket.socket, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> Callable[[], None]:
    """Serve connections in a new thread. Returns a function that ends it."""

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # a peer may send anything or leave at any moment, and asyncio reports tasks cancelled by `close`
        with suppress(OSError, ValueError, TimeoutError, Stranger, asyncio.IncompleteReadError, asyncio.CancelledError):
            await answer(reader, writer)
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(guarded, sock=listener, limit=_LONGEST_LINE, backlog=BACKLOG)
        async with server:
            await server.serve_forever()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=(loop, serve()), daemon=True)
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    return close


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    task = loop.create_task(work)
    loop.run_forever()  # runs until it is stopped
    for left in (task, *asyncio.all_tasks(loop)):
        left.cancel()
    loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
    loop.close()


async def _relay(one: Streams, other: Streams) -> None:
    """Relay bytes both ways until either end is closed."""
    ways = [asyncio.create_task(_pass_on(one[0], other[1])), asyncio.create_task(_pass_on(other[0], one[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        for _, writer in (one, other):
            writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
