"""`erollout launch torchrun`: what it starts, what it refuses, how long it waits. test_chaos.py has two nodes that meet."""

import argparse
import contextlib
import io
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import write_config

from erollout.errors import UserError
from erollout.launch.gate import Gate
from erollout.launch.meeting import Meeting
from erollout.launch.torchrun import Node, add_command, launch_node


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(tmp_path))


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port that a process which is no store listens on, and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def _launch(*arguments: str) -> str:
    """What the command prints, inside this process."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["torchrun", *arguments])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert options.run(options, arguments) == 0
    return out.getvalue()


def test_a_dry_run_says_what_every_node_would_start(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    arguments = ["--nodes", "2", "--nproc-per-node", "4", "--head", "127.0.0.1", "--config", config, "--dry-run"]
    page = _launch(*arguments, "--", "train.steps=7", "data.args={a: 1}")
    assert "2 nodes x 4 = 8" in page
    assert "OMP_NUM_THREADS=3 " in page and "GLOO_SOCKET_IFNAME=lo" in page and "NCCL_SOCKET_IFNAME=lo" in page
    assert f"erollout.cli train --config {config} train.steps=7 'data.args={{a: 1}}'" in page
    assert page == _launch(*arguments, "--", "train.steps=7", "data.args={a: 1}"), "nodes would derive different ports"
    assert page != _launch(*arguments, "--", "train.steps=8", "data.args={a: 1}")
    assert "127.0.0.1:2" in page  # below the ports of outgoing connections


def test_one_node_needs_no_head(config: str) -> None:
    assert "2 on this machine" in _launch("--nproc-per-node", "2", "--config", config, "--dry-run")


CASES: dict[str, tuple[list[str], list[str]]] = {
    "no ranks": (["--nproc-per-node", "0"], ["--nproc-per-node = 0"]),
    "no head": (["--nodes", "2", "--nproc-per-node", "1"], ["--head"]),
    "another world": (
        ["--nodes", "2", "--nproc-per-node", "2", "--head", "localhost", "parallel.world_size=3"],
        ["parallel.world_size = 3", "= 4 ranks"],
    ),
    "unknown interface": (["--nproc-per-node", "1", "--interface", "nope0"], ["--interface = nope0", "lo"]),
    "misspelt head": (["--nodes", "2", "--nproc-per-node", "1", "--head", "a:b:c"], ["--head = a:b:c"]),
    "port out of range": (["--nodes", "2", "--nproc-per-node", "1", "--head", "localhost:70000"], ["localhost:70000"]),
    "unknown head": (["--nodes", "2", "--nproc-per-node", "1", "--head", "nowhere.invalid"], ["nowhere.invalid"]),
    "unknown head of one node": (
        ["--nproc-per-node", "1", "--head", "nowhere.invalid"],
        ["nowhere.invalid can't be resolved here"],
    ),
    "misspelt head of one node": (["--nproc-per-node", "1", "--head", "a:b:c"], ["--head = a:b:c"]),
    "misspelt key": (["--nproc-per-node", "1", "train.stesp=1"], ["train.stesp"]),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(name: str, config: str) -> None:
    arguments, words = CASES[name]
    with pytest.raises(UserError) as error:
        _launch("--config", config, "--dry-run", *arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_an_interface_that_the_environment_contradicts(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME = eth9"):
        _launch("--nproc-per-node", "1", "--interface", "lo", "--config", config, "--dry-run")


def test_a_file_where_the_logs_should_be(config: str) -> None:
    with pytest.raises(UserError, match=f"--log-dir = {config}/logs can't be made: Not a directory"):
        _launch("--nproc-per-node", "1", "--log-dir", f"{config}/logs", "--config", config)


def test_a_head_that_does_not_answer_is_waited_for_no_longer_than_asked() -> None:
    here, port = "127.0.0.1", 1
    node = Node(2, 1, Meeting("ours", head=here, port=port, address=here, interface="lo", is_head=False, wait_seconds=1))
    with pytest.raises(UserError, match=f"--head = {here}:{port} can't be reached within 1 s"):
        launch_node(["train"], node, "secret")


def test_a_port_that_something_else_holds(config: str, stranger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erollout.launch.gate.HELLO_SECONDS", 1)
    place = f"127.0.0.1:{stranger}"  # it says nothing, as a head that is too slow
    with pytest.raises(UserError, match=rf"--head = {place} can't be reached within 1 s \(timed out\).* nothing else has"):
        _launch("--nodes", "2", "--nproc-per-node", "1", "--head", place, "--wait", "1", "--config", config)


def test_a_port_that_another_run_holds(config: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    head = f"127.0.0.1:{listener.getsockname()[1]}"
    gate = Gate(listener, "theirs", "secret", nodes=2, store_port=1)
    with pytest.raises(UserError, match="taken by run theirs, and this is ours"):
        _launch("--nodes", "2", "--nproc-per-node", "1", "--head", head, "--run-id", "ours", "--config", config)
    gate.close()


def test_nodes_that_do_not_come_are_waited_for_no_longer_than_asked(config: str) -> None:
    with pytest.raises(UserError, match="the 2 nodes don't meet"):
        _launch("--nodes", "2", "--nproc-per-node", "1", "--head", "127.0.0.1", "--wait", "1", "--config", config)
