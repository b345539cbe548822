"""What a dataset is, for tracking: name, source, columns, rows and a digest of the data."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erollout.config import DataConfig
from erollout.data.prompts import PromptDataset
from erollout.errors import UserError
from erollout.types import DatasetDescription


def describe_datasets(data: DataConfig, train: PromptDataset, test: PromptDataset | None) -> dict[str, DatasetDescription]:
    """Descriptions by split, `training` and `evaluation`. Reads dataset files once more. Raises UserError."""
    found = {"training": _describe(data, train, data.train_files, data.train_seed, data.train_size)}
    if test is not None:
        found["evaluation"] = _describe(data, test, data.test_files, data.test_seed, data.test_size)
    return found


def _describe(data: DataConfig, dataset: PromptDataset, files: Sequence[str], seed: int, size: int) -> DatasetDescription:
    item = dataset.item(0)
    if data.kind == "file":
        row, name = item.record["row"], "+".join(Path(path).stem for path in files)
        return DatasetDescription(name, ", ".join(files), len(dataset), _columns(row), _digest_of_files(files))
    tasks = [{"name": task.name, "weight": task.weight, "args": task.args} for task in data.tasks]
    name = "+".join(task.name for task in data.tasks) or data.kind
    origin = {"kind": data.kind, "tasks": tasks, "args": data.args, "seed": seed, "size": size}
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]
    columns = _columns({"question": item.question, **item.record})
    return DatasetDescription(name, f"{data.kind}, seeds {seed} to {seed + size - 1}", len(dataset), columns, digest)


def _columns(row: dict[str, Any]) -> dict[str, str]:
    return {name: _kind(value) for name, value in row.items()}


def _kind(value: Any) -> str:
    for kinds, name in ((bool, "boolean"), (int, "long"), (float, "double"), ((list, tuple), "array"), (dict, "object")):
        if isinstance(value, kinds):
            return name
    return "string"


def _digest_of_files(files: Sequence[str]) -> str:
    total = hashlib.sha256()
    for path in files:
        try:
            with Path(path).open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"data file {path} can't be read any more: {error}; put it back and start again") from None
    return total.hexdigest()[:32]
