"""The URI of a run's MLflow store. Light: does not load MLflow."""

import re
from pathlib import Path
from urllib.parse import quote

from erollout.config import TrackingConfig
from erollout.environment import variable

VARIABLE = "MLFLOW_TRACKING_URI"


def store_uri(options: TrackingConfig, output_dir: str | Path) -> str:
    """The URI in the configuration, else in the user's environment, else a SQLite file in the run's directory."""
    return options.uri or variable(VARIABLE) or sqlite_uri(Path(output_dir).absolute() / "mlflow.db")


def has_own_store(options: TrackingConfig) -> bool:
    """Whether the store is the file in the run's directory, used by this run alone."""
    return not (options.uri or variable(VARIABLE))


def uri_source(options: TrackingConfig) -> str:
    """Name of the key or variable that sets the store's URI."""
    return "tracking.uri" if options.uri or not variable(VARIABLE) else VARIABLE


def sqlite_uri(path: Path) -> str:
    """SQLite URI of any path, with characters quoted that have a meaning in a URI."""
    return f"sqlite:///{quote_path(str(path))}"


def quote_path(path: str) -> str:
    """Quote only what must be: MLflow shows the quoted text and derives directory names from it."""
    return re.sub(r"[%?\n\r]", lambda found: quote(found[0]), path)
