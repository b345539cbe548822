"""The same run on different layouts: one process, tensor, pipeline and data parallel, and combinations."""

from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from tiny_runs import history, tiny_tree, train_here

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {}),
    "dp2": (2, {}, {}),
    "tp2pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, {}),
    "pp2-decode-tp2": (2, {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}),
}
EXACT = ("reward/mean", "response_length/mean", "response_length/max", "rollout/tokens")
"""These follow from the sampled tokens alone."""
CLOSE = ("train/loss", "train/entropy", "train/grad_norm")


@pytest.fixture(scope="module")
def one_process(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return _first_step(rank_pool, tmp_path_factory.mktemp("one"), 1, {}, {})


def _first_step(
    pool: RankPool, folder: Path, world: int, parallel: dict[str, Any], rollout: dict[str, Any]
) -> dict[str, float]:
    tree = tiny_tree(folder, parallel=parallel, train={"steps": 1})
    tree["rollout"] |= rollout
    pool.run(world, train_here, tree)
    return history(folder)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_first_step_equals_that_of_one_process(
    name: str, rank_pool: RankPool, tmp_path: Path, one_process: dict[str, float]
) -> None:
    world, parallel, rollout = LAYOUTS[name]
    row = _first_step(rank_pool, tmp_path, world, parallel, rollout)
    if "tensor_model_parallel_size" not in rollout:  # a sum over ranks rounds bf16 activations in another order
        assert {key: row[key] for key in EXACT} == {key: one_process[key] for key in EXACT}
        for key in CLOSE:
            assert row[key] == pytest.approx(one_process[key], rel=1e-4, abs=1e-4), key
    assert row["mismatch/mean_abs_difference"] < 0.02
    assert row["train/entropy"] == pytest.approx(one_process["train/entropy"], rel=0.05)
