"""Datasets in files: JSONL or parquet with a prompt column and an answer column."""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from erollout.data.items import Message, TaskItem
from erollout.errors import UserError

Row = tuple[str, dict[str, Any]]
"""Origin (`train.jsonl:17`) and the row itself."""


class FileSource:
    """Rows of all files, in a new order each epoch when `shuffle_seed` is given."""

    def __init__(
        self, paths: tuple[str, ...], prompt_column: str, answer_column: str, task: str | None, shuffle_seed: int | None
    ) -> None:
        """`task`: name to report rewards by; default: the file's. Raises UserError naming file and line of a bad row."""
        self._items = [
            _task_item(origin, row, prompt_column, answer_column, task or Path(path).stem)
            for path in paths
            for origin, row in _read(Path(path))
        ]
        if not self._items:
            raise UserError(f"{', '.join(paths)}: no rows; name a file that has some")
        self._shuffle_seed = shuffle_seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list[TaskItem]:
        """In file order."""
        return self._items

    def item(self, index: int) -> TaskItem:
        epoch, position = divmod(index, len(self))
        return self._items[self._order(epoch)[position]]

    def _make_order(self, epoch: int) -> list[int]:
        order = list(range(len(self)))
        if self._shuffle_seed is not None:
            random.Random(f"epoch {self._shuffle_seed} {epoch}").shuffle(order)
        return order


def _task_item(origin: str, row: dict[str, Any], prompt_column: str, answer_column: str, task: str) -> TaskItem:
    for column in (prompt_column, answer_column):
        if row.get(column) is None:
            there = ", ".join(name for name, value in row.items() if value is not None) or "none"
            key = "data.prompt_column" if column == prompt_column else "data.answer_column"
            raise UserError(f"{origin}: no column {column!r} (columns: {there}); fix the row or set {key}")
    answer = row[answer_column]
    written = str(answer) if isinstance(answer, str | int | float) else None
    return TaskItem(
        question=_question(row[prompt_column], origin, prompt_column),
        solution=written,
        task=task,
        record={"answer": answer if written is None else written, "row": row},
        origin=origin,
    )


def _question(prompt: Any, origin: str, column: str) -> str | tuple[Message, ...]:
    """Text, or messages that end with the user's."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(_is_message(message) for message in prompt):
        raise UserError(f"{origin}: column {column!r} must be text or a list of messages with role and content")
    if not prompt or prompt[-1]["role"] != "user":
        raise UserError(f"{origin}: the messages of column {column!r} must end with one of role user")
    return tuple({"role": message["role"], "content": message["content"]} for message in prompt)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _read(path: Path) -> Iterator[Row]:
    """Rows of one file. Raises UserError for a file or line that can't be read."""
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
            yield from ((f"{path} row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))
        else:
            raise UserError(f"dataset {path}: unknown file type {path.suffix!r}; use .jsonl or .parquet")
    except OSError as error:
        raise UserError(f"can't read dataset {path}: {error.strerror or error}") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"can't read dataset {path}: {' '.join(str(error).split())}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    """Blank lines are skipped but counted."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON as well as bad UTF-8
            raise UserError(f"{origin}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{origin}: a row must be an object with columns, not {type(row).__name__}")
        yield origin, row
