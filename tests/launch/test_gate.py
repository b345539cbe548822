"""The gate between the nodes of a run: who does not know the secret gets nothing, and nothing that he sends is executed."""

import os
import pickle
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import DistError, TCPStore

from erollout.environment import SECRET as VARIABLE
from erollout.errors import UserError
from erollout.launch import gate
from erollout.launch.gate import Stranger, ask
from erollout.launch.meeting import Access, Meeting, joined, take_seat
from erollout.launch.secret import secret_of

SECRET = "0123456789abcdef"


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def meeting() -> Meeting:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Meeting("ours", "127.0.0.1", port, "127.0.0.1", "lo", is_head=True, wait_seconds=20)


@pytest.fixture
def head(meeting: Meeting, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[Access]:
    """Whatever comes to it, it has nothing to say."""
    with joined(meeting, SECRET, nodes=2) as access:
        yield access
    assert "Traceback" not in capfd.readouterr().err and not caplog.records


def _place(meeting: Meeting) -> tuple[str, int]:
    return meeting.head, meeting.port


def test_nodes_that_know_the_secret_share_a_store_and_get_numbers(meeting: Meeting, head: Access) -> None:
    with joined(meeting, SECRET, nodes=2) as access:
        assert head.holds and not access.holds
        mine, theirs = (TCPStore("127.0.0.1", way.port, is_master=False) for way in (head, access))
        mine.set("key", b"x" * 300_000)
        assert theirs.get("key") == b"x" * 300_000
        numbers: list[int] = []
        other = threading.Thread(target=lambda: numbers.append(take_seat(meeting, SECRET, 2)))
        other.start()
        numbers.append(take_seat(meeting, SECRET, 2))
        other.join()
        assert sorted(numbers) == [0, 1]
        with pytest.raises(UserError, match="there are already 2 nodes"):
            take_seat(meeting, SECRET, 2)


def test_a_node_that_left_before_all_had_come_keeps_no_seat(meeting: Meeting, head: Access) -> None:
    ask(_place(meeting), "ours", SECRET, "seat 127.0.0.1").close()
    numbers: list[int] = []
    other = threading.Thread(target=lambda: numbers.append(take_seat(meeting, SECRET, 2)))
    other.start()
    other.join(0.5)
    assert numbers == []
    numbers.append(take_seat(meeting, SECRET, 2))
    other.join()
    assert sorted(numbers) == [0, 1]


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_greeting_that_does_not_come_is_asked_for_again(meeting: Meeting, how: str) -> None:
    with socket.create_server(_place(meeting)) as server:
        connection: list[socket.socket] = []
        accepting = threading.Thread(target=lambda: connection.append(server.accept()[0]))
        accepting.start()
        found: list[bool] = []

        def join() -> None:
            with joined(meeting, SECRET, nodes=2) as access:
                found.append(access.holds)

        node = threading.Thread(target=join)
        node.start()
        accepting.join()
        if how == "reset":
            connection[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection[0].close()
    node.join()
    assert found == [True], "the head opens its own gate once nobody is there"


def test_who_holds_connections_open_keeps_no_node_out_for_long(
    meeting: Meeting, head: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_UNPROVEN", 2)
    held = [socket.create_connection(_place(meeting)) for _ in range(3)]
    greetings = [connection.recv(100) for connection in held]
    assert [bool(greeting) for greeting in greetings] == [True, True, False]
    for connection in held:
        connection.close()
    with joined(meeting, SECRET, nodes=2) as access:
        assert not access.holds


def test_another_secret_is_refused_in_one_line(meeting: Meeting, head: Access) -> None:
    with pytest.raises(UserError, match="taken by a run of this name that has another secret"), joined(meeting, "x" * 32, 2):
        pass
    with pytest.raises(Stranger, match="run ours, and this is theirs"):
        ask(_place(meeting), "theirs", SECRET, "store")


@pytest.mark.parametrize("first", [b"store\n", b"0 0\nstore\n", b"\xff\xfe\n", b"x" * 100_000, b"\n", b""])
def test_a_stranger_gets_the_greeting_and_no_more(meeting: Meeting, head: Access, first: bytes) -> None:
    store = TCPStore("127.0.0.1", head.port, is_master=False)
    with socket.create_connection(_place(meeting)) as connection:
        connection.settimeout(20)
        assert connection.recv(100).startswith(b"erollout ours ")
        with suppress(OSError):  # hung up on
            connection.sendall(first)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    assert store.add("alive", 1) == 1


def test_a_store_that_does_not_prove_itself_is_not_talked_to(meeting: Meeting) -> None:
    """Someone who took the port of the head gets no secret out of a node, and no wish."""
    with socket.create_server(_place(meeting)) as server:
        heard: list[bytes] = []

        def pretend() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"erollout ours " + b"0" * 32 + b"\n")
                heard.append(connection.recv(1000))
                connection.sendall(b"1" * 64 + b"\n")
                heard.append(connection.recv(1000))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(Stranger, match="another secret"):
            ask(_place(meeting), "ours", SECRET, "store")
        thread.join()
    assert SECRET.encode() not in heard[0] and heard[1] == b""


def test_torchs_own_client_and_a_pickle_get_nowhere(meeting: Meeting, head: Access, tmp_path: Path) -> None:
    with pytest.raises(DistError):
        TCPStore(meeting.head, meeting.port, is_master=False, timeout=timedelta(seconds=1))
    file = tmp_path / "executed"
    with socket.create_connection(_place(meeting)) as connection:
        connection.recv(100)
        connection.sendall(pickle.dumps(Hostile(file)) + b"\n")
        connection.settimeout(20)
        with suppress(OSError):
            connection.recv(100)
    own = TCPStore("127.0.0.1", head.port, is_master=False)
    for key in ("torch.rendezvous.ours", "default_pg/0", "erollout/run"):
        own.set(key, pickle.dumps(Hostile(file)))
    with joined(meeting, SECRET, nodes=2):
        assert not file.exists()


def test_only_the_gate_listens_beyond_the_loopback(meeting: Meeting, head: Access) -> None:
    own = psutil.Process().net_connections("tcp")
    places = {(c.laddr.ip, c.laddr.port) for c in own if c.status == psutil.CONN_LISTEN}
    assert {place for place, _ in places} == {"127.0.0.1"}
    assert {_place(meeting), ("127.0.0.1", head.port)} <= places


def test_the_secret_of_nodes_that_are_started_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    run = tmp_path / "run"
    secret = secret_of(run)
    assert secret_of(run) == secret and len(secret) == 32
    (file,) = run.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        secret_of(run)
    monkeypatch.setenv(VARIABLE, "a-secret-of-slurm")
    assert secret_of(run) == "a-secret-of-slurm"
    assert not os.environ.get(VARIABLE), "the ranks would inherit it"
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(UserError, match="5 characters"):
        secret_of(run)
