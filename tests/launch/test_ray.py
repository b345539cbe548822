"""Ray: scoring on its nodes, and runs placed on them; two real nodes on this machine, one of which dies."""

import dataclasses
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import ENVIRONMENT, command, execute
from ranks import RankPool
from safetensors.torch import load_file
from test_rewards import score
from tiny_runs import history, steps_recorded, tiny_tree, train_here, write_config

from erollout.checkpoint.manifest import complete_checkpoints
from erollout.errors import UserError
from erollout.rewards import RewardPool, Scorer, ScoringCounts
from erollout.schedulers.ray_cluster import find_cluster

pytest.importorskip("ray", reason="ray is not installed (pip install 'erollout[ray]')")
from ray_nodes import Node

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # a start takes minutes where many share few cores
SCRIPTED = Scorer("scripted_scorer:scripted")
FOREVER = 3000


@dataclasses.dataclass
class Nodes:
    head: Node
    other: Node


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    head = Node()
    nodes = Nodes(head, head)
    try:
        nodes.other = Node(head.address, num_gpus=1)  # that it has none is for its checks to find
        yield nodes
    finally:
        nodes.other.close()
        head.close()


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    """Both alive."""
    if cluster.other.process.poll() is not None:
        cluster.other.close()
        cluster.other = Node(cluster.head.address, num_gpus=1)
    return cluster


class Process(subprocess.Popen[bytes]):
    """The command, with what it has said so far."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            super().__init__(command(*arguments), env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def pool(nodes: Nodes) -> Iterator[RewardPool]:
    """A worker on each node."""
    from erollout.rewards.ray_pool import RayRewardPool

    with RayRewardPool(SCRIPTED, 2, timeout_seconds=60.0, error_value=-1.0, address=nodes.head.address) as pool:
        score(pool, *["sleep 0.3"] * 4)
        yield pool


@pytest.mark.full
def test_rewards_are_those_of_the_process_pool(pool: RewardPool) -> None:
    responses = [f"value {index / 7}" for index in range(40)] + ["raise no idea", "value nan"]
    ours = score(pool, *responses)
    counts = pool.counts
    with RewardPool(SCRIPTED, 2, timeout_seconds=60.0, error_value=-1.0) as processes:
        assert ours == score(processes, *responses)
        assert counts == dataclasses.replace(processes.counts, first_error=counts.first_error)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "ray took a signal that is the run's"
    assert counts.first_error is not None and counts.first_error.startswith(("RuntimeError: no idea", "ValueError: "))


@pytest.mark.full
def test_whatever_a_scorer_does_costs_only_its_own_sample_and_leaves_nothing_behind(nodes: Nodes, tmp_path: Path) -> None:
    from erollout.rewards.ray_pool import RayRewardPool

    with RayRewardPool(SCRIPTED, 2, timeout_seconds=6.0, error_value=-1.0, address=nodes.head.address) as pool:
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


@pytest.mark.full
def test_scoring_that_has_no_place_is_refused_in_one_line(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    from erollout.rewards import ray_pool

    monkeypatch.setattr(ray_pool, "START_TIMEOUT_SECONDS", 1.0)
    with pytest.raises(UserError, match=r"rewards\.num_workers = 64 .* free are CPU \d of 4"):
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


@contextmanager
def started(nodes: Nodes, config: Path, *options: str) -> Iterator[Process]:
    process = Process(launch(nodes, config, *options), config.with_name("said"))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], Any], process: Process) -> None:
    end = time.monotonic() + 400
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.said()
        time.sleep(0.05)


def command_line(process: psutil.Process) -> list[str]:
    """Empty when it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def launch(nodes: Nodes, config: Path, *options: str) -> list[str]:
    placed = ["--nodes", "2", "--ranks-per-node", "1", "--gpus-per-rank", "0", "--skip-checks", *options]
    return ["launch", "ray", "--address", nodes.head.address, "--config", str(config), *placed]


@pytest.mark.full
def test_a_run_is_placed_on_both_nodes(nodes: Nodes, tmp_path: Path) -> None:
    done = execute(*launch(nodes, write_config(tmp_path), "train.steps=1"), timeout=600)
    logs = {path.name: path.read_text() for path in (tmp_path / "run/logs/latest").glob("*.out")}
    assert done.status == 0, (done, logs)
    assert len(logs) == 2 and len(list((tmp_path / "run/logs/latest/ranks").iterdir())) >= 2
    assert any("training tensor 1 x data 2" in log for log in logs.values()), logs
    assert [line for line in done.stderr.splitlines() if line.startswith("erollout: ")][-1] == "erollout: done"
    assert steps_recorded(tmp_path) == 1
    assert (tmp_path / "run/verdict").read_text() == "done\n"


@pytest.mark.cluster
def test_nodes_that_never_have_room_are_said(nodes: Nodes, tmp_path: Path) -> None:
    refused = execute(*launch(nodes, write_config(tmp_path), "--cpus-per-rank", "3", "--wait", "1"))
    asked = "asked: 2 nodes with CPU 3 free on each"
    assert f"{asked}; there: 2 nodes alive, 0 of them so large, free in all CPU 4 of 4" in refused.error()


@pytest.mark.cluster
def test_a_node_that_dies_is_replaced_and_the_run_ends_as_if_undisturbed(
    nodes: Nodes, rank_pool: RankPool, tmp_path: Path
) -> None:
    folders = tmp_path / "disturbed", tmp_path / "undisturbed"
    sections = {}
    for folder in folders:
        folder.mkdir()
        rewards = {"function": "toy_scorer:share_of_digits", "pool": "ray" if folder == folders[0] else "processes"}
        sections[folder] = {"rewards": rewards, "checkpoint": {"interval": 2, "export_path": str(folder / "exported")}}
        sections[folder]["train"] = {"steps": 30, "output_dir": str(folder / "run")}
    rank_pool.run(2, train_here, tiny_tree(folders[1], **sections[folders[1]]))
    config = write_config(folders[0], **sections[folders[0]])
    with started(nodes, config) as process:
        wait_for((folders[0] / "run/checkpoints/step_00000004/manifest.json").exists, process)
        nodes.other.kill()
        wait_for(lambda: "waiting up to" in process.said(), process)
        nodes.other = Node(nodes.head.address, num_gpus=1)
        assert process.wait(400) == 0, process.said()
    assert "restarting from step_" in process.said()
    ours, theirs = (load_file(folder / "exported/model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (history(folder) for folder in folders)
    for name in ("train/loss", "reward/mean"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name


@pytest.mark.cluster
def test_a_run_that_is_asked_saves_and_the_same_command_goes_on(nodes: Nodes, tmp_path: Path) -> None:
    """SIGUSR1 as soon as ranks are started, before they listen; then Ctrl-C in the middle."""
    run = {"steps": FOREVER, "output_dir": str(tmp_path / "run")}
    config = write_config(tmp_path, checkpoint={"interval": FOREVER}, train=run)
    with started(nodes, config) as process:
        wait_for(lambda: "start 1 on" in process.said(), process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(400) == 75, process.said()
    assert (tmp_path / "run/verdict").read_text() == "requeue\n"
    before = steps_recorded(tmp_path)
    with started(nodes, config) as process:
        wait_for(lambda: steps_recorded(tmp_path) > before, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(400) == 143, process.said()
    assert (tmp_path / "run/verdict").read_text() == "stopped\n"
    assert complete_checkpoints(tmp_path / "run/checkpoints")[-1].name == f"step_{steps_recorded(tmp_path):08d}"


@pytest.mark.cluster
@pytest.mark.parametrize("killed", ["command", "agent", "raylet"])
def test_no_rank_outlives_what_started_it(killed: str, nodes: Nodes, tmp_path: Path) -> None:
    """One rank, which would go on alone."""
    config = write_config(tmp_path, train={"steps": FOREVER, "output_dir": str(tmp_path / "run")})
    with started(nodes, config, "--nodes", "1", "--gpus-per-rank", "1") as process:
        wait_for(lambda: steps_recorded(tmp_path), process)
        there = nodes.other.processes()
        ranks = [found for found in there if "erollout.cli" in command_line(found)]
        assert len(ranks) == 2, "a launcher and its rank, on the node with a GPU"
        raylet = next(found for found in there if "".join(command_line(found)[:1]).endswith("/raylet"))
        {"command": psutil.Process(process.pid), "agent": ranks[0].parent(), "raylet": raylet}[killed].kill()
        assert not psutil.wait_procs(ranks, 100)[1]


@pytest.mark.cluster
def test_a_run_that_gets_nowhere_is_not_started_again(nodes: Nodes, tmp_path: Path) -> None:
    config = write_config(tmp_path, rewards={"function": "toy_scorer:no_such_scorer"})
    failed = execute(*launch(nodes, config), timeout=600)
    assert failed.status == 1
    last = failed.stderr.splitlines()[-1]
    assert "ended with status 2" in last and "rewards.function" in last and "without a new checkpoint" in last


@pytest.mark.cluster
def test_a_node_that_is_unfit_is_named_and_left_out(nodes: Nodes, tmp_path: Path) -> None:
    options = ["--nodes", "1", "--ranks-per-node", "1", "--gpus-per-rank", "1", "--wait", "2"]
    refused = execute("launch", "ray", "--address", nodes.head.address, "--config", str(write_config(tmp_path)), *options)
    lines = [line for line in refused.stderr.splitlines() if line.startswith("erollout")]
    assert refused.status == 2 and len(lines) == 2
    for line in lines:
        assert f"node {socket.gethostname()} is unfit: " in line and "GPU" in line


@pytest.mark.cluster
def test_responses_of_a_node_that_dies_are_scored_on_another(nodes: Nodes, pool: RewardPool) -> None:
    threading.Timer(1.0, nodes.other.kill).start()
    assert score(pool, *[f"sleep 2.{index}" for index in range(4)]) == [2.0, 2.1, 2.2, 2.3]
    assert pool.counts == ScoringCounts(scored=4)
    assert nodes.other.process.poll() is not None
