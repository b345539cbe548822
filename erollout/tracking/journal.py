"""The journal of a run: an append-only file of JSON lines, and the offset up to which it has been delivered.

Every line is written at once by a single write call, so a killed process loses nothing, and a crash of the machine loses only
what the kernel had not flushed. A torn line is skipped when reading.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erollout.errors import UserError
from erollout.resilience.atomic_write import write_atomically
from erollout.tracking.records import decode

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"


def journal_path(output_dir: str | Path) -> Path:
    """Path of the journal of the run in an output directory."""
    return Path(output_dir).absolute() / "tracking" / FILE_NAME


@dataclass(frozen=True, slots=True)
class JournalEntry:
    record: dict[str, Any] | None
    """The record; None: the line is unreadable (torn by a crash or a full disk)."""
    end: int
    """Byte offset of the line's end."""


class Journal:
    """A journal file, appended by any thread and read by one. Raises OSError if it can't be opened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._offset_path = path.with_name(path.name + ".delivered")
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        self._delivered = self._load_delivered(size)

    @property
    def delivered(self) -> int:
        """Byte offset up to which all records are in the store."""
        return self._delivered

    def append(self, kind: str, **fields: Any) -> None:
        """Write one record. Raises OSError if the disk is full; later records remain readable."""
        record = {"kind": kind, "time": int(time.time() * 1000), **fields}
        line = json.dumps(_encode(record), allow_nan=False).encode() + b"\n"
        with self._lock:
            data = b"\n" + line if self._torn else line
            self._torn = True
            if os.write(self._file, data) != len(data):
                raise OSError(f"{self.path}: a line was written incompletely")
            self._torn = False

    def read(self, offset: int, limit: int) -> list[JournalEntry]:
        """Up to `limit` complete lines from a byte offset."""
        entries: list[JournalEntry] = []
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n") or len(entries) == limit:
                    break
                offset += len(line)
                entries.append(JournalEntry(decode(line), offset))
        return entries

    def records(self) -> list[dict[str, Any]]:
        """All readable records, oldest first."""
        return [entry.record for entry in self.read(0, limit=2**62) if entry.record is not None]

    def undelivered(self, offset: int) -> int:
        """Number of records after a byte offset."""
        return sum(entry.record is not None for entry in self.read(offset, limit=2**62))

    def mark_delivered(self, offset: int) -> None:
        """Record that everything before `offset` is delivered. The file is replaced, so it is never half written.

        On a full disk only this process knows the offset; a later one sends some records again, which is harmless.
        """
        self._delivered = offset
        with suppress(OSError):
            write_atomically(self._offset_path, str(offset))

    def sync(self) -> None:
        """Flush to disk, without the lock, so that appends do not wait."""
        with suppress(OSError):
            os.fsync(self._file)

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                with suppress(OSError):  # a failing disk must not keep the run from ending well
                    os.fsync(self._file)
                os.close(self._file)
                self._file = -1

    def _load_delivered(self, size: int) -> int:
        """The saved offset; 0 if it is lost or does not fit the journal: sending twice is harmless, skipping is not."""
        try:
            offset = int(self._offset_path.read_text())
        except (OSError, ValueError):
            return 0
        return offset if 0 <= offset <= size else 0


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All readable records of a journal file, oldest first; warns of others. Raises OSError if there is no journal."""
    records = []
    damaged = 0
    with open(path, "rb") as file:
        for line in file:
            if (record := decode(line)) is not None:
                records.append(record)
            else:
                damaged += bool(line.strip())
    if damaged:
        logger.warning("%s: skipped %d unreadable lines", path, damaged)
    return records


def load_records(path: str | Path) -> list[dict[str, Any]]:
    """As read_records. Raises UserError if there is no journal."""
    try:
        return read_records(path)
    except OSError as error:
        raise UserError(f"can't read the metrics {path}: {error.strerror}; name the train.output_dir of a run") from error


def history_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One dict per step, ascending, with `step` and all its metrics except system metrics.

    An attempt that resumes from a checkpoint repeats the steps after it; earlier records of them are dropped.
    """
    history: dict[int, dict[str, float]] = {}
    for record in records:
        if record["kind"] == "start" and record.get("step") is not None:
            history = {step: row for step, row in history.items() if step <= record["step"]}
        if record["kind"] == "metrics":
            row = history.setdefault(record["step"], {"step": record["step"]})
            row.update({name: float(value) for name, value in (record["values"] | record.get("repeated", {})).items()})
    rows = [
        {name: value for name, value in history[step].items() if not name.startswith("system/")} for step in sorted(history)
    ]
    return [row for row in rows if len(row) > 1]


def read_history(path: str | Path) -> list[dict[str, float]]:
    """The history of a journal file, as history_of. Raises OSError if there is no journal."""
    return history_of(read_records(path))


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """What a run has tracked, as history_of. Raises UserError if there is no journal.

    run: its `train.output_dir`, or its journal.
    """
    return history_of(load_records(journal_of(run)))


def journal_of(run: str | Path) -> Path:
    """The journal of a run that is named by its `train.output_dir`, or by its journal."""
    path = Path(run).expanduser()
    return journal_path(path) if path.is_dir() else path


def _encode(value: Any) -> Any:
    """Encode non-finite numbers, which JSON lacks, as strings that float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value
