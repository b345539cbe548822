"""Ray: scoring on its nodes, and runs placed on them; two real nodes on this machine, one of which dies."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_rewards import score

from erollout.errors import UserError
from erollout.launch.ray_cluster import find_cluster
from erollout.rewards import RewardPool, Scorer, ScoringCounts

pytest.importorskip("ray", reason="ray is not installed (pip install 'erollout[ray]')")
from ray_nodes import Node

pytestmark = pytest.mark.ray
SCRIPTED = Scorer("scripted_scorer:scripted")


@dataclasses.dataclass
class Nodes:
    head: Node
    other: Node


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    head = Node()
    try:
        other = Node(head.address)
        nodes = Nodes(head, other)
        yield nodes
        nodes.other.close()
    finally:
        head.close()


@pytest.fixture
def pool(nodes: Nodes) -> Iterator[RewardPool]:
    """A worker on each node."""
    from erollout.rewards.ray_pool import RayRewardPool

    with RayRewardPool(SCRIPTED, 2, timeout_seconds=60.0, error_value=-1.0, address=nodes.head.address) as pool:
        score(pool, *["sleep 0.3"] * 4)
        yield pool


def test_rewards_are_those_of_the_process_pool(pool: RewardPool) -> None:
    responses = [f"value {index / 7}" for index in range(40)] + ["raise no idea", "value nan"]
    ours = score(pool, *responses)
    counts = pool.counts
    with RewardPool(SCRIPTED, 2, timeout_seconds=60.0, error_value=-1.0) as processes:
        assert ours == score(processes, *responses)
        assert counts == dataclasses.replace(processes.counts, first_error=counts.first_error)
    assert counts.first_error is not None and counts.first_error.startswith(("RuntimeError: no idea", "ValueError: "))


def test_whatever_a_scorer_does_costs_only_its_own_sample_and_leaves_nothing_behind(nodes: Nodes, tmp_path: Path) -> None:
    from erollout.rewards.ray_pool import RayRewardPool

    with RayRewardPool(SCRIPTED, 2, timeout_seconds=2.0, error_value=-1.0, address=nodes.head.address) as pool:
        score(pool, "value 1", "value 1")
        values = score(pool, "value 1", f"child {tmp_path / 'pid'}", "value 2", "exit", "value 3", "allocate")
        assert values == [1.0, -1.0, 2.0, -1.0, 3.0, -1.0]
        assert (pool.counts.scored, pool.counts.errors, pool.counts.timeouts) == (3, 2, 1)
        assert score(pool, *["value 4"] * 4) == [4.0] * 4
        started = [int((tmp_path / "pid").read_text()), *pool.worker_pids]
    end = time.monotonic() + 30
    while any(map(psutil.pid_exists, started)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, started))


def test_responses_of_a_node_that_dies_are_scored_on_another(nodes: Nodes, pool: RewardPool) -> None:
    threading.Timer(1.0, nodes.other.kill).start()
    assert score(pool, *[f"sleep 2.{index}" for index in range(4)]) == [2.0, 2.1, 2.2, 2.3]
    assert pool.counts == ScoringCounts(scored=4)
    assert nodes.other.process.poll() is not None
    nodes.other.close()
    nodes.other = Node(nodes.head.address)


def test_scoring_that_has_no_place_is_refused_in_one_line(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    from erollout.rewards import ray_pool

    monkeypatch.setattr(ray_pool, "START_TIMEOUT_SECONDS", 1.0)
    with pytest.raises(UserError, match=r"rewards\.num_workers = 64 .* free are CPU 4 of 4"):
        ray_pool.RayRewardPool(SCRIPTED, 64, 2.0, 0.0, nodes.head.address)
    assert not ray_pool.ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1"),
        ("ray://a:1", "ray://a:1 is not HOST:PORT"),
        ("a", "no Ray cluster at a"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_at_once(address: str, message: str) -> None:
    with pytest.raises(UserError, match=f"rewards.pool = ray: {message}") as error:
        find_cluster(address, "rewards.pool = ray")
    assert "\n" not in str(error.value)
