"""The benchmark of speculation modes: that it runs, on a tiny model, and that its figures are what they say."""

import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import RankFailure, RankPool
from tiny_runs import ARCHITECTURE, write_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OVERRIDES = (
    "model.max_position_embeddings=256",
    "rollout.max_tokens=8",
    "rollout.kv_cache_gib=0.02",
    "speculation.toggle.bootstrap_seconds=0.05",
)


def _benchmark() -> Any:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    import rollout_modes

    return rollout_modes


def _report(config: str, arguments: list[str]) -> list[str]:
    """On every rank of a RankPool's world."""
    benchmark = _benchmark()
    lines: list[str] = benchmark.run(benchmark.parse(["--config", config, "--draws", "1", "--batch-draws", "1", *arguments]))
    return lines


def _config(folder: Path, **speculation: Any) -> str:
    drafter = {"format": "w4a16", "group_size": 16}
    architecture = ARCHITECTURE | {"max_position_embeddings": 256}
    model = {"architecture": architecture, "tokenizer": str(folder / "tokenizer")}
    return str(write_config(folder, model=model, speculation={"drafter": drafter} | speculation))


def _cells(lines: list[str], first: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0] == first]


@pytest.mark.distributed
@pytest.mark.full
def test_every_section_runs_and_reports_every_arm(rank_pool: RankPool, tmp_path: Path) -> None:
    arguments = ["--sections", "tail", "batches", "policies", "--batches", "2", "--batch-tokens", "6", *OVERRIDES]
    lines, _ = rank_pool.run(2, _report, _config(tmp_path), arguments, timeout=240)
    for mode in ("off", "always", "toggle", "adaptive"):
        rows = _cells(lines, mode)
        assert len(rows) == (2 if mode == "toggle" else 3)
        assert all(float(row[1]) > 0 and float(row[4]) > 0 for row in rows)
        assert all(row[2].endswith(")") == row[3].endswith(")") == (mode != "off") for row in rows)
        assert float(rows[0][5]) > float(rows[0][1]), "a step is longer than its rollout"
    assert [len(row) for row in _cells(lines, "2")] == [12]
    assert [len(_cells(lines, policy)) for policy in ("replica", "cluster", "makespan")] == [2, 2, 2]


@pytest.mark.distributed
def test_arms_whose_tokens_differ_are_no_comparison(rank_pool: RankPool, tmp_path: Path) -> None:
    config = _config(tmp_path, verification="rejection")
    with pytest.raises(RankFailure, match="the arms' tokens differ"):
        rank_pool.run(2, _report, config, ["--sections", "tail", "--steps", "0", *OVERRIDES], timeout=240)


def test_savings_and_their_intervals() -> None:
    interval = _benchmark().Interval
    assert str(interval.of([0.8, 0.8, 0.8])) == "0.800 (0.800 to 0.800)"
    assert interval.of([0.8] * 3).saving == "20.0 % (20.0 to 20.0)"
    wide = interval.of([0.5, 2.0] * 8)
    assert wide.middle == pytest.approx(1.0)  # of logarithms: halving and doubling cancel
    assert wide.low == pytest.approx(0.5) and wide.high == pytest.approx(2.0)
    assert interval.of([0.8, 0.8, 0.8, 0.8, 3.0]).middle == pytest.approx(0.8)  # one disturbed draw changes nothing


def test_numbers_of_terms_have_the_tail_that_was_asked_for() -> None:
    benchmark = _benchmark()
    source = benchmark.LongTailedSums((benchmark.Tail(7.0, 1.0, 2, 64), benchmark.Tail(20.0, 0.0)))
    counts = [len(source.item(i).solution.split("\n")) for i in range(800)]
    tail, fixed = sorted(counts[::2]), set(counts[1::2])
    assert fixed == {20}
    assert 6 <= tail[200] <= 8 and tail[0] == 2 and 40 < tail[-1] <= 64
    assert source.item(5) == source.item(5)
