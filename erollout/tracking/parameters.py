"""The parameters of a run as MLflow takes them: dotted names, text values."""

from collections.abc import Mapping
from typing import Any

from erollout.config import Config
from erollout.security.redaction import redact


def run_parameters(config: Config, resolved: Mapping[str, str | int | float]) -> dict[str, str]:
    """The whole configuration, and what was resolved from it as `resolved.…`, without credentials."""
    parameters = {**flatten(config.to_dict()), **{f"resolved.{name}": str(value) for name, value in resolved.items()}}
    if config.tracking.uri:
        parameters["tracking.uri"] = redact(config.tracking.uri)
    return parameters


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names with string values."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat
