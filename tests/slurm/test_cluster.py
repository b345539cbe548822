"""The test cluster itself: what tests rely on, and that it leaves nothing behind."""

import subprocess
from pathlib import Path

import psutil
import pytest
from slurm_runs import Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]

WAITS = "#!/bin/sh\nsrun sh -c 'echo up; exec sleep 600'\n"


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    """Arguments of sbatch for a job that does nothing on two nodes."""
    path = tmp_path / "script.sh"
    path.write_text(WAITS)
    return [f"--output={tmp_path}/%j.out", "--nodes=2", "--requeue", str(path)]


def _submitted(cluster: Cluster, script: list[str]) -> int:
    """The job, once its tasks run and srun knows of them: one that loses a node before that dies of SIGPIPE."""
    job = cluster.submit(*script)
    output = Path(script[0].removeprefix("--output=").replace("%j", str(job)))
    wait_for(lambda: output.is_file() and output.read_text().count("up") == 2, "no tasks")
    return job


def _members(directory: Path) -> list[str]:
    """Processes that know of a cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            line, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        found += [f"{process} {line}"] if any(str(directory) in word for word in [*line, *variables.values()]) else []
    return found


def test_nodes_differ_as_machines_do(nodes: Cluster) -> None:
    script = "touch /dev/shm/$(hostname); ls /dev/shm; getent hosts n1; ip -4 -o address show eth0; echo $CUDA_VISIBLE_DEVICES"
    for number, loopback in enumerate([True, False, False]):
        name = f"n{number + 1}"
        told = nodes.output("srun", f"--nodelist={name}", "--gpus-per-node=2", "sh", "-c", script).splitlines()
        assert told[0] == name, "shared memory of another node"
        assert told[1].split()[0] == ("127.0.1.1" if loopback else "10.77.0.11"), "as Debian writes /etc/hosts"
        assert f"10.77.0.{11 + number}/24" in told[2] and told[3] == "0,1"
    assert nodes.run("srun", "--gpus-per-node=5", "true").status != 0


def test_a_crashed_node_loses_all_its_processes_and_the_job_goes_on_elsewhere(cluster: Cluster, script: list[str]) -> None:
    job = _submitted(cluster, script)
    assert len(cluster.processes(job, "sleep")) >= 2
    lost = cluster.job(job).nodes[1]
    cluster.change("crash", lost)
    assert cluster.processes(job, node=lost) == []
    wait_for(lambda: cluster.job(job).restarts == 1, "the job is not requeued")
    assert lost not in cluster.wait(job, "RUNNING").nodes


def test_a_cut_cable_is_silence(nodes: Cluster) -> None:
    reach = ["timeout", "2", "bash", "-c", "exec 3<> /dev/tcp/n2/6818"]
    assert nodes.run(*reach, node="n1").status == 0
    nodes.change("cut", "n2")
    assert nodes.run(*reach, node="n1").status != 0
    nodes.change("join", "n2")
    wait_for(lambda: nodes.run(*reach, node="n1").status == 0, "n2 is not reached", 30)


@pytest.mark.parametrize(
    ("how", "options"), [("down", []), ("owner", []), ("keeper", []), ("down", ["--flat"]), ("owner", ["--flat"])]
)
def test_nothing_is_left(how: str, options: list[str], cluster: Cluster, tmp_path: Path, script: list[str]) -> None:
    own = Cluster(tmp_path / "own")
    owner = subprocess.Popen(["sleep", "600"])
    try:
        own.up(f"--owner={owner.pid}", *options)
        _submitted(own, script)
        if how == "owner":
            owner.kill()
            owner.wait()
        elif how == "keeper":
            psutil.Process(own.keeper).kill()
        else:
            own.down()
        wait_for(lambda: _members(own.directory) == [], "not all has ended", 20, lambda: "\n".join(_members(own.directory)))
    finally:
        owner.kill()
        owner.wait()
        own.down()
