"""Measured times of single steps as a CSV file: written by `erollout calibrate sweep`, read by fit and validate. Pure.

Columns as in the reference implementation's sweeps (model, batch, seq, gamma, mode, mean_ms, median_ms, std_ms, min_ms, max_ms,
n_samples), then our own, which a file may lack: they state what the times hold for.
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
"""Tolerance of min_ms and max_ms, which may be rounded in a file."""
LARGEST, LONGEST_MS = 10**8, 1e8
"""Largest plausible batch, context or draft length, and time in ms: larger values come from a column in a wrong place."""


@dataclass(frozen=True, slots=True)
class SweepRow:
    model: str
    batch: int
    """Number of sequences; 0 with seq 0: an aggregate, not a point."""
    seq: int
    """Context length of each sequence, in tokens."""
    gamma: int
    """num_speculative_tokens; 0 in target_decode."""
    mode: Mode
    """target_decode: an AR step. drafter_decode: one step of the drafter. target_verify: the pass over 1 + gamma tokens of each
    sequence, with acceptance. target_decode_sd: an AR step of an engine with an idle drafter."""
    mean_ms: float
    median_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    n_samples: int
    format: str = ""
    """Drafter format; "" if the file does not state it."""
    hardware: str = ""
    tensor_model_parallel_size: int = 1
    architecture: str = ""
    """Sizes of the model, from model_size.describe_shape."""
    dtype: str = ""
    """Dtype of the target's weights."""
    kernels: str = ""
    """Kernels of the decode model."""


COLUMNS = tuple(f.name for f in fields(SweepRow))
_REQUIRED = tuple(f.name for f in fields(SweepRow) if f.default is MISSING)
_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("batch", "seq", "gamma", "n_samples", "tensor_model_parallel_size"), int),
    **dict.fromkeys(("mean_ms", "median_ms", "std_ms", "min_ms", "max_ms"), float),
}


def write_sweep(path: str | Path, rows: Iterable[SweepRow]) -> None:
    """Write a sweep. Raises UserError if the file can't be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise UserError(f"can't write sweep {path}: {error.strerror}") from error


def read_sweep(path: str | Path, complete: bool = True) -> list[SweepRow]:
    """The points of a sweep, without its aggregates. Rows are numbered from 1, the header, as in editors.

    Args:
        complete: refuse a sweep that lacks a mode; False while it is being measured.

    Raises UserError, naming file and row, for missing columns, invalid modes and numbers, impossible times, and rows without
    the others that they depend on.
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
        raise UserError(f"sweep {path} is not a CSV file: {error}") from None
    points = [(number, row) for number, row in numbered if row.batch or row.seq]
    _check_duplicates(str(path), points)
    if complete:
        _check_modes(str(path), points)
    return [row for _, row in points]


def _row(where: str, raw: dict[str, Any]) -> SweepRow:
    """Parse one line and check it by itself."""
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
    """What is wrong with a row; None: nothing."""
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
                f"sweep {path}, row {number}: {row.mode} at batch {row.batch}, seq {row.seq}, gamma {row.gamma} is in row "
                f"{first[key]} already; delete one"
            )
        first[key] = number


def _check_modes(path: str, points: Sequence[tuple[int, SweepRow]]) -> None:
    """Check that every mode is present, and an AR step beside each speculative one, to tell whether that pays."""
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
