"""Commands named like Slurm's, for what no real cluster does on request: to be busy, or to lose an answer.

They note their arguments in `calls`, and read what they are to say from files in their folder.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import Outcome, invoke
from tiny_runs import write_config

from erollout.schedulers import slurm_jobs

_COMMANDS = {
    "sbatch": """
        count=$(($(cat count) + 1)); echo $count > count
        case "$*" in
            *--test-only*) if [ -f refuses ]; then cat refuses >&2; exit 1; fi; echo "sbatch: Job 7 to start at noon" >&2;;
            *) if [ -f "fails.$count" ]; then cat "fails.$count" >&2; exit 1; fi; echo $((100 + count));;
        esac""",
    "squeue": """
        wanted=$(sed -n 's/.*--jobs=\\([0-9,]*\\).*/\\1/p' <<< "$*")
        if [ -z "$wanted" ]; then cat queue; else grep -E "^(${wanted//,/|})[|]" queue; fi
        true""",
    "scontrol": "echo 'Slurmctld(primary) at here is UP'; echo 'ClusterName             = here'",
    "scancel": ":",
}


class FakeSlurm:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name, lines in _COMMANDS.items():
            (folder / name).write_text(f'#!/bin/bash\ncd {folder}\nprintf "%s\\n" "{name} $*" >> calls\n{lines}\n')
            (folder / name).chmod(0o755)
        (folder / "count").write_text("0")
        self.holds()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def holds(self, *jobs: tuple[int, str, Path]) -> None:
        """Jobs with their state and directory."""
        rows = (f"{job}|{state}|0|None|n[1-2]|0:10|1:00:00|N/A|{directory}\n" for job, state, directory in jobs)
        (self.folder / "queue").write_text("".join(rows))

    def fails(self, number: int, words: str) -> None:
        """The call of sbatch of that number."""
        (self.folder / f"fails.{number}").write_text(f"sbatch: error: {words}\n")

    def refuses(self, words: str) -> None:
        (self.folder / "refuses").write_text(f"allocation failure: {words}\n")

    def calls(self, name: str) -> Sequence[str]:
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setattr(slurm_jobs, "_PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.delenv("EROLLOUT_PYTHON", raising=False)
    return FakeSlurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a configuration whose run saves."""
    write_config(tmp_path, checkpoint={"interval": 4})
    return tmp_path


def submit_tiny(folder: Path, *arguments: str, size: str = "--gpus-per-node=4") -> Outcome:
    """The run of that configuration."""
    return invoke("launch", "slurm", "--nodes=2", size, f"--config={folder}/config.yaml", *arguments)
