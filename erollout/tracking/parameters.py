"""The parameters of a run as MLflow takes them: dotted names, text values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erollout.config import Config
from erollout.security.redaction import redact

NO_VALUE = "None"
"""Text of a key without a value."""


def run_parameters(config: Config, resolved: Mapping[str, str | int | float]) -> dict[str, str]:
    """The whole configuration, and what was resolved from it as `resolved.…`, without credentials."""
    parameters = {**flatten(config.to_dict()), **{f"resolved.{name}": str(value) for name, value in resolved.items()}}
    if config.tracking.uri:
        parameters["tracking.uri"] = redact(config.tracking.uri)
    return parameters


def config_subject(config: Config) -> str:
    """Run and model of a configuration, for titles."""
    parameters = flatten(config.to_dict())
    return f"{run_name(parameters, config.train.output_dir)}, {model_name(parameters)}"


def run_name(parameters: Mapping[str, str], directory: str | Path) -> str:
    """tracking.run_name, else the name of the directory."""
    named = parameters.get("tracking.run_name", NO_VALUE)
    return named if named != NO_VALUE else Path(directory).absolute().name


def model_name(parameters: Mapping[str, str]) -> str:
    """A model in a few words: its directory or architecture, and its number of parameters if that was resolved."""
    path = parameters.get("model.path", NO_VALUE)
    name = Path(path).name if path != NO_VALUE else parameters.get("model.architecture.model_type", "unnamed model")
    count = parameters.get("resolved.parameters", "")
    return f"{name} ({_short(int(count))} parameters)" if count.isdigit() else name


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names with string values."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _short(count: int) -> str:
    """1234567 as 1.23M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
