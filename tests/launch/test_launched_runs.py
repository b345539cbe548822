"""The commands that look after a run, by its directory, without a cluster."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from fake_slurm import FakeSlurm, fake, folder, submit_tiny

from erollout.launch.run_directory import RunDirectory
from erollout.resilience.watchdog import Heartbeat

__all__ = ["fake", "folder"]


def test_requeue_is_the_same_submission(folder: Path, fake: FakeSlurm) -> None:
    assert submit_tiny(folder, "--time=1:00:00").status == 0
    (folder / "config.yaml").unlink()
    run = folder / "run"
    (run / "verdict").write_text("stopped\n")
    (run / "bad_nodes").write_text("n2\n")
    outcome = invoke("launch", "requeue", str(run))
    assert outcome.status == 0 and "from step 0" in outcome.stdout, outcome.stderr
    first, second = map(shlex.split, fake.calls("sbatch"))
    assert [word for word in second if word != "--exclude=n2"] == first and len(second) == len(first) + 1
    old, new = map(asdict, RunDirectory(run).submissions())
    assert [name for name in old if old[name] != new[name]] in (["job"], ["job", "submitted"])
    (run / "verdict").write_text("done\n")
    assert "is done" in invoke("launch", "requeue", str(run)).error()
    assert len(fake.calls("sbatch")) == 2


def test_stop(folder: Path, fake: FakeSlurm) -> None:
    run = folder / "run"
    assert submit_tiny(folder, "--chain=3").status == 0
    fake.holds((101, "RUNNING", run), (102, "PENDING", run), (103, "PENDING", run))
    assert invoke("launch", "stop", str(run)).status == 0
    assert fake.calls("scancel") == ["102", "103", "--batch --signal=TERM 101"]
    fake.holds((101, "COMPLETED", run))
    assert f"no job or rank of {run} is running or pending" in invoke("launch", "stop", str(run)).error()


def _beat(run: Path, **values: Any) -> None:
    (run / "heartbeats").mkdir(parents=True, exist_ok=True)
    now = time.time()
    defaults = {"host": "n1", "pid": 1, "step": 4, "phase": "update", "phases": 30, "since": now, "beat": now}
    beat = Heartbeat(**{**defaults, **values})
    (run / "heartbeats" / f"rank_{beat.rank:05d}.json").write_text(json.dumps(asdict(beat)))


def test_status_says_who_is_behind(folder: Path, fake: FakeSlurm) -> None:
    assert submit_tiny(folder).status == 0
    run = folder / "run"
    fake.holds((101, "RUNNING", run))
    assert "none has started" in invoke("launch", "status", str(run)).stdout
    (run / "logs" / "101.0").mkdir(parents=True)
    (run / "logs" / "101.10").mkdir()
    (run / "logs" / "101.9").mkdir()
    checkpoint = run / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    os.utime(checkpoint, (time.time() - 3 * 3600,) * 2)
    (run / "bad_nodes").write_text("n9\n")
    for rank in (0, 1):
        _beat(run, rank=rank)
    _beat(run, rank=2, phase="rollout", phases=28, host="n2", pid=77)
    _beat(run, rank=3, phases=20, beat=time.time() - 100)
    page = invoke("launch", "status", str(run)).stdout
    for words in (
        "job 101        RUNNING on n[1-2], 0:10 of 1:00:00",
        "none: it is running or pending",
        "step_00000004, 3 hours ago",
        "3 of 4 heard from within 15 s",
        "the foremost in update of step 5",
        "behind         rank 2 (n2, pid 77) in rollout of step 5 since",
        "silent         rank 3 (n1",
        "bad nodes      n9",
        f"{run}/slurm-101.out, logs/101.10 (start 3)",
    ):
        assert words in page, page
    assert page.count("rank 3 (") == 1, page
    (run / "verdict").write_text("requeue\n")
    fake.holds()
    page = invoke("launch", "status", str(run)).stdout
    assert "job 101        ended; Slurm has forgotten it" in page and "verdict        requeue: saved" in page
    assert "silent" not in page and "4, last heard from at" in page


def test_a_run_that_slurm_did_not_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = "import time; erollout = 1; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None and rank.stdout.readline()
        _beat(run, rank=0, host=os.uname().nodename, pid=rank.pid)
        assert "1 of its ranks run on this machine" in invoke("launch", "status", str(run)).stdout
        assert invoke("launch", "stop", str(run)).status == 0
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)  # ended, and its launcher has not heard of it yet
        assert "none of its ranks runs here" in invoke("launch", "status", str(run)).stdout
        assert rank.wait(20) == -signal.SIGTERM
    assert "none of its ranks runs here" in invoke("launch", "status", str(run)).stdout
    assert "was not submitted" in invoke("launch", "requeue", str(run)).error()
    _beat(run, rank=0, host="elsewhere", pid=5)
    assert "ranks on elsewhere (pid 5): give the command there" in invoke("launch", "stop", str(run)).error()


def test_stop_spares_a_stranger_with_the_number_of_a_rank(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        _beat(tmp_path, rank=0, host=os.uname().nodename, pid=stranger.pid)
        assert invoke("launch", "stop", str(tmp_path)).status == 2
        assert stranger.poll() is None
        stranger.kill()


def test_logs_of_a_run_that_no_scheduler_holds_are_where_it_was_started(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    line = invoke("launch", "logs", str(tmp_path)).error()
    for words in ("where they were started", f"{tmp_path}/tracking/", f"erollout launch status {tmp_path}", "--log-dir"):
        assert words in line, line
    assert "job" not in line


def test_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path
    for attempt in (0, 1):
        (run / "logs" / f"12.{attempt}").mkdir(parents=True)
        (run / "logs" / f"12.{attempt}" / "node-n1.out").write_text(f"start {attempt}\n")
        (run / "logs" / f"12.{attempt}" / "preflight-n1.out").write_text("checked\n")
    (run / "slurm-12.out").write_text("batch\n")
    (run / "logs" / "12.1" / "ranks").mkdir()
    (run / "logs" / "12.1" / "ranks" / "rank_00003.err").write_text("of rank 3\n")
    assert invoke("launch", "logs", str(run)).status == 0
    printed = capfd.readouterr().out.splitlines()
    assert {"batch", "start 1"} <= set(printed) and "checked" not in printed
    (run / "logs" / "12.1" / "node-n1.out").unlink()
    assert invoke("launch", "logs", str(run)).status == 0
    assert {"batch", "checked"} <= set(capfd.readouterr().out.splitlines())
    assert invoke("launch", "logs", str(run), "--attempt", "12.0").status == 0
    printed = capfd.readouterr().out
    assert "start 0" in printed and "start 1" not in printed
    assert invoke("launch", "logs", str(run), "--rank", "3").status == 0
    assert capfd.readouterr().out == "of rank 3\n"
    assert "--rank = 4:" in invoke("launch", "logs", str(run), "--rank", "4").error()
    assert "has no logs of 12.7; there are 12.0, 12.1" in invoke("launch", "logs", str(run), "--attempt", "12.7").error()
    assert "holds no run" in invoke("launch", "logs", str(tmp_path / "nowhere")).error()


def test_logs_of_a_run_on_ray(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for attempt in (2, 10):
        folder = tmp_path / "logs" / f"ray-20261123-101010-77.{attempt}"
        folder.mkdir(parents=True)
        (folder / "node-0-n1.out").write_text(f"start {attempt}\n")
    assert invoke("launch", "logs", str(tmp_path)).status == 0
    assert capfd.readouterr().out == "start 10\n"
    page = invoke("launch", "status", str(tmp_path)).stdout
    assert "none in Slurm" in page and "ray-20261123-101010-77.10 (start 2)" in page
