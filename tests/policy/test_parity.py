"""Megatron's training on CPU and gloo computes the same in every layout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import RankPool
from tiny_megatron import Case, Outcome, Shard, train, whole

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo worlds of CPU tensors: the patches do nothing beside a GPU"),
]

Reference = tuple[dict[str, np.ndarray], Outcome]

LAYOUTS = {
    "tp2": (2, Case(tensor=2)),
    "pp2": (2, Case(pipeline=2)),
    "dp2": (2, Case()),
    "tp2pp2": (4, Case(tensor=2, pipeline=2)),
    "tp2dp2": (4, Case(tensor=2)),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def reference(request: pytest.FixtureRequest, rank_pool: RankPool) -> Reference:
    return one_process(rank_pool, Case(tied=request.param))


@pytest.fixture(scope="module")
def untied(rank_pool: RankPool) -> Reference:
    return one_process(rank_pool, Case())


def one_process(rank_pool: RankPool, case: Case) -> Reference:
    """(initial weights, training of three steps from them) of one process."""
    [start] = rank_pool.run(1, train, replace(case, steps=0), None)
    weights = whole(start.weights)
    [outcome] = rank_pool.run(1, train, replace(case, steps=3), weights)
    return weights, outcome


def losses(outcomes: list[Outcome]) -> list[float]:
    """Those of the last pipeline stage, which every rank of it reports equally."""
    reported = [outcome.losses for outcome in outcomes if outcome.losses]
    assert all(one == reported[0] for one in reported)
    return reported[0]


def assert_shards_equal(ranks: list[list[Shard]], expected: list[Shard], tolerance: float) -> None:
    """Every shard of every rank equals its part of the whole tensors, and together they cover all of it.

    `tolerance` is the norm of a shard's error relative to the norm of the whole tensor.
    """
    tensors = whole(expected)
    covered = {key: np.zeros(tensor.shape, bool) for key, tensor in tensors.items()}
    for shard in (shard for shards in ranks for shard in shards):
        error = np.linalg.norm(shard.values - tensors[shard.key][shard.index])
        assert error <= tolerance * np.linalg.norm(tensors[shard.key]), (shard.key, shard.index, error)
        covered[shard.key][shard.index] = True
    assert all(cover.all() for cover in covered.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_norm_and_gradients_equal_one_process(layout: str, reference: Reference, rank_pool: RankPool) -> None:
    weights, expected = reference
    world_size, case = LAYOUTS[layout]
    tied = not any(key.startswith("output_layer") for key in weights)
    outcomes = rank_pool.run(world_size, train, replace(case, tied=tied), weights)
    assert losses(outcomes) == pytest.approx(expected.losses[:2], rel=1e-5)
    for outcome in outcomes:
        assert outcome.grad_norms == pytest.approx(expected.grad_norms[:2], rel=1e-5)
    assert_shards_equal([outcome.gradients for outcome in outcomes], expected.gradients, 2e-6)


def test_clipping_is_active_and_training_moves(untied: Reference) -> None:
    weights, outcome = untied
    assert min(outcome.grad_norms) > 0.25
    assert all(not np.array_equal(weights[shard.key][shard.index], shard.values) for shard in outcome.weights)


def test_sequence_parallel_gradients_equal_one_process(untied: Reference, rank_pool: RankPool) -> None:
    weights, expected = untied
    outcomes = rank_pool.run(2, train, Case(tensor=2, sequence_parallel=True), weights)
    assert losses(outcomes) == pytest.approx(expected.losses[:2], rel=1e-5)
    assert_shards_equal([outcome.gradients for outcome in outcomes], expected.gradients, 2e-6)


@pytest.mark.parametrize("case", [Case(tensor=2, dropout=0.1), Case(pipeline=2, dropout=0.1)], ids=["tp2", "pp2"])
def test_recompute_repeats_the_dropout(case: Case, untied: Reference, rank_pool: RankPool) -> None:
    weights, without_dropout = untied
    kept = rank_pool.run(2, train, case, weights)
    recomputed = rank_pool.run(2, train, replace(case, recompute=True), weights)
    assert losses(recomputed) == losses(kept) != without_dropout.losses[:2]
    for one, other in zip(recomputed, kept, strict=True):
        assert one.grad_norms == other.grad_norms
        for a, b in zip(one.gradients, other.gradients, strict=True):
            np.testing.assert_array_equal(a.values, b.values)


def test_distributed_optimizer_resumes_under_another_layout(untied: Reference, rank_pool: RankPool, tmp_path: Path) -> None:
    """Two steps on TP2 x DP2, then the third on PP2 x DP2, against three steps without the distributed optimizer."""
    weights, expected = untied
    case = Case(distributed_optimizer=True)
    checkpoint = str(tmp_path / "checkpoint")
    first = rank_pool.run(4, train, replace(case, tensor=2), weights, None, checkpoint)
    second = rank_pool.run(4, train, replace(case, pipeline=2, first_step=2, steps=1), None, checkpoint)
    assert losses(first) + losses(second) == pytest.approx(expected.losses, rel=1e-5)
    assert first[0].grad_norms + second[0].grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert_shards_equal([rank.weights for rank in second], expected.weights, 1e-4)


def test_bf16_equals_one_process_and_resumes_exactly(untied: Reference, rank_pool: RankPool, tmp_path: Path) -> None:
    weights, _ = untied
    [expected] = rank_pool.run(1, train, Case(bf16=True, steps=3), weights)  # Float16OptimizerWithFloat16Params
    case = Case(bf16=True, distributed_optimizer=True, steps=3)
    unbroken = rank_pool.run(2, train, case, weights)
    assert losses(unbroken) == pytest.approx(expected.losses, rel=1e-3)
    assert unbroken[0].grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)

    checkpoint = str(tmp_path / "checkpoint")
    first = rank_pool.run(2, train, replace(case, steps=2), weights, None, checkpoint)
    second = rank_pool.run(2, train, replace(case, first_step=2, steps=1), None, checkpoint)
    assert losses(first) + losses(second) == losses(unbroken)
    assert_shards_equal([rank.weights for rank in second], unbroken[0].weights, 0.0)
