"""Sections of a report: what they show of the runs, or why there is nothing to show."""

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from erollout.plots.run_figures import OVER_STEPS, draw
from erollout.plots.style import data_address
from erollout.plots.training_curves import NoData
from erollout.report.tables import Table, attempts, configuration, glance, samples
from erollout.tracking.recorded_run import RecordedRun


@dataclass(frozen=True, slots=True)
class Picture:
    address: str
    """A data: address with the whole picture."""
    text: str
    """What it shows, for those who can't see it."""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    notes: Sequence[str] = ()
    """Lines of text: explanations, and what is missing for which reason."""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


PICTURES = (
    ("Reward and held-out prompts", "reward", ""),
    ("Training curves", "curves", ""),
    ("Response lengths", "response_lengths", "Truncated responses reached rollout.max_tokens; they are scored as they are."),
    ("Time", "phase_seconds", "Wall seconds of rank 0."),
    (
        "Occupancy and speculation",
        "occupancy",
        "The newest rollout on record. White: the replica waits for the others.",
    ),
    ("Acceptance of drafts", "acceptance", "Steps in which nothing was drafted are left out."),
    ("The toggle's boundary", "boundary", "Drafts pay at batch sizes where their line is below that of off."),
    ("Decisions", "decisions", "Step by step, on one replica."),
    ("Memory", "memory", "Peaks since the start of the process."),
)
"""Title, figure and explanation of the sections with figures, in the order of the page."""


def sections(runs: Sequence[RecordedRun]) -> list[Section]:
    """All sections of a page."""
    return [
        Section("At a glance", tables=[glance(runs)]),
        Section("Configuration", tables=configuration(runs)),
        *(_pictures(runs, *wanted) for wanted in PICTURES),
        _samples(runs),
        Section("Attempts and restarts", tables=[attempts(run, titled=len(runs) > 1) for run in runs]),
    ]


def _pictures(runs: Sequence[RecordedRun], title: str, figure: str, explanation: str) -> Section:
    """One figure of all runs, or one of each."""
    pictures, missing = [], []
    for shown in [runs] if figure in OVER_STEPS else [[run] for run in runs]:
        try:
            pictures.append(Picture(data_address(draw(figure, shown)), f"{title}: {', '.join(run.name for run in shown)}"))
        except NoData as reason:
            if figure == "occupancy" and (drawn := _drawn_by_the_run(shown[0])):
                pictures.append(drawn)
            else:
                missing.append(str(reason))
    return Section(title, [explanation] * bool(pictures and explanation) + missing, pictures)


def _drawn_by_the_run(run: RecordedRun) -> Picture | None:
    """The newest occupancy that the run itself drew: without speculation there are no traces to draw it from."""
    files = sorted((run.path / "tracking" / "figures").glob("occupancy_step_*.png"))
    with suppress(OSError):
        data = base64.b64encode(files[-1].read_bytes()).decode() if files else ""
        return Picture(f"data:image/png;base64,{data}", f"Occupancy: {run.name}") if data else None
    return None


def _samples(runs: Sequence[RecordedRun]) -> Section:
    tables = [table for run in runs for table in samples(run, titled=len(runs) > 1)]
    without = [run for run in runs if not samples(run, titled=False)]
    why = "no responses were kept; set evaluation.interval, tracking.train_samples_interval or train.save_rollouts"
    return Section("Samples", [f"{run.path}: {why}" for run in without], tables=tables)
