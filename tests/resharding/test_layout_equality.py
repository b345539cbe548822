"""The same run on different layouts: one process, tensor, pipeline and data parallel, and combinations."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import RankPool
from tiny_runs import history, rollout_here, tiny_tree, train_here

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {}),
    "dp2": (2, {}, {}),
    "tp2pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, {}),
    "pp2-decode-tp2": (2, {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}),
}
QUICK = ("tp2pp2", "pp2-decode-tp2")
"""For `make test`: each kind of parallelism once."""
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
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in LAYOUTS])
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


def _samples(pool: RankPool, folder: Path, world: int, tensor: int, dtype: str) -> list[tuple[list[int], list[float]]]:
    """Response ids and raw log-probs of every sample of `erollout rollout`."""
    folder.mkdir()
    tree = tiny_tree(folder, evaluation={"num_prompts": 6, "samples_per_prompt": 4})
    tree["rollout"] |= {"tensor_model_parallel_size": tensor, "dtype": dtype}
    pool.run(world, rollout_here, tree, str(folder / "out.jsonl"))
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return [(row["response_ids"], row["raw_logprobs"]) for row in rows]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_depend_neither_on_replicas_nor_on_tensor_parallelism(dtype: str, rank_pool: RankPool, tmp_path: Path) -> None:
    """Replicas: bit for bit. Two ranks per replica sum in another order: in float32 the tokens are still the same."""
    expected = _samples(rank_pool, tmp_path / "one", 1, 1, dtype)
    assert len({tuple(ids) for ids, _ in expected}) > 12, "samples of a group must differ"
    assert _samples(rank_pool, tmp_path / "replicas", 2, 1, dtype) == expected
    if dtype == "float32":
        for (ids, logprobs), (other_ids, other) in zip(
            _samples(rank_pool, tmp_path / "tensor", 2, 2, dtype), expected, strict=True
        ):
            assert ids == other_ids and logprobs == pytest.approx(other, abs=1e-4)
