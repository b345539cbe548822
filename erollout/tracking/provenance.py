"""Provenance of a run: source revision, version, host and attempts."""

import getpass
import json
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import erollout
from erollout.environment import job_name
from erollout.security.redaction import redact

NOTE = "source.json"
"""File in a copied package with its commit: an object of `commit` and `dirty`."""


def attempt_tags(attempt: int, checkpoint: str | None) -> dict[str, str]:
    """MLflow tags of an attempt, counted from 1: the newest attempt's source, and one JSON tag per attempt.

    `checkpoint`: the one that it resumes from.
    """
    source = source_tags()
    facts = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": source["erollout.host"],
        "job": job_name(),
        "commit": source.get("mlflow.source.git.commit"),
        "checkpoint": checkpoint,
    }
    known = {name: value for name, value in facts.items() if value is not None}
    return {**source, "erollout.attempt": str(attempt), f"erollout.attempt_{attempt}": json.dumps(known)}


def source_tags() -> dict[str, str]:
    """MLflow tags of the program: version, host, and the commit of its checkout, if it is in one or a copy of one."""
    tags = {
        "erollout.version": erollout.__version__,
        "erollout.host": socket.gethostname(),
        "mlflow.source.name": "erollout " + redact(shlex.join(sys.argv[1:])),
        "mlflow.source.type": "JOB" if job_name() else "LOCAL",
    }
    with suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    commit, dirty = checkout(Path(erollout.__file__).parent)
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["erollout.git_dirty"] = tags["mlflow.source.git.dirty"] = str(dirty).lower()
    return tags


def checkout(folder: Path) -> tuple[str, bool]:
    """Commit of a package's directory (empty: unknown), and whether its files differ from it."""
    note = folder / NOTE
    if note.is_file():
        noted = json.loads(note.read_text())
        return noted["commit"], noted["dirty"]
    commit = _git("-C", str(folder), "rev-parse", "HEAD")
    return commit, bool(commit and _git("-C", str(folder), "status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    """Output of git; empty without git, checkout, or answer in time."""
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
