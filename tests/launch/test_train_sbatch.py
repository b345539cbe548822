"""What train.sbatch decides, with commands named like Slurm's; tests/slurm gives it to a real cluster."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from fake_slurm import FakeSlurm, fake

from erollout.launch.plan import batch_script

__all__ = ["fake"]


def _directory_of(folder: Path, job: int, cluster: str = "") -> Path:
    """A run directory that belongs to a job, whose ranks have not begun."""
    run = folder / "run"
    run.mkdir()
    (run / "lock").write_text(json.dumps({"host": "n1", "pid": 0, "job": str(job), "attempt": 0, "cluster": cluster}))
    return run


def _start(run: Path, fake: FakeSlurm, squeue: str) -> subprocess.CompletedProcess[str]:
    """Job 8 in the directory, up to where its ranks would begin. `squeue`: what the command does."""
    done = {"squeue": squeue, "srun": "exit 1", "scontrol": "echo n1", "sleep": "exec /bin/sleep 0.01"}
    for name, lines in done.items():
        (fake.folder / name).write_text(f"#!/bin/bash\ncd {fake.folder}\necho {name} >> calls\n{lines}\n")
        (fake.folder / name).chmod(0o755)
    environment = ENVIRONMENT | {"PATH": os.environ["PATH"], "EROLLOUT_PREFLIGHT": "0", "SLURM_JOB_NODELIST": "n1"}
    environment |= {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "0", "SLURM_CLUSTER_NAME": "here"}
    command = ["bash", str(batch_script()), str(run), "--config", "config.yaml"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


BUSY = "if (($(grep -c squeue calls) < 3)); then exit 1; fi; "


@pytest.mark.parametrize(
    ("squeue", "refused", "holder"),
    [
        ("echo 7 RUNNING", "is in use by job 7 (RUNNING)", 7),
        ("echo 7 FAILED", None, 8),
        (":", None, 7),  # another cluster's, perhaps: the first rank sees whether it is alive
        ("exit 1", None, 7),
        (BUSY + "echo 7 RUNNING", "is in use by job 7 (RUNNING)", 7),
        (BUSY + "echo 7 COMPLETED", None, 8),
        ("if (($(grep -c squeue calls) < 3)); then echo 7 COMPLETING; else echo 7 COMPLETED; fi", None, 8),
        ("echo 7 COMPLETING", "is in use by job 7 (COMPLETING)", 7),
    ],
)
def test_a_directory_is_taken_from_a_job_that_slurm_says_has_ended(
    squeue: str,
    refused: str | None,
    holder: int,
    tmp_path: Path,
    fake: FakeSlurm,
) -> None:
    run = _directory_of(tmp_path, 7)
    output = _start(run, fake, squeue).stdout
    if refused:
        assert refused in output and not (run / "logs").exists()
    else:
        assert "attempt 0: starts on n1" in output and "FAILED: a crash without a new checkpoint" in output
    left = (run / "lock").read_text() if (run / "lock").exists() else '"8"'  # its own is removed at its end
    assert f'"{holder}"' in left


@pytest.mark.parametrize("job", [7, 8])
@pytest.mark.parametrize(("cluster", "is_left"), [("there", True), ("here", False)])
def test_a_job_of_the_same_number_on_another_cluster_is_another_job(
    job: int,
    cluster: str,
    is_left: bool,
    tmp_path: Path,
    fake: FakeSlurm,
) -> None:
    """The first rank sees whether it is alive."""
    run = _directory_of(tmp_path, job, cluster)
    output = _start(run, fake, "echo 7 FAILED").stdout
    assert "attempt 0: starts on n1" in output
    assert (run / "lock").exists() == is_left and (not is_left or f'"{cluster}"' in (run / "lock").read_text())


@pytest.mark.parametrize(
    ("begun", "beat", "seconds", "ends"),
    [
        (100, None, 90, False),  # the ranks load their libraries
        (100, 200, 90, False),  # a heartbeat of the start before
        (1000, None, 90, True),
        (1000, 200, 90, True),
        (1000, 80, 90, False),  # four heartbeats of 20 s, the longest period
        (1000, 200, 900, False),
    ],
)
def test_a_run_is_ended_only_when_ranks_that_gave_signs_are_silent(
    begun: int, beat: int | None, seconds: int, ends: bool, tmp_path: Path
) -> None:
    """Ages in seconds."""
    log, heartbeats = tmp_path / "logs", tmp_path / "heartbeats"
    for path, age in ((log / "begun", begun), (heartbeats / "rank_00000.json", beat)):
        path.parent.mkdir()
        if age is not None:
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
    lines = batch_script().read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("end_if_silent()"))
    function = "\n".join(lines[first : lines.index("}", first) + 1])
    program = f"""
        say() {{ echo "$*"; }}
        RUN_DIR={tmp_path} LOG={log} EROLLOUT_SILENT_SECONDS=900
        sleep 60 & TRAINING=$!
        {function}
        end_if_silent {seconds}
        kill -0 "$TRAINING" && kill "$TRAINING" && echo lives"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert ("no heartbeat of any rank" in done.stdout) == ends == (log / "silent").exists(), done.stdout + done.stderr
