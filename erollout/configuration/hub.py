"""Hints for names of the Hugging Face Hub given in place of directories. Fetches nothing. Pure."""

import re
from pathlib import Path

_ORGANISATIONS = {"Qwen": "Qwen", "Llama-": "meta-llama", "Meta-Llama-": "meta-llama", "SmolLM": "HuggingFaceTB"}
"""Organisations on the hub by prefix of a model's name."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDERS = ("models", "runs", "checkpoints", "data", "weights", "tmp")
"""First parts of a path that are not an organisation's name."""


def fetch_line(key: str, path: str) -> str | None:
    """The command that fetches the model that a missing directory is named after, with the setting to use; None: unknown."""
    name, parent = Path(path).name, Path(path).parent.name
    organisation = next((found for start, found in _ORGANISATIONS.items() if name.startswith(start)), None)
    is_repository = _REPOSITORY.fullmatch(path) is not None and not Path(parent).is_dir() and parent not in _FOLDERS
    if is_repository:
        return f"fetch it with `hf download {path} --local-dir models/{name}` and set {key}=models/{name}"
    if organisation is None:
        return None
    return f"fetch it with `hf download {organisation}/{name} --local-dir {path}`"
