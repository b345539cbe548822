"""Where a run is tracked: the URI of its MLflow store. Light: it loads no MLflow."""

import re
from pathlib import Path
from urllib.parse import quote

from erollout.config import TrackingConfig
from erollout.environment import variable

VARIABLE = "MLFLOW_TRACKING_URI"


def store_uri(options: TrackingConfig, output_dir: str | Path) -> str:
    """What the configuration names, else the user's environment, else a SQLite file in the run's directory."""
    return options.uri or variable(VARIABLE) or sqlite_uri(Path(output_dir).absolute() / "mlflow.db")


def has_own_store(options: TrackingConfig) -> bool:
    """Whether the store is the file in the run's directory, which no one else uses."""
    return not (options.uri or variable(VARIABLE))


def uri_source(options: TrackingConfig) -> str:
    """The name of the key or variable that the store's URI is from."""
    return "tracking.uri" if options.uri or not variable(VARIABLE) else VARIABLE


def sqlite_uri(path: Path) -> str:
    """Of any path: a `?` in it would begin options, `%20` stand for a blank, and a URI is one line."""
    return f"sqlite:///{quote_path(str(path))}"


def quote_path(path: str) -> str:
    """No more than must be: what MLflow shows can be read, and it takes the names of directories from the quoted text."""
    return re.sub(r"[%?\n\r]", lambda found: quote(found[0]), path)
