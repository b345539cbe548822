"""The MLflow store: opens it with bounded waits, and turns journal records into MLflow calls. Only this module imports mlflow.

All calls are idempotent: MLflow's stores keep one point per (name, step, time, value), one value per
parameter and tag, one input per dataset digest, one file per artifact path.
"""

import hashlib
import json
import os
import re
import socket
import tempfile
import time
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil

from erollout.environment import set_default
from erollout.errors import UserError, foreign_code
from erollout.security.redaction import redact
from erollout.tracking.delivery import METRICS_PER_BATCH, RefusedForNow, RejectedError

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; MLflow waits 120 by default
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow retries for minutes; the delivery has its own, patient, loop
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # MLflow sets its loggers up when imported, after ours
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training cluster reports nothing to third parties
}
CONNECT_SECONDS = (3.0, 5.0)
"""Time limits at the start of a run for connecting to the server and for its answer."""
PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}
"""MLflow error codes for which retrying is useless."""
OF_STORAGE = re.compile(r"\((\w+\.)+(DatabaseError|OperationalError|InternalError|InterfaceError)\)")
"""Errors of the database itself, not of a record, whatever code MLflow gives them: a damaged file may be restored."""
FORBIDDEN_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-. :/]")
_MAKING_SECONDS = 3600
"""More than the time needed to create a SQLite file."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""What makes MLflow open an experiment in its view of training runs."""
LONGEST_VALUE = 5000
"""Longest parameter or tag in characters; MLflow's limits are 6000 and 8000."""


class MlflowStore:
    """The tracking store at a URI."""

    def __init__(self, uri: str, source: str = "tracking.uri") -> None:
        """`source`: name of the key or variable that sets the URI, for messages."""
        for name, value in MLFLOW_ENVIRONMENT.items():
            set_default(name, value)
        if uri.startswith("sqlite"):
            set_default(
                "MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool"
            )  # an open connection would outlive the restoring of the file
        self.uri = uri
        self.name = redact(uri)
        self.source = source

    def check(self) -> None:
        """Raise UserError, within seconds, unless the store answers."""
        if self.uri.startswith(("http://", "https://")):
            self._check_server()
        with foreign_code(self._unusable):  # drivers and network stacks raise anything
            _make_database(self.uri)
            self._client().search_experiments(max_results=1)
            _remove_misnamed(self.uri)

    def has_run(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client().get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return False
            raise self._unusable(error) from error

    def find_run(self, experiment: str, tag: str, value: str) -> str | None:
        """The id of a run with that tag; None: there is none."""
        from mlflow.exceptions import MlflowException

        try:
            known = self._client().get_experiment_by_name(experiment)
            query = f"tags.`{tag}` = '{value}'"
            found = self._client().search_runs([known.experiment_id], query, max_results=1) if known else []
        except MlflowException as error:
            raise self._unusable(error) from error
        return found[0].info.run_id if found else None

    def create_run(self, experiment: str, run_name: str | None, artifacts: Path, tags: dict[str, str]) -> str:
        """Create a run, return its id. `artifacts`: directory for files if no server stores them and the experiment is new."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client().get_experiment_by_name(experiment)
            if found and found.lifecycle_stage != "active":
                raise UserError(
                    f"tracking.experiment = {experiment!r} is deleted in {self.name}; restore it or choose another name"
                )
            location = None if self.uri.startswith(("http", "databricks")) else artifacts.as_uri()
            identifier = (
                found.experiment_id
                if found
                else self._client().create_experiment(experiment, artifact_location=location, tags=EXPERIMENT_TAGS)
            )
            return self._client().create_run(identifier, tags=tags, run_name=run_name).info.run_id
        except MlflowException as error:
            raise self._unusable(error) from error

    def send(self, run_id: str, records: list[dict[str, Any]], directory: Path) -> None:
        """Send journal records: several of metrics, or one of another kind. `directory` holds the files that they name.

        Raises RejectedError for records rejected for good, RefusedForNow for those that fail while others are accepted, and
        MLflow's or the driver's own errors otherwise.
        """
        from mlflow.exceptions import MlflowException

        try:
            if records[0]["kind"] == "metrics":
                self._send_metrics(run_id, records)
            else:
                self._send_one(run_id, records[0], directory)
        except MlflowException as error:
            if OF_STORAGE.search(str(error)):
                self._raise_if_others_are_taken(run_id, records[0], error)
                raise
            if error.error_code in PERMANENT or self._fails_alone(run_id, records[0]):
                raise RejectedError(str(error)) from error
            raise
        except Exception as error:  # an artifact store's client raises anything
            if self._fails_alone(run_id, records[0]):
                raise RejectedError(str(error)) from error
            self._raise_if_others_are_taken(run_id, records[0], error)
            raise

    def _raise_if_others_are_taken(self, run_id: str, record: dict[str, Any], error: Exception) -> None:
        """Raise RefusedForNow if a record fails because of its content or of one damaged table. The order of states matters."""
        if record["kind"] != "status":
            try:
                self._client().set_tag(run_id, "erollout.delivery", str(int(time.time())))
            except Exception:  # as above
                return
            raise RefusedForNow(str(error)) from error

    def _fails_alone(self, run_id: str, record: dict[str, Any]) -> bool:
        """Whether a file or dataset failed although the store answers.

        Missing credentials of an artifact store, or a server too old for datasets, must not block later metrics.
        """
        return record["kind"] in {"artifact", "dataset"} and self._client().get_run(run_id) is not None

    def _send_metrics(self, run_id: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(FORBIDDEN_IN_NAMES.sub("_", name), float(value), record["time"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        for first in range(0, len(metrics), METRICS_PER_BATCH):
            self._client().log_batch(run_id, metrics=metrics[first : first + METRICS_PER_BATCH])

    def _send_one(self, run_id: str, record: dict[str, Any], directory: Path) -> None:
        from mlflow.entities import Param, RunTag

        match record["kind"]:
            case "params":
                params = [Param(_name(name), str(value)[:LONGEST_VALUE]) for name, value in record["values"].items()]
                for first in range(0, len(params), 100):  # MLflow's limit per call
                    self._client().log_batch(run_id, params=params[first : first + 100])
            case "tags":
                tags = [RunTag(_name(name), str(value)[:LONGEST_VALUE]) for name, value in record["values"].items()]
                self._client().log_batch(run_id, tags=tags)
            case "artifact":
                self._client().log_artifact(run_id, str(directory / record["file"]), record["folder"] or None)
            case "dataset":
                self._send_dataset(run_id, record)
            case "status":
                self._send_status(record.get("run_id", run_id), record)

    def _send_dataset(self, run_id: str, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:36],  # MLflow's limit
            source_type="local" if os.path.exists(record["source"]) else "generated",
            source=json.dumps({"uri": record["source"]}),
            schema=json.dumps({"mlflow_colspec": _columns(record.get("columns", {}))}),
            profile=json.dumps({"num_rows": record["rows"]}) if "rows" in record else None,
        )
        self._client().log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])])

    def _send_status(self, run_id: str, record: dict[str, Any]) -> None:
        if record["status"] == "RUNNING":
            self._client().update_run(run_id, status="RUNNING")
        else:
            self._client().set_terminated(run_id, status=record["status"], end_time=record["time"])

    def _client(self) -> Any:
        """An mlflow.MlflowClient. Constructing one opens the store, which MLflow caches."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def _check_server(self) -> None:
        """Check the server by a plain request, whose time limit does not depend on MLflow's settings."""
        import requests

        try:
            requests.get(self.uri.rstrip("/") + "/health", timeout=CONNECT_SECONDS)
        except requests.exceptions.SSLError:
            return  # MLflow has its own settings for certificates, so its own call decides
        except requests.RequestException as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        reason = redact(" ".join(str(error).split()))[:200]
        return UserError(
            f"{self.source} = {self.name} can't be used ({type(error).__name__}: {reason}); start the server "
            "there, correct the URI, leave it out for a SQLite file in train.output_dir, or set tracking.enabled = false"
        )


def _make_database(uri: str) -> None:
    """Create a SQLite file under a temporary name: MLflow can't use one whose creation was interrupted."""
    if not uri.startswith("sqlite"):
        return
    from mlflow import MlflowClient
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    path = Path(url.database or ":memory:")
    if str(path) == ":memory:" or not path.parent.is_dir():
        return
    _remove_half_made(path)
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    made = url.set(database=str(partial)).render_as_string(hide_password=False)
    MlflowClient(tracking_uri=made).search_experiments(max_results=1)
    with suppress(FileExistsError):  # another process was faster
        os.link(partial, path)
    _remove_misnamed(made)
    partial.unlink()
    lock = hashlib.md5(
        made.encode(), usedforsecurity=False
    ).hexdigest()  # an engine of MLflow's, for a database that no longer exists
    Path(tempfile.gettempdir(), f"db_init_lock-{lock}").unlink(missing_ok=True)


def _remove_misnamed(uri: str) -> None:
    """Remove the directory that MLflow creates by the quoted name of a SQLite file's directory."""
    if not uri.startswith("sqlite:///"):
        return
    quoted = Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent
    for made in (quoted, *quoted.parents):
        if unquote(str(made)) == str(made):
            return
        with suppress(OSError):  # not empty: it is the user's
            made.rmdir()


def _remove_half_made(path: Path) -> None:
    """Remove files left by killed processes: on this host, of processes that are gone; on others, old ones."""
    for left in path.parent.glob(f"{escape(path.name)}.*.partial*"):
        host, _, pid = left.name.removeprefix(f"{path.name}.").partition(".partial")[0].rpartition(".")
        with suppress(OSError):  # another process removes it too
            is_here = host == socket.gethostname() and pid.isdigit()
            if not psutil.pid_exists(int(pid)) if is_here else time.time() - left.stat().st_mtime > _MAKING_SECONDS:
                left.unlink()


def _columns(columns: dict[str, str]) -> list[dict[str, object]]:
    """Columns as MLflow's schema; nested values count as text, which is how a table shows them."""
    plain = ("string", "long", "double", "boolean")
    return [{"name": name, "type": kind if kind in plain else "string", "required": True} for name, kind in columns.items()]


def _name(name: str) -> str:
    return FORBIDDEN_IN_NAMES.sub("_", name)[:250]
