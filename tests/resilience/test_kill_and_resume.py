"""A run that is killed and started again ends as one that was never interrupted."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from tiny_runs import history, tiny_tree, train_here, write_config
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from erollout.checkpoint.manifest import complete_checkpoints
from erollout.launch.local import first_failure

STEPS = 6
COMPARED = ("train/loss", "train/grad_norm", "train/learning_rate", "reward/mean", "response_length/mean")


def _sections(folder: Path, steps: int = STEPS, **parallel: Any) -> dict[str, dict[str, Any]]:
    return {
        "train": {"steps": steps},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 3},  # no decay: a run with fewer steps would decay faster
        "checkpoint": {"interval": 2, "export_path": str(folder / "exported")},
        "parallel": parallel,
    }


def _assert_same_run(folder: Path, unbroken: Path, exact: bool = True) -> None:
    ours, theirs = history(folder), history(unbroken)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        for name in COMPARED:
            expected = other[name] if exact else pytest.approx(other[name], rel=1e-3, abs=1e-4)
            assert mine[name] == expected, (mine["step"], name)
    weights, wanted = (load_file(path / "exported" / "model.safetensors") for path in (folder, unbroken))
    assert weights.keys() == wanted.keys()
    for name in weights:
        if exact:
            assert torch.equal(weights[name], wanted[name]), name
        else:
            torch.testing.assert_close(weights[name], wanted[name], rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def unbroken(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    rank_pool.run(2, train_here, tiny_tree(folder, **_sections(folder, pipeline_model_parallel_size=2)))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2}),
        (1, {}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ],
    ids=["same", "tp2", "one", "tp2pp2"],
)
def test_resumes_on_the_same_and_on_another_layout(
    world: int, parallel: dict[str, int], rank_pool: RankPool, tmp_path: Path, unbroken: Path
) -> None:
    rank_pool.run(2, train_here, tiny_tree(tmp_path, **_sections(tmp_path, 4, pipeline_model_parallel_size=2)))
    rank_pool.run(world, train_here, tiny_tree(tmp_path, **_sections(tmp_path, **parallel)))
    _assert_same_run(tmp_path, unbroken, exact=world == 2 and "pipeline_model_parallel_size" in parallel)
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000004", "step_00000006"]


@pytest.mark.distributed
def test_distributed_optimizer_resumes(rank_pool: RankPool, tmp_path: Path) -> None:
    runs = {}
    for name, stops in {"broken": (4, STEPS), "whole": (STEPS,)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for steps in stops:
            sections = _sections(folder, steps)
            sections["optimizer"]["use_distributed_optimizer"] = True
            rank_pool.run(2, train_here, tiny_tree(folder, **sections))
        runs[name] = folder
    _assert_same_run(runs["broken"], runs["whole"])


@pytest.mark.end_to_end
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(tmp_path: Path, unbroken: Path) -> None:
    unhurried = {"function": "unhurried_scorer:half_a_second"}  # time to disturb it
    config = write_config(tmp_path, **_sections(tmp_path, world_size=2, pipeline_model_parallel_size=2), rewards=unhurried)
    command = [sys.executable, "-m", "erollout.cli", "train", "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir(), process)
        ranks = [child for child in psutil.Process(process.pid).children() if "erollout.cli" in " ".join(child.cmdline())]
        os.kill(ranks[-1].pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGKILL, output
    assert f"error: rank 1 (pid {ranks[-1].pid}, host {socket.gethostname()}) was ended by SIGKILL; possibly" in output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), "a rank outlived the run"
    # what a crash in the middle of saving leaves behind
    (tmp_path / "run" / "checkpoints" / "step_00000099.partial").mkdir(exist_ok=True)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stdout + again.stderr
    _assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        ({0: (1, 100), 1: (-9, 100)}, 1),  # both were found at once
        ({1: (-6, 99), 0: (1, 100)}, 1),
        ({2: (1, 100), 0: (-15, 100), 1: (-9, 130)}, 2),  # the agent ended the others
        ({0: (70, 100), 1: (-9, 131)}, 0),
    ],
)
def test_the_rank_that_brought_the_others_down(found: dict[int, tuple[int, int]], cause: int) -> None:
    failures = {}
    for rank, (status, seconds) in found.items():
        failures[rank] = ProcessFailure(rank, pid=1000 + rank, exitcode=status, error_file="")
        failures[rank].timestamp = seconds
    assert first_failure(failures) == (cause, failures[cause])


def _wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)
