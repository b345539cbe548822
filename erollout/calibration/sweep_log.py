"""The rows of a sweep on their way into its file: each is there as soon as it is measured, and a sweep that was stopped at any
moment goes on where it was. Pure.
"""

import csv
from dataclasses import asdict
from pathlib import Path

from erollout.calibration.sweep_file import COLUMNS, SweepRow, read_sweep, write_sweep
from erollout.errors import UserError

_HEADER = ",".join(COLUMNS).encode()


def resume_rows(path: str | Path) -> list[SweepRow]:
    """The rows of a sweep that was stopped, or none of a new one. Its file is then ready for `append_row`.

    Raises UserError for a file that can't be read or written, or is something else, which stays as it is.
    """
    file = Path(path)
    try:
        whole, newline, torn = file.read_bytes().rpartition(b"\n") if file.exists() else (b"", b"", b"")
        if whole.partition(b"\n")[0] != _HEADER and (newline or not _HEADER.startswith(torn)):
            raise UserError(f"{path} is no sweep that can go on: its first line is not {_HEADER.decode()}; name another file")
        if not newline:
            write_sweep(file, [])
        elif torn:  # the process ended while it wrote this line
            with file.open("rb+") as opened:
                opened.truncate(len(whole) + len(newline))
    except OSError as error:
        raise UserError(f"can't resume sweep {path}: {error.strerror}") from error
    return read_sweep(file, complete=False)


def append_row(path: str | Path, row: SweepRow) -> None:
    """Raises UserError when the file can't be written."""
    try:
        with Path(path).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(asdict(row))
    except OSError as error:
        raise UserError(f"can't write sweep {path}: {error.strerror}") from error
