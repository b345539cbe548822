"""The file of a running sweep: each row is appended at once, and a sweep stopped at any moment can be resumed. Pure."""

import csv
from dataclasses import asdict
from pathlib import Path

from erollout.calibration.sweep_file import COLUMNS, SweepRow, read_sweep, write_sweep
from erollout.errors import UserError

_HEADER = ",".join(COLUMNS).encode()


def resume_rows(path: str | Path) -> list[SweepRow]:
    """The rows of a stopped sweep, or none for a new one. The file is then ready for `append_row`.

    Raises UserError for a file that can't be read or written or is not a sweep, and leaves it as it is.
    """
    file = Path(path)
    try:
        whole, newline, torn = file.read_bytes().rpartition(b"\n") if file.exists() else (b"", b"", b"")
        if whole.partition(b"\n")[0] != _HEADER and (newline or not _HEADER.startswith(torn)):
            raise UserError(
                f"{path} is not a sweep that can be resumed: its first line is not {_HEADER.decode()}; name another file"
            )
        if not newline:
            write_sweep(file, [])
        elif torn:  # the process ended while writing this line
            with file.open("rb+") as opened:
                opened.truncate(len(whole) + len(newline))
    except OSError as error:
        raise UserError(f"can't resume sweep {path}: {error.strerror}") from error
    return read_sweep(file, complete=False)


def append_row(path: str | Path, row: SweepRow) -> None:
    """Append a row. Raises UserError if the file can't be written."""
    try:
        with Path(path).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(asdict(row))
    except OSError as error:
        raise UserError(f"can't write sweep {path}: {error.strerror}") from error
