"""Where a run comes from: source revision, version, host."""

import socket
import subprocess

import erollout


def source_tags() -> dict[str, str]:
    """MLflow tags of the program: version, host, and the commit of the working directory if it is a git checkout."""
    tags = {"erollout.version": erollout.__version__, "erollout.host": socket.gethostname()}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["erollout.git_dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def _git(*arguments: str) -> str:
    """What git prints; empty where there is no git, no checkout, or no answer in time."""
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
