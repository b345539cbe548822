"""`erollout launch ray` without a cluster: what it would start, what it refuses, and what it does when a run ends."""

import argparse
import contextlib
import io
from pathlib import Path

import pytest
from tiny_runs import write_config

from erollout.errors import UserError
from erollout.launch.ray import add_command
from erollout.launch.ray_job import LATER, STOPPED, Ended, decide
from erollout.schedulers import ray_cluster


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(tmp_path))


def _launch(*arguments: str) -> str:
    """What the command prints, inside this process."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["ray", *arguments])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert options.run(options, arguments) == 0
    return out.getvalue()


def test_a_dry_run_says_what_every_node_would_start(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    size = ["--nodes", "2", "--ranks-per-node", "4", "--gpus-per-rank", "1", "--cpus-per-rank", "6"]
    page = _launch(*size, "--config", config, "--interface", "eth7", "--dry-run", "--", "train.steps=7")
    assert "2 nodes x 4 = 8" in page and "CPU 24, GPU 4, within 600 s" in page and "OMP_NUM_THREADS=3 PYTHONHASHSEED=0" in page
    launcher = "launch torchrun --nodes 2 --nproc-per-node 4 --head FIRST_NODE:FREE_PORT --run-id ray-"
    assert launcher in page and f"/ranks --interface eth7 --config {config} train.steps=7\n" in page
    assert str(tmp_path / "run") in page and "that this machine is a node of" in page
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], ["--nodes = 0"]),
        (["--ranks-per-node", "0"], ["--ranks-per-node = 0"]),
        (["--max-restarts", "-1"], ["--max-restarts = -1"]),
        (["--gpus-per-rank", "-1"], ["--gpus-per-rank = -1"]),
        (["--cpus-per-rank", "0"], ["--cpus-per-rank = 0", "--gpus-per-rank"]),
        (["parallel.world_size=3"], ["parallel.world_size = 3", "--nodes 2 x --ranks-per-node 2 = 4 ranks"]),
        (["parallel.tensor_model_parallel_size=3"], ["tensor", "= 3", "4"]),
        (["train.stesp=1"], ["train.stesp"]),
    ],
)
def test_is_refused_in_one_line(arguments: list[str], words: list[str], config: str) -> None:
    with pytest.raises(UserError) as error:
        _launch("--nodes", "2", "--ranks-per-node", "2", "--config", config, "--dry-run", *arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_without_ray_it_says_how_to_install_it(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"erollout launch ray needs Ray, which is not installed; pip install 'erollout\[ray\]'"
    ):
        _launch("--nodes", "1", "--ranks-per-node", "1", "--config", config)


def _ended(verdict: str | None = None, node_died: bool = False, saved: bool = False) -> Ended:
    return Ended(verdict, "a rank failed", node_died, saved)


@pytest.mark.parametrize(
    ("ended", "asked", "restarts_left", "status"),
    [
        (_ended("done"), None, 0, 0),
        (_ended("done", node_died=True), "SIGTERM", 0, 0),
        (_ended("stopped", node_died=True, saved=True), None, 5, STOPPED),
        (_ended("stopped", saved=True), "SIGUSR1", 5, STOPPED),
        (_ended("requeue", saved=True), "SIGUSR1", 5, LATER),
        (_ended("requeue"), None, 5, None),
        (_ended("requeue"), None, 0, LATER),
        (_ended(), None, 5, 1),
        (_ended(saved=True), None, 5, None),
        (_ended(saved=True), None, 0, 1),
        (_ended(saved=True), "SIGTERM", 5, 1),
        (_ended(node_died=True), None, 5, None),
        (_ended(node_died=True), None, 0, 1),
        (_ended(node_died=True), "SIGUSR1", 5, 1),
    ],
)
def test_when_a_run_is_started_again(ended: Ended, asked: str | None, restarts_left: int, status: int | None) -> None:
    assert decide(ended, asked, restarts_left)[0] == status
