"""Console output of a run: a `key=value` line per step, a live progress line on a terminal, and a final table."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from erollout.tracking import metrics as names
from erollout.tracking.terminal import print_whole

logger = logging.getLogger(__name__)

FIGURES = (
    ("reward", names.REWARD, "{:.3f}"),
    ("scoring_errors", names.SCORING_ERRORS, "{:.0f}"),
    ("accuracy", names.ACCURACY, "{:.3f}"),
    ("held_out_reward", names.EVALUATION_REWARD, "{:.3f}"),
    ("length", f"{names.RESPONSE_LENGTH}/mean", "{:.1f}"),
    ("s_per_step", names.STEP_SECONDS, "{:.2f}"),
    ("loss", names.LOSS, "{:.4g}"),
    ("eta", "eta", "{}"),
    ("tokens_per_s", names.TOKENS_PER_SECOND, "{:.0f}"),
    ("mismatch_kl", names.MISMATCH_KL, "{:.2g}"),
)
"""Label, tracked name and format of each figure, the most important first. A step without a figure omits it."""
_BAR_FROM_WIDTH = 40
"""Least terminal width for a progress bar, so that the figures have room."""
SMOOTHING = 0.9
"""Exponential smoothing of the seconds per step, for the estimate of the remaining time."""


class StepReporter:
    """`with StepReporter(total) as reporter: reporter.update(step, metrics)`: a line for each step and each evaluation, and
    below them on a terminal a line that stays: step, remaining time, bar."""

    def __init__(self, total_steps: int, first_step: int = 0, console: Console | None = None) -> None:
        """`first_step`: number of steps completed before this process (in a resumed run)."""
        self._console = console or Console(highlight=False)
        self._total = total_steps
        self._seconds_per_step: float | None = None
        self._last_update = time.monotonic()
        self._progress = _progress_line(self._console) if self._console.is_terminal else None
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, eta="?") if self._progress else None

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
        """Show a finished step, or the evaluation after it. `step` counts from 1; 0 is an evaluation before the first."""
        if names.ACCURACY in values and names.STEP_SECONDS not in values:
            self._last_update = time.monotonic()  # not part of the next step's time
            self._line(step, "evaluation ", evaluation_figures(values))
            return
        self._observe(values)
        remaining = self._remaining(step)
        self._line(step, "", format_figures(values, remaining))
        if self._progress and self._task is not None:
            with _whoever_reads(self._console):
                self._progress.update(self._task, completed=step, eta=remaining)

    def _line(self, step: int, kind: str, figures: Sequence[tuple[str, str]]) -> None:
        """Print a line: in a log with the date and all figures; on a terminal with the time and as many figures as fit."""
        is_terminal = self._console.is_terminal
        line = f"{time.strftime('%H:%M:%S' if is_terminal else '%Y-%m-%d %H:%M:%S')} {kind}step={step}/{self._total}"
        for label, figure in figures:
            longer = f"{line} {label}={figure}"
            if is_terminal and len(longer) > self._console.width:
                break
            line = longer
        with _whoever_reads(self._console):
            self._console.print(line, markup=False, soft_wrap=True)

    def _observe(self, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        seconds = values.get(names.STEP_SECONDS, now - self._last_update)
        self._last_update = now
        before = self._seconds_per_step
        self._seconds_per_step = seconds if before is None else SMOOTHING * before + (1 - SMOOTHING) * seconds

    def _remaining(self, step: int) -> str:
        return format_duration((self._seconds_per_step or 0.0) * max(0, self._total - step))


def format_figures(values: Mapping[str, float], remaining: str) -> list[tuple[str, str]]:
    """Label and text of the key figures, then the phases' shares of the step, largest first: rollout:62%,update:30%.

    `remaining`: time of the run. Responses that no scorer scored are counted where there are any.
    """
    shown = {**values, "eta": remaining}
    if not values.get(names.SCORING_ERRORS):
        shown.pop(names.SCORING_ERRORS, None)
    figures = [(label, form.format(shown[name])) for label, name, form in FIGURES if name in shown]
    step = values.get(names.STEP_SECONDS, 0.0)
    phases = {name.split("/", 1)[1]: value for name, value in values.items() if name.startswith(f"{names.SECONDS}/")}
    phases.pop("step", None)
    if step > 0 and phases:
        largest = sorted(phases.items(), key=lambda item: -item[1])[:4]
        figures.append(("phases", ",".join(f"{phase}:{100 * value / step:.0f}%" for phase, value in largest)))
    return figures


def evaluation_figures(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and text of an evaluation's figures over all tasks, the accuracy first."""
    own = {
        name.split("/")[1]: value for name, value in values.items() if name.startswith("evaluation/") and name.count("/") == 1
    }
    accuracy = own.pop(names.ACCURACY.split("/")[1])
    return [("accuracy", f"{accuracy:.3f}"), *((name, f"{value:.4g}") for name, value in own.items())]


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
    """Print a table with a header; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(str, row))
    _print(table, console)


def _print(table: Table, console: Console | None) -> None:
    console = console or Console(highlight=False)
    with _whoever_reads(console):
        print_whole(table, console)


@contextmanager
def _whoever_reads(console: Console) -> Iterator[None]:
    """Context that ignores a full disk behind stdout or a closed pipe (rich raises SystemExit), which must not end a run."""
    try:
        yield
    except (OSError, SystemExit) as error:
        console.quiet = True
        logger.warning("can't write to stdout any more (%s): further output is dropped", error)


def _progress_line(console: Console) -> Progress:
    step, remaining = TextColumn("{task.completed}/{task.total}"), TextColumn("eta {task.fields[eta]}")
    bar = [BarColumn(bar_width=16)] if console.width >= _BAR_FROM_WIDTH else []
    return Progress(step, remaining, *bar, console=console)
