"""What happens to a run on a cluster, and how it ends: the real trainer under slurm/train.sbatch, disturbed in the middle.

Each run that ends is compared with one that was never disturbed: parameters bit for bit.
"""

import time
from pathlib import Path

import pytest
from ranks import RankPool
from slurm_runs import AT_ONCE, INTERVAL, STEPS, Cluster, Run, wait_for
from tiny_runs import train_here

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(900)]

UNCHECKED = "--no-preflight"


def _assert_went_on(cluster: Cluster, job: int, run: Run, unbroken: Run, lost: int = INTERVAL) -> None:
    """The job was queued again once, lost at most so many steps, and ended well."""
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts, run.verdict) == ("COMPLETED", 1, "done"), cluster.logs(job)()
    assert run.lost() <= lost
    run.assert_equal(unbroken)


def test_a_killed_rank(cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    killed = cluster.ranks(job)[1]
    killed.kill()
    _assert_went_on(cluster, job, run, unbroken)
    assert "was ended by SIGKILL" in cluster.logs(job)()


@pytest.mark.parametrize("place", [0, 1])
def test_a_killed_launcher(place: int, cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    node = cluster.job(job).nodes[place]
    ranks = cluster.ranks(job)
    (launcher,) = [process for process in cluster.processes(job, "torchrun", node=node) if process.name().startswith("python")]
    launcher.kill()
    wait_for(lambda: not any(rank.is_running() for rank in ranks), "ranks go on without a launcher", 60)
    _assert_went_on(cluster, job, run, unbroken)


@pytest.mark.parametrize("place", [0, 1])
def test_a_lost_node(place: int, cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    lost = cluster.job(job).nodes[place]
    cluster.change("crash", lost)
    _assert_went_on(cluster, job, run, unbroken)
    assert lost not in cluster.job(job).nodes


def test_a_node_that_can_not_be_reached(nodes: Cluster, run: Run, unbroken: Run) -> None:
    job = nodes.launch(run, UNCHECKED)
    nodes.reach(job, run, INTERVAL + 2)
    lost = nodes.job(job).nodes[1]
    nodes.change("cut", lost)
    try:
        _assert_went_on(nodes, job, run, unbroken)
    finally:
        nodes.change("join", lost)
    assert lost not in nodes.job(job).nodes


def test_a_stopped_process_is_waited_for(cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    rank = cluster.ranks(job)[1]
    rank.suspend()
    reached = max(run.steps)
    time.sleep(10)
    assert max(run.steps) <= reached + 1
    rank.resume()
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts, run.lost()) == ("COMPLETED", 0, 0), cluster.logs(job)()
    run.assert_equal(unbroken)


def test_a_crash_without_progress_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path / "it", STEPS, interval=100)
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, 2)
    cluster.ranks(job)[0].kill()
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts, run.verdict, run.checkpoints) == ("FAILED", 0, None, []), cluster.logs(job)()
    assert ended.exit_status != 0


def test_a_crash_without_progress_of_a_node_that_went_bad_is_not(nodes: Cluster, tmp_path: Path, unbroken: Run) -> None:
    """The shared filesystem is gone there: without that node, the run begins again."""
    run = Run(tmp_path / "it", STEPS, interval=100)
    job = nodes.launch(run, UNCHECKED)
    nodes.reach(job, run, 2)
    lost = nodes.job(job).nodes[1]
    nodes.change("hide", lost, str(run.folder))
    try:
        nodes.ranks(job)[1].kill()
        ended = nodes.wait(job)
    finally:
        nodes.change("show", lost, str(run.folder))
    assert (ended.state, ended.restarts, run.verdict) == ("COMPLETED", 1, "done"), nodes.logs(job)()
    assert lost not in ended.nodes and (run.directory / "bad_nodes").read_text().split() == [lost]
    run.assert_equal(unbroken)


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
    """Slurm gives the signal up to a minute early, and a limit is at least a minute: steps of a second, for two minutes."""
    steps = 75
    run = Run(tmp_path / "it", steps, interval=1000, rewards={"function": "unhurried_scorer:a_second"})
    unbroken = Run(tmp_path / "unbroken", steps, interval=1000, rewards=AT_ONCE)
    rank_pool.run(2, train_here, unbroken.tree)
    job = cluster.launch(run, UNCHECKED, "--time", "00:02:00", "--grace", "50")
    ended = cluster.wait(job, seconds=600)
    assert ended.state == "COMPLETED" and 1 <= ended.restarts <= 6 and run.verdict == "done", cluster.logs(job)()
    assert run.lost() == 0
    run.assert_equal(unbroken)


def test_a_job_whose_nodes_another_one_takes(cluster: Cluster, run: Run, unbroken: Run) -> None:
    """It saves in the time that it is given, and goes on when the other one is through."""
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    urgent = ["--partition=urgent", "--nodes=3", "--ntasks=3", "--cpus-per-task=4", f"--output={run.folder}/urgent.out"]
    other = cluster.submit(*urgent, "--wrap=sleep 5")
    _assert_went_on(cluster, job, run, unbroken, lost=0)
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
    assert max(run.steps, default=0) <= 1 and not cluster.processes(job), cluster.logs(job)()


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


def test_a_full_disk_leaves_what_was_saved_and_the_run_goes_on_once_there_is_room(
    nodes: Cluster, tmp_path: Path, unbroken: Run
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    nodes.change("disk", str(disk), "64")
    run = Run(tmp_path / "it", STEPS, INTERVAL, checkpoint={"directory": str(disk / "checkpoints")})
    listing = ["find", str(disk), "-name", "manifest.json"]
    job = nodes.launch(run, UNCHECKED)
    wait_for(lambda: nodes.output(*listing) != "", "nothing is saved", why=nodes.logs(job))
    nodes.run("dd", "if=/dev/zero", f"of={disk}/filler", "bs=64k")
    ended = nodes.wait(job)
    assert ended.state == "FAILED" and ended.restarts <= 2 and run.verdict is None, nodes.logs(job)()
    assert nodes.output(*listing) != ""
    nodes.output("rm", f"{disk}/filler")
    done = nodes.erollout("launch", "requeue", run.directory)
    assert done.status == 0, done.stderr
    assert nodes.wait(run.jobs[-1]).state == "COMPLETED" and run.verdict == "done", nodes.logs(run.jobs[-1])()
    run.assert_equal(unbroken)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, 2 * INTERVAL + 1)
    assert cluster.erollout("launch", "stop", run.directory).status == 0
    cluster.wait(job)
    before, newest = run.checkpoints[-2:]
    shard = max((run.directory / "checkpoints" / f"step_{newest:08d}").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF  # the size stays
    shard.write_bytes(data)
    assert cluster.erollout("launch", "requeue", run.directory).status == 0
    again = run.jobs[-1]
    assert cluster.wait(again).state == "COMPLETED" and run.verdict == "done", cluster.logs(again)()
    assert run.lost() == newest - before
    run.assert_equal(unbroken)
