"""Qwen3 through the whole loop: its norms of heads are trained, resharded, drafted with and exported under every layout."""

from pathlib import Path

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from tiny_runs import ARCHITECTURE, history, tiny_tree, train_here

QWEN3 = {**ARCHITECTURE, "model_type": "qwen3", "head_dim": 16}
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


def _train(rank_pool: RankPool, folder: Path, layout: str, steps: int = 2, interval: int = 0) -> dict[str, torch.Tensor]:
    """The weights that a run exports after so many steps."""
    tensor, pipeline = LAYOUTS[layout]
    tree = tiny_tree(
        folder,
        parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline},
        checkpoint={"export_path": str(folder / "exported"), "interval": interval},
    )
    tree["model"] |= {"architecture": QWEN3, "dtype": "float32"}
    tree["train"]["steps"] = steps
    tree["rollout"] |= {"tensor_model_parallel_size": tensor, "dtype": "float32"}
    rank_pool.run(tensor * pipeline, train_here, tree)
    return load_file(folder / "exported" / "model.safetensors")


@pytest.mark.distributed
def test_training_is_the_same_under_every_layout(rank_pool: RankPool, tmp_path: Path) -> None:
    weights = {layout: _train(rank_pool, tmp_path / layout, layout) for layout in LAYOUTS}
    rows = {layout: history(tmp_path / layout) for layout in LAYOUTS}
    for layout in LAYOUTS:
        assert rows[layout][0]["mismatch/max_abs_difference"] < 1e-5  # log-probs of the rollout and of the actor
        assert rows[layout][0]["train/grad_norm"] == pytest.approx(rows["tp1"][0]["train/grad_norm"], rel=1e-4)
        for name, expected in weights["tp1"].items():
            torch.testing.assert_close(weights[layout][name], expected, atol=2e-4, rtol=0)
    for kind in ("q_norm", "k_norm"):
        trained = weights["tp1"][f"model.layers.1.self_attn.{kind}.weight"]
        assert trained.shape == (16,) and (trained != 1).any()


@pytest.mark.distributed
@pytest.mark.full
def test_a_resumed_run_ends_with_the_same_weights(rank_pool: RankPool, tmp_path: Path) -> None:
    expected = _train(rank_pool, tmp_path / "whole", "tp2")
    _train(rank_pool, tmp_path / "resumed", "tp2", steps=1, interval=1)
    weights = _train(rank_pool, tmp_path / "resumed", "tp2", interval=1)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
