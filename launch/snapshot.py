"""A copy of the code in the run directory, so that later edits don't change a run that waits or goes on."""

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
"""In a checkout the last three stand beside the first, and installed inside it."""
SOURCE = "erollout/source.json"
"""In the copy: which commit it is of."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    files: dict[str, Path]
    """What is copied from where, by its place in the copy."""
    name: str
    """Equal for equal contents."""
    commit: str
    """Of the checkout that the package is in; empty where it is in none."""
    dirty: bool
    """Whether the checkout differs from the commit."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, directory: Path) -> Path:
        """Copy into `directory`, in a folder of the contents' name; one that is there is left alone. Returns the folder.

        Raises UserError when the code has changed since it was looked at, OSError when nothing can be written.
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

    Nothing is copied yet. Raises UserError where there is no such module.
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
    """All files but compiled and hidden ones."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(place / path): folder / path for path in paths if not _is_passing(path)}


def _is_passing(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts) or path.suffix == ".pyc"
