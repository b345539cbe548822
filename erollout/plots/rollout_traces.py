"""Plots from the decision traces that a run leaves: occupancy, one replica's decisions, the toggle's boundary."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from erollout.plots.decision_timeline import decisions
from erollout.plots.replica_timeline import Lane, occupancy
from erollout.plots.style import shortened
from erollout.plots.toggle_boundary import boundary
from erollout.plots.training_curves import NoData, subject
from erollout.speculation.trace import DecisionTrace
from erollout.tracking.recorded_run import RecordedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 200
"""Number of spans of a rollout's time."""
MOST_FILES = 64
"""Number of traces, the newest ones, that the boundary is drawn from."""
_FILE = re.compile(r"step_(\d+)\.replica_(\d+)\.csv\.gz")


def trace_files(run: Path) -> dict[int, dict[int, Path]]:
    """Trace files of a run by step, counted from 1 and ascending, and replica."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted((run / "decisions").glob("step_*.replica_*.csv.gz")):
        if match := _FILE.fullmatch(path.name):
            found.setdefault(int(match[1]) + 1, {})[int(match[2])] = path
    return dict(sorted(found.items()))


def rollout_occupancy(run: RecordedRun, step: int | None = None) -> "Figure":
    """The decoding sequences of every replica in a step's rollout (default: the newest), with draft lengths as colour."""
    step, files = _files_of_step(run, step)
    traces = {replica: DecisionTrace.read(path) for replica, path in files.items()}
    seconds = max(_end(trace) for trace in traces.values())
    lanes = [Lane(f"replica {replica}", seconds, trace.binned(BINS, seconds)) for replica, trace in traces.items() if seconds]
    return occupancy(lanes, title=f"Rollout: {subject([run], step)}")


def replica_decisions(run: RecordedRun, step: int | None = None, replica: int = 0) -> "Figure":
    """The decisions of one replica in a step's rollout (default: the newest)."""
    step, files = _files_of_step(run, step)
    if replica not in files:
        raise NoData(f"--replica = {replica}: {run.path} has no trace of it in step {step}; there are {_listed(files)}")
    return decisions(DecisionTrace.read(files[replica]), title=f"Decisions of replica {replica}: {subject([run], step)}")


def toggle_boundary(run: RecordedRun, step: int | None = None) -> "Figure":
    """What a token took at each batch size, off and with drafts, and what the toggle chose: over the newest traces."""
    files = trace_files(run.path)
    if step is not None:
        step, _ = _files_of_step(run, step)
    kept = [(at, path) for at in files if at == (step or at) for path in files[at].values()][-MOST_FILES:]
    traces = [DecisionTrace.read(path) for _, path in kept]
    if not any(arm.speculates for trace in traces for arm in trace.arms):
        raise NoData(f"{run.path}: no toggle: {'no step speculated or could have' if traces else _why_no_traces(run)}")
    first, last = kept[0][0], kept[-1][0]
    steps = f"step {last}" if first == last else f"steps {first} to {last}"
    return boundary(traces, f"Where drafts pay: {shortened(run.name)}, {run.model}, {steps}")


def _files_of_step(run: RecordedRun, step: int | None) -> tuple[int, dict[int, Path]]:
    files = trace_files(run.path)
    if not files:
        raise NoData(f"{run.path}: no traces of rollouts: {_why_no_traces(run)}")
    step = max(files) if step is None else step
    if step not in files:
        raise NoData(f"--step = {step}: {run.path} has no trace of it; there are {_listed(files)}")
    return step, files[step]


def _why_no_traces(run: RecordedRun) -> str:
    if run.parameters.get("speculation.mode") == "off":
        return "speculation.mode is off"
    if run.parameters.get("speculation.trace_interval") == "0":
        return "speculation.trace_interval is 0"
    return "no rollout of training is complete, or its decisions/ is gone"


def _listed(numbers: Iterable[int]) -> str:
    shown = sorted(numbers)
    return ", ".join(map(str, shown)) if len(shown) <= 8 else f"{shown[0]} to {shown[-1]}"


def _end(trace: DecisionTrace) -> float:
    """Seconds from the start of the rollout to the end of its last step."""
    return trace.columns["start"][-1] + trace.columns["seconds"][-1] if len(trace) else 0.0
