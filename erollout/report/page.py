"""The page: its sections, rendered by a template that escapes whatever a run holds, into one file."""

from collections.abc import Sequence
from pathlib import Path

from erollout import __version__
from erollout.errors import UserError
from erollout.report.sections import sections
from erollout.resilience.atomic_write import write_atomically
from erollout.tracking.recorded_run import RecordedRun, read_runs, require_common_metric

SUFFIXES = (".html", ".htm")


def write_report(runs: Sequence[str | Path], out: str | Path) -> None:
    """Write a report of runs, named by their output directories, as one HTML file. Raises UserError."""
    path = Path(out).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out = {out} must end in {' or '.join(SUFFIXES)}: a report is a page")
    recorded = read_runs(runs)
    require_common_metric(recorded)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the work
        write_atomically(path, render(recorded).encode(errors="replace"))  # a response may hold half of a character
    except OSError as error:
        raise UserError(f"--out = {out} can't be written: {error.strerror or error}; choose another place") from error


def render(runs: Sequence[RecordedRun]) -> str:
    """The page of runs as HTML. All text of theirs is escaped; there is no script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # takes a moment

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    return environment.get_template("page.html").render(title=title, sections=sections(runs), version=__version__)


def visible(text: object) -> str:
    """Text with its control characters as the symbols for them."""
    return str(text).translate({code: 0x2400 + code for code in range(32) if code not in (9, 10)})
