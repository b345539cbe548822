"""Rollouts with speculation off and on, side by side: the comparison itself, its command, and the demo around it."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import execute, invoke, save_random_model
from ranks import RankPool
from tiny_runs import tiny_tree, write_config

from erollout.command_line.demo import run_demo_rollout
from erollout.config import build_config
from erollout.errors import UserError
from erollout.rollout.compare import Comparison
from erollout.rollout.rollout_worker import RolloutResult
from erollout.speculation.statistics import SpeculationStatistics
from erollout.types import Rollout, ScoredRollout

SPECULATION: dict[str, Any] = {"mode": "always", "num_speculative_tokens": 3, "drafter": {"format": "w4a16", "group_size": 16}}
SAME = "all, token for token"


def _result(responses: list[tuple[int, ...]], seconds: list[float]) -> RolloutResult:
    """A result with one replica per entry of `seconds`, each of which emitted an equal share of 120 tokens."""
    scored = [
        ScoredRollout(Rollout(0, i, (1,), ids, (0.0,) * len(ids), (0.0,) * len(ids), "stop", 0), 0.0, "task")
        for i, ids in enumerate(responses)
    ]
    statistics = SpeculationStatistics()
    statistics.record(3, 2, 2)
    return RolloutResult(scored, [{"seconds": s, "tokens": 120 / len(seconds)} for s in seconds], statistics, [], 0, 0)


def test_comparison_takes_medians_and_counts_what_differs() -> None:
    answer, other = (5, 6, 7), (5, 6, 8)
    off = [_result([answer, answer], seconds) for seconds in ([4.0, 1.0], [100.0, 1.0], [2.0, 3.0])]
    on = [_result(responses, [2.0, 1.0]) for responses in ([answer, answer], [answer, other], [answer, answer[:2]])]
    comparison = Comparison(off, on)
    assert comparison.differing == 2
    assert comparison.speed_up == pytest.approx(2.0)
    rows = dict(comparison.rows())
    assert rows["rollout seconds, off -> on"] == "4.00 -> 2.00"
    assert rows["tokens/s, off -> on"] == "30.0 -> 60.0"
    assert (rows["acceptance_rate"], rows["acceptance_length"]) == ("0.667", "3.00")
    assert rows["responses that are the same off and on"] == "all but 2 of 6"
    assert dict(Comparison(off, on[:1]).rows())["responses that are the same off and on"] == SAME


def compare_here(tree: dict[str, Any]) -> str:
    """For RankPool.run: a comparison on the ranks of the world that is there; what it prints."""
    from erollout.api import sampling

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        sampling.compare_modes(build_config(tree))
    return printed.getvalue()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_compare_prints_equal_responses_and_their_acceptance(world_size: int, rank_pool: RankPool, tmp_path: Path) -> None:
    evaluation = {"num_prompts": 4, "samples_per_prompt": 2}
    first, *others = rank_pool.run(
        world_size, compare_here, tiny_tree(tmp_path, evaluation=evaluation, speculation=SPECULATION)
    )
    assert others == [""] * (world_size - 1)
    assert first.count(SAME) == 2, first
    for words in ("one sequence at once", "up to 64 sequences at once", "acceptance_length", "requantise seconds", "pass_at_2"):
        assert words in first, words
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.*")}
    assert left == {f"figures/{name}.png" for name in ("occupancy", "acceptance", "decisions")}


def test_compare_needs_speculation(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, speculation={"mode": "off"}))
    assert "speculation.mode = off" in invoke("compare", "--config", config).error()


@pytest.fixture
def demo(tmp_path: Path) -> tuple[str, str]:
    """Configurations of the comparison and of the fine-tuning that makes its model."""
    source, tuned = str(save_random_model(tmp_path / "source")), str(tmp_path / "tuned")
    tree = tiny_tree(tmp_path, model={"architecture": None, "path": tuned}, speculation=SPECULATION)
    tree["evaluation"] = {"num_prompts": 2}
    warm_start = {
        "model": {"path": source},
        "data": tree["data"],
        "supervised": {"steps": 2, "batch_size": 4},
        "train": {"output_dir": str(tmp_path / "sft")},
        "tracking": {"enabled": False},
        "checkpoint": {"export_path": tuned},
    }
    for name, content in {"compare": tree, "sft": warm_start}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "compare.yaml"), str(tmp_path / "sft.yaml")


@pytest.mark.end_to_end
@pytest.mark.full
def test_demo_fine_tunes_once_then_compares(demo: tuple[str, str]) -> None:
    config, warm_start = demo
    outcomes = [execute("demo-rollout", "--config", config, "--warm-start", warm_start) for _ in range(2)]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr + outcomes[1].stderr
    assert ["Fine-tuning: 2 steps" in outcome.stdout for outcome in outcomes] == [True, False]
    assert [outcome.stdout.count(SAME) for outcome in outcomes] == [2, 2]


def test_demo_refuses_a_fine_tuning_of_another_model(demo: tuple[str, str]) -> None:
    config, warm_start = demo
    with pytest.raises(UserError, match=r"checkpoint\.export_path = .*tuned must be model\.path = elsewhere"):
        run_demo_rollout(config, warm_start, ["model.path=elsewhere"])
