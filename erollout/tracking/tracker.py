"""Tracking of a run, as the trainer sees it.

Rank 0 writes everything to a local journal at once; a background thread delivers it to MLflow. Nothing after `start` waits for
the store or fails because of it, and a resumed run is the same MLflow run.

Steps repeated after a crash: the journal and the samples table hold only the last attempt's values. MLflow can't remove a point
and would show two at one step, so it keeps the first attempt's; unless something was changed in between, they differ only in
seconds. Files and plots of such a step are replaced.
"""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from erollout.config import Config, TrackingConfig
from erollout.environment import variable
from erollout.errors import UserError
from erollout.resilience.atomic_write import write_atomically
from erollout.security.redaction import redact
from erollout.tracking.address import store_uri, uri_source
from erollout.tracking.delivery import Delivery
from erollout.tracking.journal import Journal, journal_path
from erollout.tracking.parameters import run_parameters
from erollout.tracking.provenance import attempt_tags
from erollout.tracking.samples import SAMPLES_FILE, Row, encode_samples, read_samples
from erollout.tracking.store import MlflowStore
from erollout.tracking.system import SystemMonitor
from erollout.types import DatasetDescription

logger = logging.getLogger(__name__)

UNHEEDED = {
    "MLFLOW_EXPERIMENT_NAME": "tracking.experiment",
    "MLFLOW_EXPERIMENT_ID": "tracking.experiment",
    "MLFLOW_RUN_NAME": "tracking.run_name",
    "MLFLOW_RUN_ID": "train.output_dir to that run's directory, to resume it there",
}
"""Variables of MLflow that are ignored, and what to set instead."""
MARK = "erollout.mark"
"""Tag by which a new run is found whose id was lost."""

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
Resolved = Mapping[str, str | int | float]


class Tracker(Protocol):
    """Interface of the trackers, called alike on every rank."""

    def start(
        self, config: Config, resolved: Resolved, run_id: str | None, output_dir: str | Path, step: int | None = None
    ) -> str:
        """Start a run, or resume `run_id`. Returns the run id. Raises UserError if the store can't be used.

        `step`: the step of the checkpoint that it resumes from; records of later steps will be repeated. None: unknown.
        """

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step. In MLflow, a name that already has this or a later step keeps its earlier value."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]], split: str = "evaluation") -> None:
        """Log rows of the samples table: prompt, response, reward, finish_reason, ...; none: the table stays as it is."""

    def log_config_artifacts(self, config: Config, resolved: Resolved) -> None:
        """Log the complete configuration (loadable again) and what was resolved from it, as YAML files."""

    def log_figure(self, name: str, figure: Any) -> None:
        """Log a matplotlib figure as figures/<name>.png."""

    def log_dataset(self, dataset: DatasetDescription, split: str) -> None:
        """Log a dataset that the run reads, once."""

    def log_saved(self, step: int) -> None:
        """Log a saved checkpoint. Without any, an attempt after a crash starts from scratch, as the same run."""

    def finish(self, status: RunStatus, timeout_seconds: float = 30.0) -> None:
        """End the run. Waits up to timeout_seconds for the store and logs what it lacks."""


def create_tracker(rank: int) -> Tracker:
    """The tracker of a rank: rank 0 records, the others do nothing."""
    return JournalTracker() if rank == 0 else NullTracker()


class NullTracker:
    """Records nothing."""

    def start(
        self, config: Config, resolved: Resolved, run_id: str | None, output_dir: str | Path, step: int | None = None
    ) -> str:
        return run_id or ""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]], split: str = "evaluation") -> None:
        pass

    def log_config_artifacts(self, config: Config, resolved: Resolved) -> None:
        pass

    def log_figure(self, name: str, figure: Any) -> None:
        pass

    def log_dataset(self, dataset: DatasetDescription, split: str) -> None:
        pass

    def log_saved(self, step: int) -> None:
        pass

    def finish(self, status: RunStatus, timeout_seconds: float = 30.0) -> None:
        pass


class JournalTracker:
    """Records to the journal in <output_dir>/tracking and delivers to MLflow (with tracking.enabled=false: only records)."""

    def __init__(self) -> None:
        self._journal: Journal
        self._delivery: Delivery | None = None
        self._monitor: SystemMonitor | None = None
        self._store_name = ""
        self._abandoned: str | None = None
        self._last_step: dict[str, int] = {}
        self._lost = 0

    def start(
        self, config: Config, resolved: Resolved, run_id: str | None, output_dir: str | Path, step: int | None = None
    ) -> str:
        past = self._open_journal(output_dir, run_id)
        starts = [record for record in past if record["kind"] == "start"]
        if starts:
            run_id = starts[-1]["run_id"]  # differs from the checkpoint's if the store was changed after it
        attempt = len(starts) + 1
        uri = store_uri(config.tracking, output_dir)
        checkpoint = f"{config.checkpoint_directory}/step_{step:08d}" if step else None
        tags = attempt_tags(attempt, checkpoint)
        store = MlflowStore(uri, uri_source(config.tracking)) if config.tracking.enabled else None
        known = bool(run_id) and any(start["uri"] == redact(uri) for start in starts)
        identity = (
            self._resolve_run(store, config.tracking, run_id, Path(output_dir), tags, known)
            if store
            else run_id or uuid.uuid4().hex
        )
        self._say_unheeded()
        self._append("start", run_id=identity, uri=redact(uri) if store else "", attempt=attempt, step=step)
        if step is not None:
            self._forget_samples_after(step)
        if store and self._abandoned and store.has_run(self._abandoned):
            self._append("status", run_id=self._abandoned, status="KILLED")
        self._record_setup(config, resolved, tags, past, attempt)
        if store:
            self._start_delivery(store, identity)
        if config.tracking.system_metrics and config.tracking.enabled:
            self._monitor = SystemMonitor(self._log_system_metrics)
            self._monitor.start()
        return identity

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        fresh, repeated = {}, {}
        for name, value in values.items():
            if step > self._last_step.get(name, -1):
                self._last_step[name] = step
                fresh[name] = float(value)
            else:
                repeated[name] = float(value)
        self._append("metrics", step=step, values=fresh, **({"repeated": repeated} if repeated else {}))

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]], split: str = "evaluation") -> None:
        """Log rows; a repeated step replaces its rows of this split."""
        if not rows:
            return
        known = read_samples(self._directory / SAMPLES_FILE)
        others = [row for row in known if (row["step"], row.get("split") or "evaluation") != (step, split)]
        self._write_samples([*others, *({"step": step, "split": split, **row} for row in rows)])

    def log_config_artifacts(self, config: Config, resolved: Resolved) -> None:
        tree = json.loads(json.dumps(config.to_dict()))  # tuples become lists: plain YAML
        tree["tracking"]["uri"] = redact(config.tracking.uri) if config.tracking.uri else None
        for name, content in (("config.yaml", tree), ("resolved.yaml", dict(resolved))):
            if self._write(self._directory / name, yaml.safe_dump(content, sort_keys=False).encode()):
                self._append("artifact", file=name, folder="config")

    def log_figure(self, name: str, figure: Any) -> None:
        file = Path("figures") / f"{name}.png"
        try:
            (self._directory / file).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self._directory / file, dpi=120)
        except OSError as error:
            self._say_lost(error)
        else:
            self._append("artifact", file=str(file), folder="figures")

    def log_dataset(self, dataset: DatasetDescription, split: str) -> None:
        self._append("dataset", context=split, **asdict(dataset))

    def log_saved(self, step: int) -> None:
        self._append("saved", step=step)

    def finish(self, status: RunStatus, timeout_seconds: float = 30.0) -> None:
        if self._monitor:
            self._monitor.finish()
        self._append("status", status=status)
        if self._delivery:
            undelivered = self._delivery.finish(timeout_seconds)
            if undelivered:
                logger.warning(
                    "%d tracking records are not in %s yet; they are kept in %s and delivered when the run resumes",
                    undelivered,
                    self._store_name,
                    self._journal.path,
                )
            if self._delivery.rejected:
                logger.warning("%d tracking records were rejected by %s", self._delivery.rejected, self._store_name)
        if self._lost:
            logger.warning("%d tracking records could not be written to %s", self._lost, self._directory)
        self._journal.close()

    @property
    def _directory(self) -> Path:
        return self._journal.path.parent

    def _open_journal(self, output_dir: str | Path, run_id: str | None) -> list[dict[str, Any]]:
        """Open the journal and return its records. A journal of another run is moved aside together with its files."""
        path = journal_path(output_dir)
        try:
            self._journal = Journal(path)
            past = self._journal.records()
            names = [record["run_id"] for record in past if record["kind"] == "start"]
            if past and run_id not in names and not (run_id is None and _is_unsaved(past)):
                owner = names[-1] if names else None
                self._abandoned = owner if past[-1]["kind"] != "status" else None
                self._journal.close()
                aside = _free_name(path.parent.with_name(f"tracking-{owner or 'unknown'}"))
                path.parent.rename(aside)
                logger.info("the records of run %s in %s are now in %s", owner, output_dir, aside)
                self._journal, past = Journal(path), []
        except OSError as error:
            raise UserError(
                f"train.output_dir = {output_dir} can't be written ({error.strerror}); choose another directory"
            ) from error
        for record in past:
            if record["kind"] == "metrics":
                self._last_step.update({name: max(record["step"], self._last_step.get(name, -1)) for name in record["values"]})
        return past

    def _resolve_run(
        self,
        store: MlflowStore,
        options: TrackingConfig,
        run_id: str | None,
        output_dir: Path,
        tags: dict[str, str],
        known: bool,
    ) -> str:
        """The run to record to. A store that this run has used before (`known`) may be unavailable; a new one must answer."""
        try:
            store.check()
            if run_id and store.has_run(run_id):
                return run_id
        except UserError as error:
            if run_id and known:
                logger.warning("resuming run %s although its store does not answer: %s", run_id, error)
                return run_id
            raise
        if run_id:
            tags = {**tags, "erollout.resumed_from": run_id}
            logger.warning("%s has no run %s: a new run there gets everything the journal holds", store.name, run_id)
            self._journal.mark_delivered(0)
        return self._new_run(store, options, output_dir, tags)

    def _new_run(self, store: MlflowStore, options: TrackingConfig, output_dir: Path, tags: dict[str, str]) -> str:
        """Create a run. If the process is killed before its id is in the journal, the next attempt finds it by its mark."""
        marks = [record["mark"] for record in self._journal.records() if record["kind"] == "new"]
        if marks and (found := store.find_run(options.experiment, MARK, marks[-1])) is not None:
            return found
        mark = uuid.uuid4().hex
        self._append("new", mark=mark)
        artifacts = output_dir.absolute() / "mlartifacts"
        name = options.run_name or output_dir.resolve().name
        return store.create_run(options.experiment, name, artifacts, {**tags, MARK: mark})

    def _record_setup(
        self, config: Config, resolved: Resolved, tags: dict[str, str], past: list[dict[str, Any]], attempt: int
    ) -> None:
        """Log parameters once, because MLflow can't change them; changes by a later attempt become a tag of that attempt."""
        params = run_parameters(config, resolved)
        before: dict[str, str] = {}
        for record in past:
            if record["kind"] == "params":
                before |= record["values"] | record["changed"]
        changed = {name: value for name, value in params.items() if before.get(name, value) != value}
        fresh = {name: value for name, value in params.items() if name not in before}
        self._append("params", values=fresh, changed=changed)
        if "tracking.run_name" in changed and config.tracking.run_name:
            tags = {**tags, "mlflow.runName": config.tracking.run_name}
        if changed:
            tags = {**tags, f"erollout.changed_in_attempt_{attempt}": json.dumps(changed)}
        self._append("tags", values=tags)
        if attempt > 1:
            self._append("status", status="RUNNING")

    def _say_unheeded(self) -> None:
        """Warn of variables that MLflow's own functions would read and that are ignored here."""
        for name, key in UNHEEDED.items():
            if value := variable(name):
                logger.warning("%s = %s is ignored; set %s", name, value, key)

    def _start_delivery(self, store: MlflowStore, run_id: str) -> None:
        directory = self._directory
        self._store_name = store.name
        self._delivery = Delivery(self._journal, lambda records: store.send(run_id, records, directory), store.name)
        self._delivery.start()

    def _log_system_metrics(self, values: dict[str, float]) -> None:
        """Log system metrics with a step count of their own, as MLflow does, continued on resume."""
        step = 1 + max((last for name, last in list(self._last_step.items()) if name.startswith("system/")), default=-1)
        self.log_metrics(step, values)

    def _forget_samples_after(self, step: int) -> None:
        rows = read_samples(self._directory / SAMPLES_FILE)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            self._write_samples(kept)

    def _write_samples(self, rows: Sequence[Row]) -> None:
        if self._write(self._directory / SAMPLES_FILE, encode_samples(rows)):
            self._append("artifact", file=SAMPLES_FILE, folder="")
            self._append("tags", values={"mlflow.loggedArtifacts": json.dumps([{"path": SAMPLES_FILE, "type": "table"}])})

    def _append(self, kind: str, **fields: Any) -> None:
        """Append a record. A full disk loses records, which is logged once, but never ends the run."""
        try:
            self._journal.append(kind, **fields)
        except OSError as error:
            self._say_lost(error)

    def _write(self, path: Path, content: bytes) -> bool:
        """Replace a file atomically, because the delivery thread may be reading it."""
        try:
            write_atomically(path, content)
        except OSError as error:
            self._say_lost(error)
            return False
        return True

    def _say_lost(self, error: OSError) -> None:
        if not self._lost:
            logger.warning(
                "tracking records can't be written to %s (%s): they are lost", self._directory, error.strerror or error
            )
        self._lost += 1


def _is_unsaved(records: list[dict[str, Any]]) -> bool:
    """Whether the records are of an unfinished run without a checkpoint: the next attempt continues it from scratch."""
    ended = [record["status"] for record in records if record["kind"] == "status"]
    saved = any(record["kind"] == "saved" or (record["kind"] == "start" and record.get("step")) for record in records)
    return not saved and "FINISHED" not in ended


def _free_name(path: Path) -> Path:
    taken = 1
    candidate = path
    while candidate.exists():
        taken += 1
        candidate = path.with_name(f"{path.name}-{taken}")
    return candidate
