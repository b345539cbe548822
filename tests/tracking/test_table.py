"""Metrics of runs as one table."""

import csv
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from commands import invoke

from erollout import read_metrics
from erollout.tracking.journal import Journal, journal_path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps whose second attempt repeated the last two."""
    journal = Journal(journal_path(tmp_path / "run"))
    for first, rewards in ((0, (1.0, 2.0, 3.0)), (1, (20.0, float("nan")))):
        journal.append("start", run_id="r", uri="", attempt=1, step=first)
        for step, reward in enumerate(rewards, start=first + 1):
            journal.append("metrics", step=step, values={"reward/mean": reward, "system/cpu": 1.0})
    journal.append("metrics", step=3, values={"evaluation/pass_at_1": 0.5})
    journal.close()
    return tmp_path / "run"


def test_each_step_is_in_the_table_once(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "metrics.csv"
    done = invoke("metrics", "--run", str(run), "--out", str(out))
    assert done.status == 0 and "4 rows" in done.stdout, done.stderr
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "step", "metric", "value"] and {row["run"] for row in rows} == {str(run)}
    assert [(row["step"], row["metric"], row["value"]) for row in rows] == [
        ("1", "reward/mean", "1"),
        ("2", "reward/mean", "20"),
        ("3", "reward/mean", "nan"),
        ("3", "evaluation/pass_at_1", "0.5"),
    ]
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


def test_several_runs_go_into_one_parquet_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(run)
    out = tmp_path / "metrics.parquet"
    runs = [str(run), str(tmp_path / "other"), str(run)]
    assert invoke("metrics", "--run", *runs, "--out", str(out)).status == 0
    table = pyarrow.parquet.read_table(out).to_pylist()
    assert [row["run"] for row in table] == [str(run)] * 4 + [str(tmp_path / "other")] * 4
    assert table[1] == {"run": str(run), "step": 2, "metric": "reward/mean", "value": 20.0}


def test_what_makes_no_table_is_refused_in_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "begun" / "tracking").mkdir(parents=True)
    (tmp_path / "begun" / "tracking" / "metrics.jsonl").write_text("")
    for directory, out, word in (
        (tmp_path / "none", "a.csv", "train.output_dir of a run"),
        (tmp_path / "begun", "a.csv", "no metrics yet"),
        (run, "a.json", "must end in .csv or .parquet"),
        (run, f"{tmp_path}/taken/a.csv", "can't be written"),
    ):
        assert word in invoke("metrics", "--run", str(directory), "--out", out).error()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = invoke("metrics", "--run", str(run), "--out", str(tmp_path / "a.csv")).error()
    assert "the Python package pyarrow, which" in line and "table.py imports, is missing" in line and "pip install" in line
