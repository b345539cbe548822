"""What a person sees of a run: a live line on a terminal, one `key=value` line a step in a log file, a table at the end."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from erollout.tracking import metrics as names

logger = logging.getLogger(__name__)

FIGURES = (
    ("reward", names.REWARD, "{:.3f}"),
    ("loss", names.LOSS, "{:.4g}"),
    ("length", f"{names.RESPONSE_LENGTH}/mean", "{:.1f}"),
    ("tokens_per_s", names.TOKENS_PER_SECOND, "{:.0f}"),
    ("mismatch_kl", names.MISMATCH_KL, "{:.2g}"),
    ("accuracy", names.ACCURACY, "{:.3f}"),
    ("held_out_reward", names.EVALUATION_REWARD, "{:.3f}"),
    ("s_per_step", names.STEP_SECONDS, "{:.2f}"),
)
"""Label, tracked name and format, in this order. A step without the figure leaves it out."""
SMOOTHING = 0.9
"""Of the seconds per step that the remaining time is estimated from."""


class StepReporter:
    """`with StepReporter(total) as reporter: reporter.update(step, metrics)`; the form follows from what stdout is."""

    def __init__(self, total_steps: int, first_step: int = 0, console: Console | None = None) -> None:
        """`first_step`: steps already done before this process (a resumed run)."""
        self._console = console or Console(highlight=False)
        self._total = total_steps
        self._seconds_per_step: float | None = None
        self._last_update = time.monotonic()
        self._progress = _progress_line(self._console) if self._console.is_terminal else None
        self._task = (
            self._progress.add_task("", total=total_steps, completed=first_step, figures="") if self._progress else None
        )

    def __enter__(self) -> "StepReporter":
        if self._progress:
            with _whoever_reads(self._console):
                self._progress.start()
            if self._console.quiet:
                self._progress = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            with _whoever_reads(self._console):
                self._progress.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show a finished step. `step` counts from 1."""
        self._observe(values)
        figures = [*format_figures(values), ("eta", self._remaining(step))]
        text = " ".join(f"{label}={figure}" for label, figure in figures)
        with _whoever_reads(self._console):
            if self._progress and self._task is not None:
                self._progress.update(self._task, completed=step, figures=text.replace("=", " "))
            else:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                self._console.print(f"{stamp} step={step}/{self._total} {text}", markup=False, soft_wrap=True)

    def _observe(self, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        seconds = values.get(names.STEP_SECONDS, now - self._last_update)
        self._last_update = now
        before = self._seconds_per_step
        self._seconds_per_step = seconds if before is None else SMOOTHING * before + (1 - SMOOTHING) * seconds

    def _remaining(self, step: int) -> str:
        return format_duration((self._seconds_per_step or 0.0) * max(0, self._total - step))


def format_figures(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and text of the key figures, then the phases' shares of the step, largest first: rollout:62%,update:30%."""
    figures = [(label, form.format(values[name])) for label, name, form in FIGURES if name in values]
    step = values.get(names.STEP_SECONDS, 0.0)
    phases = {name.split("/", 1)[1]: value for name, value in values.items() if name.startswith(f"{names.SECONDS}/")}
    phases.pop("step", None)
    if step > 0 and phases:
        largest = sorted(phases.items(), key=lambda item: -item[1])[:4]
        figures.append(("phases", ",".join(f"{phase}:{100 * value / step:.0f}%" for phase, value in largest)))
    return figures


def format_duration(seconds: float) -> str:
    """`45s`, `3m20s`, `2h05m`, `3d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def print_summary(rows: Sequence[tuple[str, Any]], title: str = "", console: Console | None = None) -> None:
    """The table at the end of a run: name and value of each row."""
    table = Table(title=title or None, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    _print(table, console)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", console: Console | None = None) -> None:
    """A table with a head; the first column to the left, the others to the right."""
    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(str, row))
    _print(table, console)


def _print(table: Table, console: Console | None) -> None:
    console = console or Console(highlight=False)
    with _whoever_reads(console):
        console.print(table)


@contextmanager
def _whoever_reads(console: Console) -> Iterator[None]:
    """A full disk below stdout, or a reader that is gone (for which rich raises SystemExit), is no reason to end a run."""
    try:
        yield
    except (OSError, SystemExit) as error:
        console.quiet = True
        logger.warning("stdout takes nothing any more (%s): what comes is not shown", error)


def _progress_line(console: Console) -> Progress:
    return Progress(BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), console=console)
