"""What the scheduler does to a run, and who is left out: time limits, preemption, scancel, chains, bad nodes."""

import time
from pathlib import Path

import pytest
from ranks import RankPool
from slurm_runs import AT_ONCE, INTERVAL, UNCHECKED, Cluster, Run, assert_went_on, wait_for
from tiny_runs import train_here

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(900)]


def test_scancel_saves_and_never_revives(cluster: Cluster, run: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    cluster.output("scancel", str(job))
    cluster.wait(job, "CANCELLED")
    wait_for(lambda: not cluster.processes(job), "its processes go on", 60, cluster.logs(job))
    assert run.verdict == "stopped" and run.checkpoints[-1] == max(run.steps)
    time.sleep(10)  # a requeued job would wait now
    ended = cluster.job(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)


def test_the_time_limit(cluster: Cluster, tmp_path: Path, rank_pool: RankPool) -> None:
    """Slurm gives the signal up to a minute early, and limits are in minutes: steps of a second, for more than a job's time."""
    steps = 120
    run = Run(tmp_path / "it", steps, interval=1000, rewards={"function": "unhurried_scorer:a_second"})
    unbroken = Run(tmp_path / "unbroken", steps, interval=1000, rewards=AT_ONCE)
    rank_pool.run(2, train_here, unbroken.tree)
    job = cluster.launch(run, UNCHECKED, "--time", "00:03:00", "--grace", "50")
    ended = cluster.wait(job, seconds=700)
    assert ended.state == "COMPLETED" and 1 <= ended.restarts <= 6 and run.verdict == "done", cluster.logs(job)()
    assert run.lost() == 0
    run.assert_equal(unbroken)


SLOW_TO_LOAD = """
import os, time

if "SLURM_JOB_ID" in os.environ:
    time.sleep(65)


def score(prompt, response):
    return 1.0
"""


def test_a_time_limit_that_is_over_before_the_first_step_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path / "it", 5, rewards={"function": "slow_to_load.py:score", "timeout_seconds": 300})
    (run.config.parent / "slow_to_load.py").write_text(SLOW_TO_LOAD)
    job = cluster.launch(run, UNCHECKED, "--time", "00:02:00", "--grace", "59")
    ended = cluster.wait(job, seconds=700)
    assert (ended.state, ended.restarts) == ("FAILED", 2), cluster.logs(job)()
    last = (run.directory / f"slurm-{job}.out").read_text().splitlines()[-1]
    assert "three times in a row" in last and "--time" in last and "--grace" in last, last


def test_a_job_whose_nodes_another_one_takes(cluster: Cluster, run: Run, unbroken: Run) -> None:
    """It saves in the time that it is given, and goes on when the other one is through."""
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    urgent = ["--partition=urgent", "--nodes=3", "--ntasks=3", "--cpus-per-task=4", f"--output={run.folder}/urgent.out"]
    other = cluster.submit(*urgent, "--wrap=sleep 5")
    assert_went_on(cluster, job, run, unbroken, lost=0)
    assert cluster.job(other).state == "COMPLETED"


def test_a_chain_goes_on_after_a_job_whose_nodes_another_one_takes(cluster: Cluster, run: Run, unbroken: Run) -> None:
    """Slurm ended it: nobody asked for that, and the next job is not to take it for the end of the run."""
    cluster.launch(run, UNCHECKED, "--chain", "2")
    first, second = run.jobs
    cluster.reach(first, run, INTERVAL + 2)
    urgent = ["--partition=urgent", "--nodes=3", "--ntasks=3", "--cpus-per-task=4", f"--output={run.folder}/urgent.out"]
    cluster.submit(*urgent, "--wrap=sleep 5")
    assert cluster.wait(first).restarts == 0 and run.verdict != "stopped", cluster.logs(first)()
    assert cluster.wait(second).state == "COMPLETED" and run.verdict == "done", cluster.logs(second)()
    assert run.lost() == 0
    run.assert_equal(unbroken)


def test_a_job_that_is_asked_to_stop_while_its_ranks_start(cluster: Cluster, run: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    output = run.directory / f"slurm-{job}.out"
    wait_for(lambda: output.exists() and "ranks on each of" in output.read_text(), "it does not start", why=cluster.logs(job))
    cluster.output("scancel", "--batch", "--signal=TERM", str(job))
    ended = cluster.wait(job)
    assert ended.restarts == 0 and run.verdict in (None, "stopped"), cluster.logs(job)()
    assert max(run.steps, default=0) <= 1, cluster.logs(job)()
    wait_for(lambda: not cluster.processes(job), "its processes go on", 20, cluster.logs(job))


def test_a_bad_node_is_named_and_left_out(nodes: Cluster, run: Run, unbroken: Run) -> None:
    """Where the shared filesystem is not mounted."""
    nodes.change("hide", "n2", str(run.folder))
    try:
        job = nodes.launch(run)
        ended = nodes.wait(job)
    finally:
        nodes.change("show", "n2", str(run.folder))
    assert (ended.state, ended.restarts, ended.nodes) == ("COMPLETED", 1, ("n1", "n3")), nodes.logs(job)()
    assert (run.directory / "bad_nodes").read_text().split() == ["n2"] and ended.fields["ExcNodeList"] == "n2"
    assert run.lost() == 0
    run.assert_equal(unbroken)


def test_a_chain_goes_on_without_a_bad_node(nodes: Cluster, run: Run, unbroken: Run) -> None:
    """Its jobs were submitted before that was known."""
    nodes.change("hide", "n2", str(run.folder))
    try:
        nodes.launch(run, "--chain", "2")
        first, second = map(nodes.wait, run.jobs)
    finally:
        nodes.change("show", "n2", str(run.folder))
    assert first.state == "FAILED" and "n2" in first.nodes, nodes.logs(run.jobs[0])()
    assert (second.state, second.nodes) == ("COMPLETED", ("n1", "n3")), nodes.logs(run.jobs[1])()
    run.assert_equal(unbroken)
