"""A table of runs' metrics in a file: columns run, step, metric, value; a row per metric of each step."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from erollout.errors import UserError
from erollout.resilience.atomic_write import write_atomically
from erollout.tracking.journal import read_metrics

FORMATS = (".csv", ".parquet")


def write_table(runs: Sequence[str], out: str) -> int:
    """Write the metrics of runs, named by their output directories. Returns the number of rows. Raises UserError.

    The suffix selects the format. A step that was repeated after a resume is there once, as `read_metrics` has it.
    """
    path = Path(out).expanduser()
    if path.suffix not in FORMATS:
        raise UserError(f"--out = {out} must end in {' or '.join(FORMATS)}")
    rows = [
        (run, int(row["step"]), name, value)
        for run in dict.fromkeys(runs)
        for row in read_metrics(run)
        for name, value in row.items()
        if name != "step"
    ]
    if not rows:
        raise UserError(f"--run = {', '.join(runs)}: no metrics yet, because no step is complete")
    import pyarrow as pa  # takes a second
    import pyarrow.csv
    import pyarrow.parquet

    kinds = (pa.string(), pa.int64(), pa.string(), pa.float64())
    names = ("run", "step", "metric", "value")
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    content = BytesIO()
    (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(pa.table(columns, names), content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise UserError(f"--out = {out} can't be written: {error.strerror or error}; choose another place") from error
    return len(rows)
