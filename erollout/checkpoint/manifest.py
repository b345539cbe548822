"""Which checkpoints are complete: a manifest lists every file with its size and is written last. Pure file handling."""

import json
import os
from pathlib import Path

from erollout.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"


def write_manifest(directory: Path) -> None:
    """List all files of a finished checkpoint, flushed to disk."""
    files = [f for f in sorted(directory.rglob("*")) if f.is_file() and f != directory / MANIFEST]
    sizes = {str(f.relative_to(directory)): f.stat().st_size for f in files}
    with open(directory / MANIFEST, "w") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories with a manifest, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.glob("step_*") if p.suffix != ".partial" and (p / MANIFEST).is_file())


def verify(checkpoint: Path) -> None:
    """Raise UserError, naming the file, unless every file of the manifest is there with its size."""
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{checkpoint} is not a complete checkpoint: {MANIFEST} is missing")
    for name, size in _listed_sizes(checkpoint).items():
        file = checkpoint / name
        if not file.is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(checkpoint, f"{name} has {file.stat().st_size} bytes instead of {size}")


def _listed_sizes(checkpoint: Path) -> dict[str, int]:
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except ValueError as error:  # not JSON, or not even text
        raise _damaged(checkpoint, f"{MANIFEST} is not valid JSON") from error
    if not isinstance(sizes, dict) or STATE not in sizes:
        raise _damaged(checkpoint, f"{MANIFEST} does not list {STATE}")
    return sizes


def _damaged(checkpoint: Path, what: str) -> UserError:
    return UserError(f"checkpoint {checkpoint} is damaged: {what}; remove the directory to use the one before")
