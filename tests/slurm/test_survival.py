"""What dies or breaks under a run, and how it ends: the real trainer under slurm/train.sbatch, disturbed in the middle.

Each run that ends is compared with one that was never disturbed: parameters bit for bit.
"""

import time
from pathlib import Path

import pytest
from slurm_runs import INTERVAL, STEPS, UNCHECKED, Cluster, Run, assert_went_on, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(900)]


def test_a_killed_rank(cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    killed = cluster.ranks(job)[1]
    killed.kill()
    assert_went_on(cluster, job, run, unbroken)
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
    assert_went_on(cluster, job, run, unbroken)


@pytest.mark.parametrize("place", [0, 1])
def test_a_lost_node(place: int, cluster: Cluster, run: Run, unbroken: Run) -> None:
    job = cluster.launch(run, UNCHECKED)
    cluster.reach(job, run, INTERVAL + 2)
    lost = cluster.job(job).nodes[place]
    cluster.change("crash", lost)
    assert_went_on(cluster, job, run, unbroken)
    assert lost not in cluster.job(job).nodes


def test_a_node_that_can_not_be_reached(nodes: Cluster, run: Run, unbroken: Run) -> None:
    job = nodes.launch(run, UNCHECKED)
    nodes.reach(job, run, INTERVAL + 2)
    lost = nodes.job(job).nodes[1]
    nodes.change("cut", lost)
    try:
        assert_went_on(nodes, job, run, unbroken)
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


def test_a_damaged_checkpoint_gives_way_to_the_one_before(cluster: Cluster, tmp_path: Path, unbroken: Run) -> None:
    run = Run(tmp_path / "it", STEPS, INTERVAL, rewards={"function": "unhurried_scorer:a_second"})
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


def test_a_node_that_is_lost_and_back_before_the_controller_sees_it(nodes: Cluster, run: Run, unbroken: Run) -> None:
    """Nobody is left to end srun, and no rank to hear SIGUSR1."""
    job = nodes.launch(run, UNCHECKED)
    nodes.reach(job, run, INTERVAL + 2)
    lost = nodes.job(job).nodes[1]
    nodes.change("crash", lost)
    nodes.change("heal", lost)
    wait_for(lambda: not nodes.ranks(job), "ranks go on without the others", why=nodes.logs(job))
    assert nodes.job(job).state == "RUNNING", nodes.logs(job)()
    nodes.output("scancel", "--batch", "--signal=USR1", str(job))
    assert_went_on(nodes, job, run, unbroken)
    assert "no heartbeat of any rank" in nodes.logs(job)()
