"""Manifest of a checkpoint: lists every file with size and checksum, and is written last. Pure file handling."""

import errno
import json
import logging
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from erollout.errors import UserError
from erollout.resilience.atomic_write import flush

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
REPLACED = ".replaced"
_NAME = re.compile(r"step_[0-9]+")
_CHUNK_BYTES = 2**22
_READ_AGAIN_AFTER = (1.0, 4.0)
"""Pauses in seconds before a failed read is retried."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Entry of a file in the manifest."""

    size: int
    """Bytes."""
    checksum: str


def checksum(file: Path) -> str:
    """CRC-32 in hexadecimal, to detect damage by disks, copies and crashes. About 1 GB/s, without the GIL."""
    value = 0
    with open(file, "rb") as contents:
        while chunk := contents.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def write_manifest(directory: Path, checksums: Mapping[str, str] | None = None) -> None:
    """List all files of a finished checkpoint, flushed to disk. `checksums`: known checksums by file name."""
    known = checksums or {}
    for pause in (*_READ_AGAIN_AFTER, None):
        files = {str(f.relative_to(directory)): f for f in sorted(directory.rglob("*")) if f.is_file() and f.name != MANIFEST}
        if not (missing := known.keys() - files.keys()):
            break
        if pause is None:
            raise FileNotFoundError(errno.ENOENT, "written by a rank, and not to be seen by the first one", min(missing))
        time.sleep(pause)  # a directory listing on a network filesystem may be stale
    entries = {
        name: {"bytes": file.stat().st_size, "crc32": known[name] if name in known else checksum(file)}
        for name, file in files.items()
    }
    (directory / MANIFEST).write_text(json.dumps(entries, indent=1))
    for path in [*(file for name, file in files.items() if name not in known), directory / MANIFEST, directory]:
        flush(path)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories with a manifest, oldest first; a copy under another name, as step_00000004_best, is none."""
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.glob("step_*") if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def publish(written: Path, target: Path) -> None:
    """Rename a checkpoint to its final name. An existing one of that name is moved aside meanwhile; `finish_publishing` repairs
    this if the process ends in between. Raises OSError."""
    replaced = target.with_name(f"{target.name}{REPLACED}")
    if target.exists():
        remove(replaced)
        target.rename(replaced)
    written.rename(target)
    flush(target.parent)
    remove(replaced)


def finish_publishing(directory: Path) -> None:
    """After a crash, restore the name of a checkpoint that was moved aside, unless another one has it."""
    for replaced in directory.glob(f"step_*{REPLACED}"):
        target = replaced.with_suffix("")
        if target.exists():
            remove(replaced)
        else:
            replaced.rename(target)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, manifest first, so that a crash leaves none that looks complete. Failures are logged."""
    if not checkpoint.exists():
        return
    try:
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    except OSError as error:
        logger.warning("can't remove %s: %s (%s)", checkpoint, error.strerror, error.filename)


def leaves(name: str) -> bool:
    """Whether a file name points outside the checkpoint that lists it."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def total_bytes(checkpoint: Path) -> int:
    return sum(entry.size for entry in _entries(checkpoint).values())


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """Description of damage to a checkpoint's files; None: they match the manifest.

    Sizes of all files are compared, and checksums of every `parts`-th file from `part` on, so that ranks share the reading. A
    file that is there but can't be read is retried some seconds later, because network filesystems fail temporarily.
    """
    for pause in _READ_AGAIN_AFTER:
        with suppress(OSError):
            return _find_damage(checkpoint, part, parts)
        time.sleep(pause)
    try:
        return _find_damage(checkpoint, part, parts)
    except OSError as error:
        return f"{error.filename} can't be read: {error.strerror}"


def _find_damage(checkpoint: Path, part: int, parts: int) -> str | None:
    """As `damage`, without retries. Raises OSError with the name of a file that can't be read."""
    name = MANIFEST
    try:
        for number, (name, entry) in enumerate(sorted(_entries(checkpoint).items())):
            if reason := _damage(checkpoint / name, entry, reads=number % parts == part):
                return f"{name} {reason}"
    except UserError as error:
        return str(error)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        error.filename = name
        raise
    return None


def _damage(file: Path, entry: _Entry, reads: bool) -> str | None:
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != entry.size:
        return f"has {file.stat().st_size} bytes instead of {entry.size}"
    if reads and (found := checksum(file)) != entry.checksum:
        return f"has the checksum {found} instead of {entry.checksum}"
    return None


def _entries(checkpoint: Path) -> dict[str, _Entry]:
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())
        entries = {name: _Entry(int(entry["bytes"]), str(entry["crc32"])) for name, entry in listed.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:  # not JSON, not text, or something else
        raise UserError(f"{MANIFEST} is not a valid manifest") from error
    for name in filter(leaves, entries):
        raise UserError(f"{MANIFEST} lists {name}, which is not in the checkpoint")
    if STATE not in entries:
        raise UserError(f"{MANIFEST} does not list {STATE}")
    return entries
