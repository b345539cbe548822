"""Names of the Hugging Face Hub in place of directories: how to fetch what they name. Nothing is fetched here. Pure."""

import re
from pathlib import Path

_ORGANISATIONS = {"Qwen": "Qwen", "Llama-": "meta-llama", "Meta-Llama-": "meta-llama", "SmolLM": "HuggingFaceTB"}
"""Organisations on the hub, by the beginning of a model's name."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDERS = ("models", "runs", "checkpoints", "data", "weights", "tmp")
"""First parts of a path that are no organisation's name."""


def fetch_line(key: str, path: str) -> str | None:
    """The command that fetches what a missing directory is named after, and the setting that goes with it; None: no idea."""
    name, parent = Path(path).name, Path(path).parent.name
    organisation = next((found for start, found in _ORGANISATIONS.items() if name.startswith(start)), None)
    is_repository = _REPOSITORY.fullmatch(path) is not None and not Path(parent).is_dir() and parent not in _FOLDERS
    if is_repository:
        return f"fetch it with `hf download {path} --local-dir models/{name}` and set {key}=models/{name}"
    if organisation is None:
        return None
    return f"fetch it with `hf download {organisation}/{name} --local-dir {path}`"
