"""What a run's journal tells: configuration, metrics by step, attempts, samples. Only read, so the run may be going on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from erollout.errors import UserError
from erollout.tracking.journal import history_of, journal_of, load_records
from erollout.tracking.parameters import model_name, run_name
from erollout.tracking.samples import SAMPLES_FILE, Row, read_samples

History = Sequence[Mapping[str, float]]


@dataclass(slots=True)
class RecordedAttempt:
    """One start of a run."""

    number: int
    began: float
    """Time of the start, in seconds since 1970."""
    resumed_from: int | None
    """Step of the checkpoint that it resumed from; None: unknown."""
    last: float = 0.0
    """Time of its last record."""
    reached: int | None = None
    """Its last complete step; None: none."""
    saved: list[int] = field(default_factory=list)
    """Steps of its checkpoints."""
    status: str = ""
    """How it ended; empty: that is not recorded."""
    changed: dict[str, str] = field(default_factory=dict)
    """Keys that it changed, with their new values."""


@dataclass(frozen=True)
class RecordedRun:
    """A run, by its journal. Built by `read_run`."""

    path: Path
    """Its train.output_dir."""
    name: str
    records: Sequence[Mapping[str, Any]]

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Every key of the configuration and `resolved.*`, as the newest attempt has them."""
        found: dict[str, str] = {}
        for record in self.records:
            if record["kind"] == "params":
                found |= {name: str(value) for name, value in (record["values"] | record["changed"]).items()}
        return found

    @cached_property
    def history(self) -> History:
        """One mapping per step, as `read_metrics`."""
        return history_of(self.records)

    @cached_property
    def attempts(self) -> list[RecordedAttempt]:
        """Attempts, oldest first."""
        found: list[RecordedAttempt] = []
        for record in self.records:
            seconds = record["time"] / 1000
            if record["kind"] == "start":
                found.append(RecordedAttempt(len(found) + 1, seconds, record.get("step"), seconds))
            elif found:
                found[-1].last = seconds
                _add(record, found[-1])
        return found

    @property
    def step(self) -> int:
        """The last complete step; 0: none."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def model(self) -> str:
        """Its model in a few words: directory or architecture, and number of parameters."""
        return model_name(self.parameters)

    def samples(self) -> list[Row]:
        """Rows of its samples table."""
        return read_samples(self.path / "tracking" / SAMPLES_FILE)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps at which a metric was tracked, and its values."""
        rows = [(row["step"], row[name]) for row in self.history if name in row]
        return [step for step, _ in rows], [value for _, value in rows]

    def has(self, name: str) -> bool:
        return any(name in row for row in self.history)


def read_run(run: str | Path) -> RecordedRun:
    """The run in a directory (or of a journal). Raises UserError if there is none."""
    journal, path = journal_of(run), Path(run).expanduser()
    records = load_records(journal)
    directory = path if path.is_dir() else journal.absolute().parent.parent
    found = RecordedRun(directory, directory.absolute().name, records)
    return RecordedRun(directory, run_name(found.parameters, directory), records)


def read_runs(runs: Sequence[str | Path]) -> list[RecordedRun]:
    """Runs with names that differ: where two have the same, their paths. Raises UserError."""
    found = [read_run(run) for run in dict.fromkeys(map(str, runs))]
    names = [run.name for run in found]
    return [RecordedRun(run.path, str(run.path) if names.count(run.name) > 1 else run.name, run.records) for run in found]


def require_common_metric(runs: Sequence[RecordedRun]) -> None:
    """Raise UserError for runs without metrics, and for several that have none in common."""
    for run in runs:
        if not run.history:
            raise UserError(f"{run.path} has no metrics yet, because no step is complete; wait for the first one")
    names = [{name for row in run.history for name in row} - {"step"} for run in runs]
    if not set.intersection(*names):
        paths = ", ".join(str(run.path) for run in runs)
        raise UserError(f"{paths} have no metric in common, so there is nothing to compare; give each a command of its own")


def _add(record: Mapping[str, Any], attempt: RecordedAttempt) -> None:
    match record["kind"]:
        case "metrics":
            if any(not name.startswith("system/") for name in (*record["values"], *record.get("repeated", ()))):
                attempt.reached = max(record["step"], attempt.reached or 0)
        case "saved":
            attempt.saved.append(record["step"])
        case "params":
            attempt.changed |= {name: str(value) for name, value in record["changed"].items()}
        case "status":
            if record["status"] != "RUNNING" and "run_id" not in record:  # with an id it is another run's
                attempt.status = record["status"].lower()
