"""A run on a Ray cluster: what it needs, what each node executes, and whether it is started again. Knows nothing of Ray."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from erollout.checkpoint.manifest import MANIFEST, complete_checkpoints
from erollout.environment import variable
from erollout.launch.run_directory import RunDirectory

STOPPED, LATER = 128 + signal.SIGTERM, 75
"""Exit statuses of a run that is not done: stopped for good, saved for a later start (sysexits.h: try again)."""


@dataclass(frozen=True, slots=True)
class RayJob:
    """What is to run, and where."""

    name: str
    nodes: int
    ranks: int
    """On each node."""
    cpus: int
    """For each rank."""
    gpus: int | None
    """For each rank; None: one where the cluster has GPUs."""
    wait_seconds: int
    """For nodes to be free, and for ranks to meet."""
    max_restarts: int
    folder: str
    """Where the command was given, and runs on every node."""
    checks: bool
    """Whether nodes are looked at before ranks start there."""
    interface: str | None
    run: tuple[str, ...]
    """Configuration file and overrides."""
    directory: RunDirectory
    checkpoints: Path

    def bundle(self, gpus: int) -> dict[str, float]:
        """What one node must have free."""
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
        """The command that looks at a node; empty: none."""
        return ["doctor", "--node", "--gpus", str(self.ranks * gpus), *self.run] if self.checks else []

    def newest_checkpoint(self) -> str | None:
        """Name of the newest complete one."""
        found = complete_checkpoints(self.checkpoints)
        return found[-1].name if found else None

    def saved(self) -> tuple[str, int] | None:
        """The newest checkpoint and when it was made: a run that fell back to an older one makes the same ones again."""
        found = complete_checkpoints(self.checkpoints)
        return (found[-1].name, (found[-1] / MANIFEST).stat().st_mtime_ns) if found else None

    def logs(self, attempt: int) -> Path:
        return self.directory.path / "logs" / f"{self.name}.{attempt}"


def rank_variables(cluster: str) -> dict[str, str]:
    """Environment of agents and ranks, on top of what `ray start` had on their node: Ray would set threads to the CPUs."""
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
    """Of a crash, in words."""
    node_died: bool
    saved: bool
    """It left a checkpoint newer than the one that it began with."""


def decide(ended: Ended, asked: str | None, restarts_left: int) -> tuple[int | None, str]:
    """Exit status, None to start again; and why.

    A crash that got nowhere would happen again, so it ends the run; a node that dies has nothing to do with the run. What was
    asked to stop (`asked`: the signal's name) is not revived: whoever asked may be about to take the machines away.
    """
    if ended.verdict == "done":
        return 0, "done"
    if ended.verdict == "stopped":
        return STOPPED, "stopped; the same command goes on from the newest checkpoint"
    saved_for_later = ended.verdict == "requeue"
    if asked is not None:
        return (LATER, "saved; the same command goes on") if saved_for_later else (1, f"{ended.reason}, after {asked}")
    reason = "the run asks to be started again" if saved_for_later else ended.reason
    if not (saved_for_later or ended.node_died or ended.saved):
        return 1, f"{reason}, and no checkpoint is newer than when it started: it would fail again"
    if not restarts_left:
        return LATER if saved_for_later else 1, f"{reason}; no restart is left of --max-restarts"
    return None, reason
