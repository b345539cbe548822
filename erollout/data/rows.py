"""Rows of dataset files: JSONL and JSON, optionally gzipped, and parquet."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from erollout.data.columns import look_up
from erollout.errors import UserError

Row = tuple[str, dict[str, Any]]
"""Origin (`train.jsonl:17`, `train.parquet row 17`) and the row itself."""

_LINES, _WHOLE = (".jsonl", ".ndjson"), (".json",)


def read_rows(path: Path, prompt_column: str) -> Iterator[Row]:
    """Rows of one file, each with a prompt in that column. Raises UserError for an unreadable file or row."""
    packed = path.suffix == ".gz"
    kind = Path(path.stem).suffix if packed else path.suffix
    try:
        if kind in _LINES:
            yield from _lines(path, _contents(path, packed))
        elif kind in _WHOLE:
            yield from _document(path, _contents(path, packed), prompt_column)
        elif kind == ".parquet" and not packed:
            table = pyarrow.parquet.read_table(path)
            yield from ((f"{path} row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))
        else:
            suffix = "".join(path.suffixes[-2:]) if packed else path.suffix
            raise UserError(f"dataset {path}: unknown file type {suffix!r}; use .jsonl, .json, .jsonl.gz, .json.gz or .parquet")
    except OSError as error:
        raise UserError(f"can't read dataset {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"can't read dataset {path}: the gzip file is damaged ({error})") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"can't read dataset {path}: {' '.join(str(error).split())}") from error


def _contents(path: Path, packed: bool) -> bytes:
    data = path.read_bytes()
    return (gzip.decompress(data) if packed else data).removeprefix(b"\xef\xbb\xbf")  # byte order mark of Windows tools


def _lines(path: Path, data: bytes) -> Iterator[Row]:
    """Rows of a file with one per line. Blank lines are skipped but counted."""
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield _row(f"{path}:{number}", _parsed(f"{path}:{number}", line))


def _document(path: Path, data: bytes, prompt_column: str) -> Iterator[Row]:
    """Rows of a JSON document: a list, bare or as the only list of an object; else, as in JSONL, one row per line."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        if data.lstrip()[:1] != b"{":
            _parsed(str(path), data)
        yield from _lines(path, data)
        return
    if (
        isinstance(whole, dict) and look_up(whole, prompt_column) is not None
    ):  # a single row, whose prompt may be a list of messages
        whole = [whole]
    elif isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = lists[0] if len(lists) == 1 else [whole]
    if not isinstance(whole, list):
        raise UserError(f"{path}: a JSON dataset must be a list of rows, not {type(whole).__name__}")
    for number, row in enumerate(whole, start=1):
        yield _row(f"{path} row {number}", row)


def _parsed(origin: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # invalid JSON or UTF-8
        raise UserError(f"{origin}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{origin}: not valid JSON: lists or objects are nested too deep") from error


def _row(origin: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{origin}: a row must be an object with columns, not {type(row).__name__}")
    return origin, row
