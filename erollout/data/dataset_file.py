"""Datasets in files with a prompt column and an answer column."""

import random
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from erollout.data.columns import question, require_text, required
from erollout.data.items import TaskItem
from erollout.data.rows import read_rows
from erollout.errors import UserError


class FileSource:
    """Rows of all files, in a new order each epoch when `shuffle_seed` is given."""

    def __init__(
        self, paths: tuple[str, ...], prompt_column: str, answer_column: str, task: str | None, shuffle_seed: int | None
    ) -> None:
        """`task`: name for reporting rewards; default: the file's. Raises UserError naming file and line of a bad row."""
        self._items = [
            _task_item(origin, row, prompt_column, answer_column, task or Path(path).stem)
            for path in paths
            for origin, row in read_rows(Path(path), prompt_column)
        ]
        if not self._items:
            raise UserError(f"{', '.join(paths)}: no rows; name a file that has some")
        self._shuffle_seed = shuffle_seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list[TaskItem]:
        """All items in file order."""
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
    prompt = required(row, prompt_column, "data.prompt_column", origin)
    answer = required(row, answer_column, "data.answer_column", origin)
    written = str(answer) if isinstance(answer, str | int | float | Decimal) else None
    return TaskItem(
        question=question(prompt, origin, prompt_column),
        solution=None if written is None else require_text(written, origin, answer_column),
        task=task,
        record={"answer": answer if written is None else written, "row": row, "origin": origin},
        origin=origin,
    )
