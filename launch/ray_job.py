"""A run on a Ray cluster: its resources, each node's command, and the decision to restart it. Independent of Ray."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from erollout.checkpoint.manifest import MANIFEST, complete_checkpoints
from erollout.environment import variable
from erollout.launch.run_directory import RunDirectory

STOPPED, LATER = 128 + signal.SIGTERM, 75
"""Exit statuses of a run that is not done: stopped for good, and saved for a later start (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True, slots=True)
class RayJob:
    """Resources and commands of a run."""

    name: str
    nodes: int
    ranks: int
    """Ranks per node."""
    cpus: int
    """CPUs per rank."""
    gpus: int | None
    """GPUs per rank; None: one if the cluster has GPUs."""
    wait_seconds: int
    """Seconds to wait for free nodes, and for the rendezvous."""
    max_restarts: int
    folder: str
    """Working directory of the command, here and on every node."""
    checks: bool
    """Whether nodes are checked before ranks start there."""
    interface: str | None
    run: tuple[str, ...]
    """Configuration file and overrides."""
    directory: RunDirectory
    checkpoints: Path

    def bundle(self, gpus: int) -> dict[str, float]:
        """Resources that one node must have free."""
        wanted = {"CPU": float(self.ranks * self.cpus), "GPU": float(self.ranks * gpus)}
        return {name: number for name, number in wanted.items() if number}

    def launcher(self, attempt: int, head: str) -> list[str]:
        """The command on each node, without the interpreter. head: HOST:PORT."""
        options = ["--nodes", str(self.nodes), "--nproc-per-node", str(self.ranks), "--head", head]
        options += ["--run-id", f"{self.name}.{attempt}", "--wait", str(self.wait_seconds)]
        options += ["--log-dir", str(self.logs(attempt) / "ranks")]
        options += [] if self.interface is None else ["--interface", self.interface]
        return ["launch", "torchrun", *options, *self.run]

    def node_check(self, gpus: int) -> list[str]:
        """The command that checks a node; empty: none."""
        return ["doctor", "--node", "--gpus", str(self.ranks * gpus), *self.run] if self.checks else []

    def newest_checkpoint(self) -> str | None:
        """Name of the newest complete checkpoint."""
        found = complete_checkpoints(self.checkpoints)
        return found[-1].name if found else None

    def saved(self) -> tuple[str, int] | None:
        """The newest checkpoint and its time: a run that fell back on an older one saves the same names again."""
        found = complete_checkpoints(self.checkpoints)
        return (found[-1].name, (found[-1] / MANIFEST).stat().st_mtime_ns) if found else None

    def logs(self, attempt: int) -> Path:
        return self.directory.path / "logs" / f"{self.name}.{attempt}"


def rank_variables(cluster: str) -> dict[str, str]:
    """Environment of agents and ranks, on top of that of `ray start` on their node: Ray would set threads to the CPUs."""
    return {
        "OMP_NUM_THREADS": variable("OMP_NUM_THREADS") or "1",
        "PYTHONHASHSEED": variable("PYTHONHASHSEED") or "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_ADDRESS": cluster,
    }


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended."""

    verdict: str | None
    """done, requeue, stopped; None: it crashed."""
    reason: str
    """Reason of a crash."""
    node_died: bool
    saved: bool
    """Whether it left a newer checkpoint than it started from."""


def decide(ended: Ended, asked: str | None, restarts_left: int) -> tuple[int | None, str]:
    """Exit status (None: restart), and the reason.

    A crash without progress would happen again, so it ends the run, unless a node died, which is not the run's fault. After a
    stop request (`asked`: the signal's name) the run is not restarted, because the machines may be about to be taken away.
    """
    if ended.verdict == "done":
        return 0, "done"
    if ended.verdict == "stopped":
        return STOPPED, "stopped; run the same command to resume from the newest checkpoint"
    saved_for_later = ended.verdict == "requeue"
    if asked is not None:
        return (LATER, "saved; run the same command to resume") if saved_for_later else (1, f"{ended.reason}, after {asked}")
    reason = "the run requests a restart" if saved_for_later else ended.reason
    if not (saved_for_later or ended.node_died or ended.saved):
        return 1, f"{reason}, without a new checkpoint since the start: it would fail again"
    if not restarts_left:
        return LATER if saved_for_later else 1, f"{reason}; --max-restarts is reached"
    return None, reason
