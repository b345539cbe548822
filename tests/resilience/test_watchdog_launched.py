"""Runs through the launcher of which a part stands still or is gone: they end, and nothing of them is left."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from launched import Launched
from tiny_runs import steps_recorded, write_config

from erollout.resilience.watchdog import HUNG

HANG_SECONDS = 20.0
LAUNCHER = "import sys; from erollout.launch.local import launch_local; launch_local(sys.argv[1:], 2)"


@pytest.mark.end_to_end
@pytest.mark.cluster
def test_a_rank_that_stands_still_for_good_is_named_and_the_run_ends(tmp_path: Path) -> None:
    """The launcher gives the ranks that are left 30 s: one that is stopped does not hear it."""
    config = write_config(
        tmp_path,
        train={"steps": 1000, "output_dir": str(tmp_path / "run")},
        fault_tolerance={"hang_seconds": HANG_SECONDS, "heartbeat_seconds": 0.5},
        parallel={"world_size": 2},
    )
    with Launched("train", "--config", str(config), output=tmp_path / "output") as run:
        run.wait_until(lambda: steps_recorded(tmp_path) > 1)
        stopped = run.ranks()[1]
        stopped.send_signal(signal.SIGSTOP)
        assert run.process.wait(HANG_SECONDS + 30 + 60) == HUNG, run.text()
        run.wait_until_gone(10)
    (line,) = (line for line in run.text().splitlines() if "error:" in line)
    assert "rank 0 has been in phase" in line and "silent: rank 1" in line and f"pid {stopped.pid}" in line


@pytest.mark.end_to_end
def test_a_launcher_that_is_killed_leaves_no_rank_even_one_that_has_just_begun(tmp_path: Path) -> None:
    """Killed as the second rank appears: neither has imported anything yet."""
    config = write_config(tmp_path, parallel={"world_size": 2})
    with Launched("train", "--config", str(config), output=tmp_path / "output", program=LAUNCHER) as run:
        run.wait_until(lambda: len(run.ranks()) == 2)
        run.process.kill()
        run.process.wait(10)
        run.wait_until_gone(10)
    assert not (tmp_path / "run").exists()


def test_a_rank_whose_launcher_is_gone_already_ends_at_once() -> None:
    """The kernel says nothing of a death before it was asked to."""
    environment = ENVIRONMENT | {
        "EROLLOUT_LAUNCHER_PID": "99999999",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }
    program = "import sys; from erollout.cli import main; sys.exit(main(['train', '--help']))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "process 99999999, is gone" in done.stderr and not done.stdout
