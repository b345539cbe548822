"""Training with speculation: the same samples, so the same run, and what a run says about its drafts."""

import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import RankFailure, RankPool
from tiny_runs import history, tiny_tree, train_here

SPECULATION: dict[str, Any] = {"mode": "always", "num_speculative_tokens": 3, "drafter": {"format": "w4a16", "group_size": 16}}
NGRAM = {"proposer": "ngram", "num_speculative_tokens": 3, "ngram": {"max_ngram": 3, "min_ngram": 1}}
SAME = ("reward/mean", "train/loss", "train/grad_norm", "response_length/mean", "mismatch/mean_abs_difference")


def _tree(folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    train = {"steps": 2, "output_dir": str(folder / name)} | sections.pop("train", {})
    return tiny_tree(folder, train=train, **sections)


@pytest.mark.distributed
def test_coupled_speculation_changes_no_number_of_a_run(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, train_here, _tree(tmp_path, "off", train={"steps": 20}))
    rank_pool.run(1, train_here, _tree(tmp_path, "always", train={"steps": 20}, speculation=SPECULATION))
    off, always = history(tmp_path, "off"), history(tmp_path, "always")
    assert len(off) == len(always) == 20
    assert [[row[name] for name in SAME] for row in off] == [[row[name] for name in SAME] for row in always]
    assert len({row["reward/mean"] for row in off}) > 10, "the run stands still: equal curves would prove nothing"
    for row in always:
        assert 0.5 < row["speculation/acceptance_rate"] <= 1.0
        assert 1.0 < row["speculation/acceptance_length"] <= 4.0
        assert row["rollout/decode_steps"] < off[0]["rollout/decode_steps"]
    assert not any(name.startswith("speculation/") for name in off[0])


@pytest.mark.distributed
@pytest.mark.parametrize("format", ["w4a16_awq", *(pytest.param(f, marks=pytest.mark.full) for f in ("w4a16_clip", "fp8"))])
def test_statistics_and_formats_on_two_tensor_parallel_ranks(format: str, rank_pool: RankPool, tmp_path: Path) -> None:
    drafter = {"format": format, "group_size": 16, "statistics_interval": 1, "statistics_tokens": 64}
    parallel = {"world_size": 2, "tensor_model_parallel_size": 2}
    rollout = tiny_tree(tmp_path)["rollout"] | {"tensor_model_parallel_size": 2}
    tree = _tree(tmp_path, "run", parallel=parallel, rollout=rollout, speculation=SPECULATION | {"drafter": drafter})
    rank_pool.run(2, train_here, tree)
    for row in history(tmp_path):
        assert row["speculation/acceptance_rate"] > 0.5
        assert row["speculation/requantize_seconds"] > 0


@pytest.mark.distributed
def test_rejection_trains_and_evaluates(rank_pool: RankPool, tmp_path: Path) -> None:
    speculation = SPECULATION | {"verification": "rejection"}
    rank_pool.run(2, train_here, _tree(tmp_path, "run", speculation=speculation, evaluation={"interval": 1, "num_prompts": 4}))
    assert [row["step"] for row in history(tmp_path)] == [1, 2]


@pytest.mark.distributed
def test_auto_chooses_formats_from_the_first_rollout_on_every_replica(rank_pool: RankPool, tmp_path: Path) -> None:
    drafter = {"format": "auto", "group_size": 16, "statistics_tokens": 64, "lm_head": "w8a8"}
    drafter["overrides"] = [{"pattern": "*.down_proj", "format": "w8a8"}]
    rank_pool.run(2, train_here, _tree(tmp_path, "run", train={"steps": 3}, speculation=SPECULATION | {"drafter": drafter}))
    assert all(row["speculation/acceptance_rate"] > 0.5 for row in history(tmp_path))


@pytest.fixture(scope="module")
def undecided(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """A run without drafts in which prompts are dispatched at its begin and nothing moves."""
    folder = tmp_path_factory.mktemp("undecided")
    rank_pool.run(2, train_here, _tree(folder, "run", coordinator={"policy": "replica", "dispatch": "static"}))
    return [[row[name] for name in SAME] for row in history(folder)]


DECISIONS = [(mode, policy) for mode in ("toggle", "adaptive", "ladder") for policy in ("replica", "cluster", "makespan")]
QUICK = [("toggle", "replica"), ("ladder", "cluster"), ("adaptive", "makespan")]
"""Each mode and each policy once."""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mode", "policy"), [*QUICK, *(pytest.param(*both, marks=pytest.mark.full) for both in DECISIONS if both not in QUICK)]
)
def test_who_decides_and_how_changes_no_number_of_a_run(
    mode: str, policy: str, rank_pool: RankPool, tmp_path: Path, undecided: list[list[float]]
) -> None:
    speculation = SPECULATION | {"mode": mode, "toggle": {"bootstrap_seconds": 0.2}}
    coordinator = {"policy": policy, "window_seconds": 0.001}
    rank_pool.run(2, train_here, _tree(tmp_path, "run", speculation=speculation, coordinator=coordinator))
    assert [[row[name] for name in SAME] for row in history(tmp_path)] == undecided


@pytest.mark.distributed
def test_ngram_drafts_change_no_number_of_a_run(rank_pool: RankPool, tmp_path: Path) -> None:
    """On two tensor-parallel ranks at every step, and on two replicas where their toggles choose; at a temperature at which the
    responses repeat themselves now and then."""
    repeating, two = {"rollout": {"temperature": 0.12}}, {"tensor_model_parallel_size": 2}
    two_ranks = {"parallel": {"world_size": 2} | two, "rollout": repeating["rollout"] | two}
    adaptive = NGRAM | {"mode": "adaptive", "toggle": {"bootstrap_seconds": 0.2}}
    for layout, sections, speculation in (("tp2", two_ranks, NGRAM | {"mode": "always"}), ("dp2", repeating, adaptive)):
        rank_pool.run(2, train_here, _tree(tmp_path, f"{layout}-off", **sections))
        rank_pool.run(2, train_here, _tree(tmp_path, layout, **sections, speculation=speculation))
        off, on = history(tmp_path, f"{layout}-off"), history(tmp_path, layout)
        assert [[row[name] for name in SAME] for row in off] == [[row[name] for name in SAME] for row in on]
        assert all(row["speculation/requantize_seconds"] == 0 for row in on)
    for row in history(tmp_path, "tp2"):
        assert row["speculation/drafts"] > 0 and 0 < row["speculation/proposed_share"] < 1
        assert 0.1 < row["speculation/acceptance_rate"] < 1 and row["toggle/expected_length/ngram"] > 1.2


@pytest.mark.distributed
def test_a_run_resumes_with_another_proposer(rank_pool: RankPool, tmp_path: Path) -> None:
    quantized = SPECULATION | {"mode": "toggle", "toggle": {"bootstrap_seconds": 0.1}}
    ngram = NGRAM | {"mode": "toggle", "toggle": {"bootstrap_seconds": 0.1}}
    for steps, speculation in enumerate((quantized, ngram, quantized), start=1):
        sections = {"speculation": speculation, "checkpoint": {"interval": 1}, "train": {"steps": steps}}
        rank_pool.run(1, train_here, _tree(tmp_path, "run", **sections))
    rank_pool.run(1, train_here, _tree(tmp_path, "off", train={"steps": 3}))
    assert [[row[name] for name in SAME] for row in history(tmp_path)] == [
        [row[name] for name in SAME] for row in history(tmp_path, "off")
    ]


def train_without_modelopt(tree: dict[str, Any]) -> None:
    """For RankPool.run, on a new worker: none of our modules that import ModelOpt is there yet."""
    imported = [name for name in sys.modules if name.partition(".")[0] == "modelopt"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization", *imported):
            patch.setitem(sys.modules, name, None)
        assert "erollout.drafter.calibrators" not in sys.modules
        train_here(tree)


@pytest.mark.distributed
def test_ngram_drafts_do_without_modelopt(tmp_path: Path) -> None:
    """A run from start to end, where importing ModelOpt fails."""
    with RankPool() as pool:
        pool.run(1, train_without_modelopt, _tree(tmp_path, "run", train={"steps": 1}, speculation=NGRAM | {"mode": "always"}))
        assert history(tmp_path)[0]["speculation/drafts"] > 0
        with pytest.raises(RankFailure, match="modelopt"):
            pool.run(1, train_without_modelopt, _tree(tmp_path, "other", train={"steps": 1}, speculation=SPECULATION))
