"""Measured times of single steps as a CSV file: written by `erollout calibrate sweep`, read by fit and validate. Pure.

Columns as in the reference implementation's sweeps (model, batch, seq, gamma, mode, mean_ms, median_ms, std_ms, min_ms, max_ms,
n_samples), and after them ours, which a file may lack: they say what the times are of.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from erollout.calibration.model_size import BYTES
from erollout.errors import UserError

Mode = Literal["target_decode", "drafter_decode", "target_verify", "target_decode_sd"]
SLACK = 1.02
"""Of min_ms and max_ms, which a file may have rounded."""
LARGEST, LONGEST_MS = 10**8, 1e8
"""Batch, context or draft length, and time, that a sweep can have. What is larger is a column in a wrong place."""


@dataclass(frozen=True, slots=True)
class SweepRow:
    model: str
    batch: int
    """Sequences; 0 with seq 0: an aggregate that is not a point."""
    seq: int
    """Tokens of context of each."""
    gamma: int
    """num_speculative_tokens; 0 in target_decode."""
    mode: Mode
    """target_decode: an AR step. drafter_decode: one step of the drafter. target_verify: the pass over 1 + gamma tokens of each
    sequence with the decision. target_decode_sd: an AR step of an engine that has a drafter but does not use it."""
    mean_ms: float
    median_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    n_samples: int
    format: str = ""
    """Of the drafter; "" in a file that does not say."""
    hardware: str = ""
    tensor_model_parallel_size: int = 1
    architecture: str = ""
    """Sizes of the model, by model_size.describe_shape."""
    dtype: str = ""
    """Of the target's weights."""
    kernels: str = ""
    """Of the decode model."""


COLUMNS = tuple(f.name for f in fields(SweepRow))
_REQUIRED = tuple(f.name for f in fields(SweepRow) if f.default is MISSING)
_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("batch", "seq", "gamma", "n_samples", "tensor_model_parallel_size"), int),
    **dict.fromkeys(("mean_ms", "median_ms", "std_ms", "min_ms", "max_ms"), float),
}


def write_sweep(path: str | Path, rows: Iterable[SweepRow]) -> None:
    """Raises UserError when the file can't be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise UserError(f"can't write sweep {path}: {error.strerror}") from error


def read_sweep(path: str | Path, complete: bool = True) -> list[SweepRow]:
    """The points of a sweep, without its aggregates. Rows are counted from 1, the header, as editors do.

    Args:
        complete: refuse a sweep that lacks a mode; false while it is being measured.

    Raises UserError, naming file and row, for missing columns, modes and numbers that don't exist, times that can't be, and
    rows without which others mean nothing.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _REQUIRED if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"sweep {path}, row 1: no column {', '.join(missing)}; it needs {','.join(_REQUIRED)}")
            numbered = [(number, _row(f"{path}, row {number}", raw)) for number, raw in enumerate(reader, start=2)]
    except OSError as error:
        raise UserError(f"can't read sweep {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"sweep {path} is no CSV file: {error}") from None
    points = [(number, row) for number, row in numbered if row.batch or row.seq]
    _check_duplicates(str(path), points)
    if complete:
        _check_modes(str(path), points)
    return [row for _, row in points]


def _row(where: str, raw: dict[str, Any]) -> SweepRow:
    """One line as numbers, checked by itself."""
    if None in raw:
        raise UserError(f"sweep {where}: more fields than the header names (a comma inside a number?)")
    values: dict[str, Any] = {}
    for name in COLUMNS:
        text = raw.get(name)
        if text is None or (text == "" and name not in _REQUIRED):
            if name in _REQUIRED:
                raise UserError(f"sweep {where}: no {name}; the row is cut off")
            continue
        try:
            values[name] = _NUMBERS.get(name, str)(text)
        except ValueError:
            raise UserError(f"sweep {where}: {name} = {text!r} is no {_NUMBERS[name].__name__}") from None
    row = SweepRow(**values)
    problem = _problem(row)
    if problem:
        raise UserError(f"sweep {where}: {problem}")
    return row


def _problem(row: SweepRow) -> str | None:
    """What can't be in a row."""
    if row.mode not in get_args(Mode):
        return f"mode = {row.mode!r} is none of {', '.join(get_args(Mode))}"
    if row.dtype and row.dtype not in BYTES:
        return f"dtype = {row.dtype!r} is none of {', '.join(BYTES)}"
    if min(row.batch, row.seq, row.gamma) < 0 or (row.batch == 0) != (row.seq == 0):
        return f"batch = {row.batch}, seq = {row.seq}, gamma = {row.gamma} is no point"
    if max(row.batch, row.seq, row.gamma) > LARGEST:
        return f"batch = {row.batch}, seq = {row.seq}, gamma = {row.gamma}: none can be above {LARGEST}"
    if row.batch and (row.gamma == 0) != (row.mode == "target_decode"):
        return f"gamma = {row.gamma} in mode {row.mode}: it is 0 in target_decode, and there alone"
    for name in ("mean_ms", "median_ms", "min_ms", "max_ms"):
        value = getattr(row, name)
        if not 0 < value < LONGEST_MS:
            return f"{name} = {value} is no time; measure the point again or delete the row"
    if not 0 <= row.std_ms < LONGEST_MS:
        return f"std_ms = {row.std_ms} is no standard deviation"
    if not row.min_ms <= row.median_ms * SLACK or not row.median_ms <= row.max_ms * SLACK:
        return f"median_ms = {row.median_ms} is not between min_ms = {row.min_ms} and max_ms = {row.max_ms}"
    if row.n_samples < 1 or row.tensor_model_parallel_size < 1:
        return (
            f"n_samples = {row.n_samples}, tensor_model_parallel_size = {row.tensor_model_parallel_size}: both are at least 1"
        )
    return None


def _check_duplicates(path: str, points: Sequence[tuple[int, SweepRow]]) -> None:
    first: dict[tuple[object, ...], int] = {}
    for number, row in points:
        key = (row.model, row.format, row.tensor_model_parallel_size, row.mode, row.batch, row.seq, row.gamma)
        if key in first:
            raise UserError(
                f"sweep {path}, row {number}: {row.mode} at batch {row.batch}, seq {row.seq}, gamma {row.gamma} stands in row "
                f"{first[key]} already; delete one"
            )
        first[key] = number


def _check_modes(path: str, points: Sequence[tuple[int, SweepRow]]) -> None:
    """Every mode is there, and an AR step beside each speculative one: without it nothing says whether that pays."""
    present = {row.mode for _, row in points}
    missing = [mode for mode in get_args(Mode) if mode not in present and mode != "target_decode_sd"]
    if missing:
        raise UserError(f"sweep {path}: no row has mode {' or '.join(missing)}; measure those too")
    autoregressive = {(row.batch, row.seq) for _, row in points if row.mode == "target_decode"}
    for number, row in points:
        if row.mode != "target_decode_sd" and (row.batch, row.seq) not in autoregressive:
            raise UserError(
                f"sweep {path}, row {number}: {row.mode} at batch {row.batch}, seq {row.seq}, but no target_decode there; "
                "measure that too or delete the row"
            )
