"""Runs of the whole loop with the options that change its course."""

import json
from pathlib import Path
from typing import Any

import pytest
from metric_names import undocumented
from ranks import RankPool
from tiny_runs import all_rows, history, rollout_here, sft_here, tiny_tree, train_here

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "kl in the loss": {"algorithm": {"kl_coefficient": 0.1, "kl_estimator": "k3"}},
    "kl in the reward": {"algorithm": {"kl_coefficient": 0.1, "kl_estimator": "k1", "kl_placement": "reward"}},
    "sequence mean": {"algorithm": {"aggregation": "sequence-mean"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "several updates": {"train": {"steps": 2, "global_batch_size": 8}},
    "truncated sampling": {"rollout": {"top_k": 5, "top_p": 0.9, "min_p": 0.01}},
    "recompute": {"train": {"steps": 2, "recompute_granularity": "full"}},
    "distributed optimizer": {"optimizer": {"lr": 1e-3, "use_distributed_optimizer": True}},
}


def _tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    base = tiny_tree(folder)
    for section, values in sections.items():
        base[section] = base.get(section, {}) | values
    return base


@pytest.mark.distributed
@pytest.mark.quick(every=2)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains(name: str, rank_pool: RankPool, tmp_path: Path) -> None:
    tree = _tree(tmp_path, **VARIANTS[name])
    rank_pool.run(2, train_here, tree)
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["train/grad_norm"] > 0 and row["train/update_skipped"] == 0
        assert row["mismatch/mean_abs_difference"] < 0.02, "the engine and the actor disagree about the same policy"
        assert row["rollout/tokens"] == pytest.approx(16 * row["response_length/mean"])
        assert undocumented(row.keys() - {"step"}) == []
    assert [row["progress/samples"] for row in rows] == [16, 32]
    assert rows[1]["progress/tokens"] == rows[0]["rollout/tokens"] + rows[1]["rollout/tokens"]


@pytest.mark.distributed
def test_kl_is_zero_before_the_first_update_and_not_after(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(2, train_here, _tree(tmp_path, algorithm={"kl_coefficient": 0.1}, optimizer={"lr": 1e-2}))
    first, second = history(tmp_path)
    assert first["train/kl_reference"] == pytest.approx(0.0, abs=1e-7)
    assert second["train/kl_reference"] > 1e-5


@pytest.mark.distributed
def test_several_updates_of_one_rollout_move_the_ratio_and_one_does_not(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(2, train_here, _tree(tmp_path, train={"steps": 1, "global_batch_size": 4}, optimizer={"lr": 1e-2}))
    moved = history(tmp_path)[0]
    assert moved["train/approx_kl"] > 1e-7
    rank_pool.run(2, train_here, _tree(tmp_path, train={"steps": 1, "output_dir": str(tmp_path / "other")}))
    assert history(tmp_path, "other")[0]["train/approx_kl"] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.distributed
def test_the_policy_learns_what_is_rewarded(rank_pool: RankPool, tmp_path: Path) -> None:
    """Twenty steps towards responses made of digits: an untrained model that learns nothing stays where it is."""
    tree = _tree(tmp_path, train={"steps": 20}, optimizer={"lr": 1e-2}, parallel={"pipeline_model_parallel_size": 2})
    rank_pool.run(2, train_here, tree)
    rewards = [row["reward/mean"] for row in history(tmp_path)]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


@pytest.mark.distributed
def test_a_scorer_that_fails_in_every_way_costs_only_its_rewards(rank_pool: RankPool, tmp_path: Path) -> None:
    tree = _tree(tmp_path, rewards={"function": "toy_scorer:troublesome", "timeout_seconds": 0.5}, train={"steps": 1})
    rank_pool.run(2, train_here, tree)
    row = history(tmp_path)[0]
    assert 0 < row["reward/scoring_errors"] <= 16
    assert row["train/update_skipped"] == 0


@pytest.mark.distributed
def test_supervised_run_lowers_the_loss_and_exports_what_a_rollout_samples(rank_pool: RankPool, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    tree = _tree(
        tmp_path,
        supervised={"steps": 30, "batch_size": 16},
        checkpoint={"export_path": str(exported)},
        optimizer={"lr": 1e-2},
        parallel={"tensor_model_parallel_size": 2},
    )
    rank_pool.run(2, sft_here, tree)
    losses = [row["train/loss"] for row in all_rows(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]
    rollout_tree = _tree(
        tmp_path, evaluation={"num_prompts": 6, "samples_per_prompt": 2}, parallel={"pipeline_model_parallel_size": 2}
    )
    rollout_tree["model"] = {"path": str(exported)}
    out = tmp_path / "out.jsonl"
    rank_pool.run(2, rollout_here, rollout_tree, str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["prompt_index"], row["sample_index"]) for row in rows] == [(i, j) for i in range(6) for j in range(2)]
    for row in rows:
        assert len(row["response_ids"]) == len(row["rollout_logprobs"]) == len(row["raw_logprobs"]) > 0
        assert row["finish_reason"] in ("stop", "length") and 0 <= row["reward"] <= 1


@pytest.mark.distributed
def test_evaluation_has_pass_at_k_and_leaves_training_as_it_is(rank_pool: RankPool, tmp_path: Path) -> None:
    evaluated = _tree(tmp_path, evaluation={"interval": 1, "num_prompts": 4, "samples_per_prompt": 3})
    rank_pool.run(2, train_here, evaluated)
    rank_pool.run(2, train_here, _tree(tmp_path, train={"steps": 2, "output_dir": str(tmp_path / "plain")}))
    rows = all_rows(tmp_path)
    assert {"evaluation/pass_at_1", "evaluation/pass_at_3"} <= rows[0].keys()
    for with_evaluation, without in zip(history(tmp_path), history(tmp_path, "plain"), strict=True):
        for name in ("train/loss", "reward/mean", "train/grad_norm"):
            assert with_evaluation[name] == without[name]
