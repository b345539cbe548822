"""Snapshot: a copy of the code in the run directory, so that later edits don't affect a pending or resumed run."""

import hashlib
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from erollout.errors import UserError
from erollout.launch.scorer_files import scorer_files
from erollout.tracking.provenance import _git

_PACKAGES = ("erollout", "erollout.launch", "erollout.megatron_patches", "erollout.slurm")
"""Packages to copy. In a checkout the last three are beside the first; installed, they are inside it."""
SOURCE = "erollout/source.json"
"""File in the copy that states its commit."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    files: dict[str, Path]
    """Source files by their path in the copy."""
    name: str
    """Name derived from the contents."""
    commit: str
    """Commit of the package's checkout; empty: it is not in one."""
    dirty: bool
    """Whether the checkout differs from the commit."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, directory: Path) -> Path:
        """Copy into a subdirectory of `directory` named by the contents, unless it exists. Returns the subdirectory.

        Raises UserError if the code has changed since the snapshot was taken, OSError if nothing can be written.
        """
        folder = directory / self.name
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        if folder.is_dir():
            return folder
        for place, path in self.files.items():
            (partial / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / place)
        if _digest({place: partial / place for place in self.files}) != self.name:
            shutil.rmtree(partial)
            raise UserError("the code changed while it was copied; give the command again")
        (partial / SOURCE).write_text(json.dumps({"commit": self.commit, "dirty": self.dirty}))
        partial.rename(folder)
        return folder


def take_snapshot(function: str | None = None, import_path: str | None = None) -> Snapshot:
    """Files of this package, compiled kernels included, and of a reward function (rewards.function) that is not installed.

    Nothing is copied yet. Raises UserError if there is no such module.
    """
    files: dict[str, Path] = {}
    for name in _PACKAGES:
        files |= _tree(Path(name.replace(".", "/")), _location(name))
    folder = _location("erollout")
    commit = _git("-C", str(folder), "rev-parse", "HEAD")
    dirty = bool(commit and _git("-C", str(folder), "status", "--porcelain", "--untracked-files=no"))
    files |= scorer_files(function, import_path)
    return Snapshot(files, _digest(files), commit, dirty)


def _digest(files: dict[str, Path]) -> str:
    contents = hashlib.sha256()
    for place, path in sorted(files.items()):
        data = path.read_bytes()
        contents.update(f"{place}\0{len(data)}\0".encode() + data)
    return contents.hexdigest()[:12]


def _location(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, package
    return Path(spec.submodule_search_locations[0])


def _tree(place: Path, folder: Path) -> dict[str, Path]:
    """All files except compiled and hidden ones."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(place / path): folder / path for path in paths if not _is_passing(path)}


def _is_passing(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts) or path.suffix == ".pyc"
