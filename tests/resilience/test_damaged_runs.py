"""Run directories in which a file is damaged, or is something else: one line, or what is whole of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import invoke
from tiny_runs import write_config

from erollout.tracking.journal import Journal, journal_path, read_history

GOOD = {"kind": "metrics", "time": 1, "step": 1, "values": {"reward/mean": 0.5}}
WRONG = (
    "{}",
    "[1, 2]",
    '"metrics"',
    "[" * 100_000,
    '{"kind": "metrics", "time": 1, "step": "two", "values": {"reward/mean": 0.5}}',
    '{"kind": "metrics", "time": 1, "step": 2, "values": ["reward/mean"]}',
    '{"kind": "metrics", "time": 1, "step": 2, "values": {"reward/mean": {}}}',
    '{"kind": "metrics", "time": 1, "step": 2, "values": {"reward/mean": ' + "9" * 400 + "}}",
    '{"kind": "metrics", "time": 1, "step": 2, "values": {}, "repeated": 7}',
    '{"kind": "metrics", "time": null, "step": 2, "values": {"reward/mean": 0.5}}',
    '{"kind": "start", "time": 1, "run_id": 7, "uri": "x"}',
    '{"kind": "start", "time": 1, "run_id": "a", "uri": "x", "step": "two"}',
    '{"kind": "params", "time": 1, "values": []}',
    '{"kind": ["metrics"], "time": 1}',
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory that a run of one step has left."""
    folder = tmp_path / "run"
    journal = Journal(journal_path(folder))
    journal.append("start", run_id="abc", uri="", attempt=1, step=0)
    journal.append("metrics", step=1, values={"reward/mean": 0.5})
    journal.close()
    (folder / "jobs.jsonl").write_text("")
    (folder / "verdict").write_text("done\n")
    return folder


def test_journal_lines_that_are_no_records_are_left_out_and_counted(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open(journal_path(run), "a") as file:
        file.write("\n".join([*WRONG, json.dumps(GOOD | {"step": 3})]) + "\n")
    assert [row["step"] for row in read_history(journal_path(run))] == [1, 3]
    assert f"skipped {len(WRONG)} unreadable lines" in caplog.text
    journal = Journal(journal_path(run))
    assert [record.get("step") for record in journal.records()] == [0, 1, 3]
    journal.close()


def _write(name: str, text: str | bytes) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def _directory(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return damage


REFUSED = {
    "jobs that are no JSON": (_write("jobs.jsonl", "{}{\n"), "jobs.jsonl:1 is damaged"),
    "jobs without a number": (_write("jobs.jsonl", '{"job": "x"}\n'), "jobs.jsonl:1 is damaged: job"),
    "jobs that are no mapping": (_write("jobs.jsonl", "\n7\n"), "jobs.jsonl:1 is damaged"),
    "jobs that are no text": (_write("jobs.jsonl", b"\xff\xfe"), "jobs.jsonl is damaged: it is no text"),
    "jobs that are a directory": (_directory("jobs.jsonl"), "jobs.jsonl can't be read: Is a directory"),
    "a verdict that is a directory": (_directory("verdict"), "verdict can't be read: Is a directory"),
    "a verdict that is no text": (_write("verdict", b"\xff"), "verdict is damaged: it is no text"),
    "bad nodes that are a directory": (_directory("bad_nodes"), "bad_nodes can't be read: Is a directory"),
    "a configuration that is none": (_write("config.yaml", "- 1"), "config.yaml must be a mapping"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_status_says_one_line(name: str, run: Path) -> None:
    damage, words = REFUSED[name]
    damage(run)
    assert words in invoke("launch", "status", str(run)).error()


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "[]",
        '{"rank": "x"}',
        '{"rank": 0, "host": "h", "pid": 1, "phases": "many"}',
        '{"rank": 0, "host": "h", "pid": 1, "beat": 1e300}',
        '{"rank": 0, "host": "h", "pid": 1, "since": -1}',
    ],
)
def test_a_damaged_heartbeat_is_left_out(text: str, run: Path) -> None:
    _write("heartbeats/rank_00000.json", text)(run)
    page = invoke("launch", "status", str(run))
    assert page.status == 0 and "none has started" in page.stdout


@pytest.mark.parametrize("place", ["tracking/metrics.jsonl", "tracking"])
def test_plot_of_a_journal_that_is_something_else(place: str, run: Path, tmp_path: Path) -> None:
    (run / "tracking" / "metrics.jsonl").unlink()
    if place == "tracking":
        (run / "tracking").rmdir()
        (run / "tracking").write_text("")
    else:
        (run / place).mkdir()
    assert "can't read the metrics" in invoke("plot", "--run", str(run), "--out", str(tmp_path / "a.png")).error()


@pytest.mark.parametrize("name", ["verdict", "lock"])
def test_a_run_does_not_begin_where_a_file_of_its_own_is_a_directory(name: str, run: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, rollout={"dtype": "float32"}, train={"steps": 1, "output_dir": str(run)})
    _directory(name)(run)
    assert f"{run}/{name} is a directory" in invoke("train", "--config", str(config)).error()
