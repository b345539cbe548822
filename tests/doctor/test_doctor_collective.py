"""Nodes that meet to look at each other: processes of their own on the loopback interface, and the judgement of reports."""

import contextlib
import itertools
import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from commands import ENVIRONMENT
from ranks import RankPool
from warm import start

from erollout.doctor import collective
from erollout.doctor.judgement import Attendance, judge_arrivals, judge_reach, judge_sums
from erollout.doctor.reachability import Peer, answering, suspects, unreached
from erollout.launch.meeting import FIRST_PORT, NUM_PORTS

GREETING = b"a run of sixteen"
PEERS = [Peer(f"n{number}", f"10.0.0.{number}", 40000 + number) for number in (1, 2, 3)]
SECONDS = 120


class Nodes:
    """Processes that are named as a scheduler names them."""

    def __init__(self, folder: Path) -> None:
        self.port = secrets.choice(range(FIRST_PORT, FIRST_PORT + NUM_PORTS))
        self._folder = folder
        self._processes: dict[str, Any] = {}

    def start(self, name: str, *options: str, program: str | None = None) -> None:
        """`program`: Python that takes the options, in a fresh interpreter, instead of the command."""
        arguments = ["--head", f"127.0.0.1:{self.port}", "--interface", "lo", *options]
        environment = ENVIRONMENT | {"SLURMD_NODENAME": name}
        if program is None:
            self._processes[name] = start(["doctor", "--collective", *arguments], environment, self._folder / name)
        else:
            with open(self._folder / name, "w") as output:
                command = [sys.executable, "-c", program, *arguments]
                self._processes[name] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def wait_for_head(self) -> None:
        """Whoever is there by now."""
        for _ in range(10 * SECONDS):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.1)

    def wait(self) -> dict[str, tuple[int, list[str]]]:
        """Status and lines of each."""
        statuses = {name: process.wait(SECONDS) for name, process in self._processes.items()}
        return {name: (status, (self._folder / name).read_text().splitlines()) for name, status in statuses.items()}

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(SECONDS)


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    found = Nodes(tmp_path_factory.mktemp("nodes"))
    yield found
    found.end()


def _options(nodes: int, wait: int = 60, run: str = "ours") -> list[str]:
    return ["--nodes", str(nodes), "--run-id", run, "--wait", str(wait)]


@pytest.mark.end_to_end
def test_three_nodes_meet(nodes: Nodes, tmp_path: Path) -> None:
    for name in ("n1", "n2", "n3"):
        nodes.start(name, *_options(3), "--expect", "n1.cluster,n2.cluster,n3.cluster", "--shared", str(tmp_path))
    for name, (status, lines) in nodes.wait().items():
        assert status == 0 and lines[-1] == f"node {name} ok", lines
        assert "ok: collective: 3 nodes, barrier " in lines[-2] and " GB/s each way" in lines[-2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.end_to_end
def test_one_that_does_not_come_is_named(nodes: Nodes) -> None:
    for name in ("n1", "n2"):
        nodes.start(name, *_options(3, wait=8), "--expect", "n1,n2,n3")
    outcomes = nodes.wait()
    named = [lines for _, lines in outcomes.values() if "node n3 bad: did not arrive within 8 s" in lines]
    assert len(named) == 1, "by the head, and by it alone"
    for name, (status, lines) in outcomes.items():
        assert status == 1 and lines[-1] == f"node {name} ok"
        assert any(line.startswith("error: nodes: 2 of 3 nodes arrived within 8 s: n") for line in lines)


ABSENT_MINDED = """
import sys, time
from erollout.doctor import collective
from erollout.doctor.judgement import Attendance
{change}
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
attendance = Attendance("n3", int(options["--nodes"]))
collective.check_collective(options["--head"], options["--interface"], options["--run-id"], int(options["--wait"]), attendance)
"""
"""A node that comes, and of whose code something is changed."""


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # It listens where nobody else comes in, as behind a firewall that lets the head's port through.
        ("collective.Peer = lambda name, address, port: Peer(name, '127.0.0.1', 1)", "is not reached on data ports"),
        ("collective.unreached = lambda *_: sys.exit()", "arrived, and then did not answer"),
    ],
)
def test_one_that_comes_and_is_not_reached_is_named(change: str, reason: str, nodes: Nodes) -> None:
    change = change.replace("Peer(", "_Peer(") if "lambda name" in change else change
    program = ABSENT_MINDED.format(change=f"_Peer = collective.Peer\ncollective.REACH_SECONDS = 15\n{change}")
    head = "from erollout.doctor import collective\nfrom erollout.cli import main\nimport sys\ncollective.REACH_SECONDS = 15\n"
    for name in ("n1", "n2"):
        nodes.start(name, *_options(3), program=f"{head}sys.exit(main(['doctor', '--collective', *sys.argv[1:]]))")
    nodes.wait_for_head()
    nodes.start("n3", *_options(3), program=program)
    outcomes = nodes.wait()
    del outcomes["n3"]
    assert all(status == 1 and lines[-1] == f"node {name} ok" for name, (status, lines) in outcomes.items()), outcomes
    assert any(f"node n3 bad: {reason}" in lines for _, lines in outcomes.values()), outcomes


@pytest.mark.cluster
def test_a_port_that_another_run_holds(nodes: Nodes) -> None:
    nodes.start("n1", *_options(2, wait=40, run="theirs"))
    nodes.wait_for_head()
    nodes.start("n2", *_options(2, wait=8, run="ours"))
    outcomes = nodes.wait()
    assert [status for status, _ in outcomes.values()] == [1, 1]
    last = [lines[-1] for _, lines in outcomes.values()]
    assert "is taken by run theirs, and this is ours" in last[1], last


def _clock_ahead(late: list[float]) -> float:
    """For RankPool.run: rank 1 looks at its clock so many seconds late, one time after the other."""
    rank, delays = dist.get_rank(), itertools.chain(late, itertools.repeat(0.0))
    clock = SimpleNamespace(time=lambda: time.time() + (next(delays) if rank else 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective, "time", clock)
        return collective.clock_ahead(rank, 2)


@pytest.mark.distributed
def test_a_clock_that_is_wrong_is_told_from_a_node_that_stood_still(rank_pool: RankPool) -> None:
    assert all(abs(ahead) < 2 for ahead in rank_pool.run(2, _clock_ahead, [60.0, 30.0, 60.0]))
    behind, ahead = rank_pool.run(2, _clock_ahead, [60.0] * 100)
    assert ahead == pytest.approx(30, abs=2) and behind == pytest.approx(-30, abs=2)  # the median of two lies between


def test_who_is_reached() -> None:
    with answering("127.0.0.1", GREETING) as port, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        peers = [Peer("a", "127.0.0.1", port), Peer("b", "127.0.0.1", closed.getsockname()[1])]
        assert unreached(peers, GREETING) == [1]
        assert unreached(peers, b"another run, 16.") == [0, 1]


@pytest.mark.parametrize(
    ("failed", "groups"),
    [
        (set(), []),
        ({(0, 2), (1, 2)}, [{2}]),
        ({(2, 0), (2, 1)}, [{2}]),
        ({(0, 1)}, [{1}]),
        ({(0, 1), (1, 0)}, [{0, 1}]),
        ({(0, 1), (2, 1), (0, 4), (2, 4), (3, 1), (3, 4)}, [{1}, {4}]),
    ],
)
def test_who_explains_pairs_that_do_not_connect(failed: set[tuple[int, int]], groups: list[set[int]]) -> None:
    assert suspects(failed) == groups


def test_arrivals() -> None:
    three = Attendance("n1", 3, ("n1", "n2", "n3"))
    assert judge_arrivals(["n2", "n1", "n3"], "n1", three, 9).problem == ""
    decision = judge_arrivals(["n1", "n2.cluster"], "n1", three, 9)
    assert decision.problem == "2 of 3 nodes arrived within 9 s: n1, n2.cluster"
    assert decision.bad == {"n3": "did not arrive within 9 s"}
    assert judge_arrivals(["n1", "n2"], "n1", Attendance("n1", 3), 9).bad == {}, "nobody knows who is missing"
    assert list(judge_arrivals(["n1"], "n1", three, 9).bad) == ["n1"]
    assert list(judge_arrivals(["n1"], "n1", Attendance("n1", 2, ("n1", "n2")), 9).bad) == ["n2"]
    assert "n1 arrived more than once" in judge_arrivals(["n1", "n1", "n2"], "n1", three, 9).problem
    assert "n9 arrived, but expected are" in judge_arrivals(["n1", "n9", "n2"], "n1", three, 9).problem


def _reports(*unreached: list[int], shared: bool = True) -> dict[int, str]:
    return {number: json.dumps({"unreached": reached, "shared": shared}) for number, reached in enumerate(unreached)}


def test_reports_of_who_is_reached() -> None:
    assert judge_reach(PEERS, _reports([], [], []), None).problem == ""
    decision = judge_reach(PEERS, _reports([2], [2], []), None)
    assert decision.problem == "n1 does not reach n3 at 10.0.0.3:40003; n2 does not reach n3 at 10.0.0.3:40003"
    assert decision.bad == {"n3": "is not reached on data ports"}
    decision = judge_reach(PEERS[:2], _reports([1], [0]), None)
    assert decision.bad == {"n1": "it or n2 is not reached on data ports", "n2": "it or n1 is not reached on data ports"}
    decision = judge_reach(PEERS, _reports([2], [2]), None)
    assert decision.bad == {"n3": "arrived, and then did not answer"} and decision.problem
    reports = _reports([], []) | {2: json.dumps({"unreached": [], "shared": False})}
    assert "does not see the head's file in /scratch" in judge_reach(PEERS, reports, Path("/scratch")).bad["n3"]


def test_reports_of_sums() -> None:
    assert judge_sums(PEERS, {0: "", 1: "", 2: ""}).problem == ""
    assert judge_sums(PEERS, {0: "", 1: "", 2: "wrong"}).bad == {"n3": "wrong"}
    decision = judge_sums(PEERS, {0: "wrong", 1: "wrong", 2: "wrong"})
    assert decision.bad == {} and decision.problem == "n1: wrong; n2: wrong; n3: wrong"
    assert judge_sums(PEERS, {0: "late", 1: ""}).bad == {"n3": "did not answer in the collective"}
