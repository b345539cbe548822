"""A run on a real Slurm cluster that is asked to stop in the middle: much of what a user will meet, in one test."""

import re
from pathlib import Path

import pytest
from slurm_runs import STEPS, Cluster, Run

pytestmark = [pytest.mark.slurm, pytest.mark.full, pytest.mark.timeout(600)]

ASKED = 4


def test_a_run_that_is_asked_to_stop_is_queued_again_and_ends_as_an_unbroken_one(
    cluster: Cluster, tmp_path: Path, unbroken: Run
) -> None:
    run = Run(tmp_path / "it", STEPS, interval=100, rewards={"function": "unhurried_scorer:a_second"})
    job = cluster.launch(run)
    cluster.reach(job, run, ASKED)
    page = cluster.erollout("launch", "status", run.directory).stdout
    assert re.search(rf"job {job}  +RUNNING on n\[1-2\]", page) and "2 of 2 heard from" in page, page
    cluster.output("scancel", "--batch", "--signal=USR1", str(job))  # as Slurm does before the time limit
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts, run.verdict) == ("COMPLETED", 1, "done"), cluster.logs(job)()
    saved = run.checkpoints[0]
    assert ASKED <= saved < STEPS and run.lost() == 0
    run.assert_equal(unbroken)
    first, second = (f"{job}.{attempt}" for attempt in (0, 1))
    assert {first, second} <= {path.name for path in (run.directory / "logs").iterdir()}, "logs of both starts are kept"
    assert (run.directory / "logs" / "latest").resolve().name == second
    assert f"step={saved}/" in cluster.erollout("launch", "logs", run.directory, "--attempt", first).stdout
    assert "done" in cluster.erollout("launch", "status", run.directory).stdout
