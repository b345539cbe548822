"""The samples table: one for the whole run, in the form of MLflow's own tables."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SAMPLES_FILE = "samples.json"

Row = Mapping[str, Any]


def read_samples(path: Path) -> list[Row]:
    """The rows of a table file; none if it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        table = json.loads(path.read_text())
        rows = [dict(zip(table["columns"], row, strict=False)) for row in table["data"]]
        return [row for row in rows if isinstance(row["step"], int)]
    return []


def encode_samples(rows: Sequence[Row]) -> bytes:
    """A table file of rows, each with its step first; columns that a row lacks are null."""
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
    table = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
    return json.dumps(table, default=str).encode()
