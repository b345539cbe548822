"""Reachability between the nodes of a job on data ports, and which nodes are to blame for failures."""

import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

ANSWER_SECONDS = 5.0
_CALLS_AT_ONCE = 64
_GREETING_BYTES = 16


@dataclass(frozen=True, slots=True)
class Peer:
    """An arrived node and its listening address."""

    name: str
    address: str
    port: int


@contextmanager
def answering(address: str, greeting: bytes) -> Iterator[int]:
    """Context that greets all connections to the address on a free port, which is yielded."""
    assert len(greeting) == _GREETING_BYTES
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen(1024)
        threading.Thread(target=_greet, args=(listener, greeting), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread


def _greet(listener: socket.socket, greeting: bytes) -> None:
    with suppress(OSError):
        while True:
            caller, _ = listener.accept()
            with caller, suppress(OSError):
                caller.sendall(greeting)


def unreached(peers: Sequence[Peer], greeting: bytes) -> list[int]:
    """Indices of the peers that do not answer in time."""
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        greets = list(pool.map(lambda peer: _greets(peer, greeting), peers))
    return [index for index, greeted in enumerate(greets) if not greeted]


def _greets(peer: Peer, greeting: bytes) -> bool:
    try:
        with socket.create_connection((peer.address, peer.port), timeout=ANSWER_SECONDS) as connection:
            return connection.recv(_GREETING_BYTES, socket.MSG_WAITALL) == greeting
    except OSError:
        return False


def suspects(failed: set[tuple[int, int]]) -> list[set[int]]:
    """Nodes that explain all failed pairs (from, to), those in most pairs first. A set of several means that it is one of them,
    but unknown which.
    """
    left, found = set(failed), []
    while left:
        pairs = Counter(node for pair in left for node in set(pair))
        # of two in equally many pairs, the one that others can't reach: a closed port is likelier than blocked outgoing traffic
        reached = Counter(to for _, to in left)
        most = max((pairs[node], reached[node]) for node in pairs)
        group = {node for node in pairs if (pairs[node], reached[node]) == most}
        independent = not any(a in group and b in group for a, b in left)
        found += [{node} for node in sorted(group)] if independent else [group]
        left = {pair for pair in left if not group & set(pair)}
    return found
