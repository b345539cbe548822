"""Two nodes without a scheduler: the same command is given on each."""

import signal
import sys
from pathlib import Path

import psutil
import pytest
from ranks import RankPool
from slurm_runs import Cluster, Run, wait_for
from tiny_runs import train_here

pytestmark = [pytest.mark.slurm, pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = 6


def _launch(nodes: Cluster, run: Run, asked: signal.Signals | None = None) -> None:
    """To the end, on n1 and n2. Where one is asked to stop, it is n2's launcher, after two steps."""
    arguments = ["--nodes", "2", "--nproc-per-node", "1", "--head", "10.77.0.11", "--config", str(run.config)]
    command = [sys.executable, "-m", "erollout.cli", "launch", "torchrun", *arguments]
    logs = [run.folder / "n1.out", run.folder / "n2.out"]

    def read() -> str:
        return "\n".join(log.read_text() for log in logs)

    with (
        nodes.started(*command, node="n1", output=logs[0]) as first,
        nodes.started(*command, node="n2", output=logs[1]) as second,
    ):
        if asked is not None:
            run.wait_for_step(2, why=read)
            (launcher,) = psutil.Process(second.pid).children()
            launcher.send_signal(asked)
        wait_for(lambda: None not in (first.poll(), second.poll()), "the launchers do not end", why=read)
        assert [first.returncode, second.returncode] == [0, 0], read()


def test_nodes_meet_at_an_address_stop_together_and_go_on(nodes: Cluster, tmp_path: Path, rank_pool: RankPool) -> None:
    run, unbroken = Run(tmp_path / "broken", STEPS, interval=100), Run(tmp_path / "unbroken", STEPS, interval=100)
    _launch(nodes, run, signal.SIGUSR1)
    assert run.verdict == "requeue"
    assert run.checkpoints == [max(run.steps)] and max(run.steps) < STEPS
    _launch(nodes, run)
    assert run.verdict == "done"
    rank_pool.run(2, train_here, unbroken.tree)
    run.assert_equal(unbroken)
    assert run.lost() == 0
