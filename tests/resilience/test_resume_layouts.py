"""A run that resumes on another layout ends as one that was never interrupted; which rank brought a run down."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from test_interrupted_runs import interrupted_train
from tiny_runs import history, tiny_tree, train_here
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from erollout.checkpoint.manifest import complete_checkpoints
from erollout.launch.local import first_failure

STEPS = 6
COMPARED = ("train/loss", "train/grad_norm", "train/learning_rate", "reward/mean", "response_length/mean")


def _sections(folder: Path, **parallel: Any) -> dict[str, dict[str, Any]]:
    return {
        "train": {"steps": STEPS},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 3},
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


@pytest.fixture(scope="module")
def interrupted(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Asked to stop in the middle of the fifth rollout."""
    folder = tmp_path_factory.mktemp("interrupted")
    tree = tiny_tree(folder, **_sections(folder, pipeline_model_parallel_size=2))
    rank_pool.run(2, interrupted_train, tree, "rollout", 4)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2}),
        (1, {}),
        pytest.param(4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, marks=pytest.mark.full),
    ],
    ids=["same", "tp2", "one", "tp2pp2"],
)
def test_resumes_on_the_same_and_on_another_layout_and_number_of_replicas(
    world: int, parallel: dict[str, int], rank_pool: RankPool, tmp_path: Path, interrupted: Path, unbroken: Path
) -> None:
    """Also the rollout that was begun. On another layout of training, log-probs differ by rounding."""
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)
    rank_pool.run(world, train_here, tiny_tree(folder, **_sections(folder, **parallel)))
    _assert_same_run(folder, unbroken, exact=world == 2 and "pipeline_model_parallel_size" in parallel)
    assert history(folder)[4]["rollout/kept_tokens"] > 0
    assert [path.name for path in complete_checkpoints(folder / "run" / "checkpoints")] == ["step_00000004", "step_00000006"]


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
