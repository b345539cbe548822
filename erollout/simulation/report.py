"""Summary of the simulated strategies: means with confidence intervals, as a table, CSV and JSON."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table

from erollout.errors import UserError
from erollout.simulation.experiment import SimulatedRollout, Strategy

_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Quantiles at 97.5 % of Student's t, for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Estimate:
    mean: float
    half: float
    """Half of the 95 % confidence interval of the mean; 0 for one value."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        if len(values) == 1:
            return cls(values[0], 0.0)
        quantile = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1]
        return cls(fmean(values), quantile * stdev(values) / len(values) ** 0.5)

    def show(self, form: str = ".2f", scale: float = 1.0) -> str:
        text = f"{self.mean * scale:{form}}"
        return f"{text} ±{self.half * scale:{form}}" if self.half else text


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of one strategy, over all rollouts after the warm-up."""

    strategy: Strategy
    seconds: Estimate
    saved: Estimate | None
    """Share of time saved against autoregressive decoding with the same coordination and lengths; None without that."""
    step_seconds: Estimate
    busy: Estimate
    batch: Estimate
    speculating: Estimate
    regret: Estimate
    moved: Estimate
    """Number of migrated sequences."""


def summarize(outcomes: Sequence[SimulatedRollout], rest_seconds: float) -> list[Summary]:
    """Summaries by strategy, in order. `rest_seconds`: seconds of an RL step outside the rollout."""
    by_strategy: dict[Strategy, list[SimulatedRollout]] = {}
    for outcome in outcomes:
        by_strategy.setdefault(outcome.strategy, []).append(outcome)
    return [_summary(strategy, some, by_strategy, rest_seconds) for strategy, some in by_strategy.items()]


def rest_of_step(outcomes: Sequence[SimulatedRollout], rollout_share: float) -> float:
    """Seconds of an RL step outside the rollout, when the rollout has this share of one with autoregressive decoding."""
    seconds = [outcome.seconds for outcome in outcomes if outcome.strategy.mode == "off"] or [o.seconds for o in outcomes]
    return fmean(seconds) * (1 - rollout_share) / rollout_share


def table(summaries: Sequence[Summary], title: str) -> Table:
    """A table of the summaries, with 95 % confidence intervals."""
    result = Table(title=title, title_justify="left")
    result.add_column("mode", no_wrap=True)
    result.add_column("policy, dispatch", no_wrap=True)
    columns = ("rollout s", "saved %", "step s", "busy %", "batch", "drafting %", "regret %", "moved")
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for s in summaries:
        saved = s.saved.show(".1f", 100) if s.saved else ""
        result.add_row(
            *(s.strategy.mode, f"{s.strategy.policy}, {s.strategy.dispatch}", s.seconds.show(), saved, s.step_seconds.show()),
            *(f"{100 * s.busy.mean:.1f}", f"{s.batch.mean:.1f}", f"{100 * s.speculating.mean:.1f}"),
            *(s.regret.show(".2f", 100), f"{s.moved.mean:.0f}"),
        )
    return result


def write(out: Path, outcomes: Sequence[SimulatedRollout], summaries: Sequence[Summary], setting: dict[str, object]) -> None:
    """Write `rollouts.csv`, one line per rollout, and `summary.json`, setting and means. Raises UserError."""
    names = [field.name for field in fields(SimulatedRollout) if field.name not in ("strategy", "spans")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "rollouts.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mode", "policy", "dispatch", *names])
            for o in outcomes:
                s = o.strategy
                writer.writerow([s.mode, s.policy, s.dispatch, *(getattr(o, name) for name in names)])
        tree = {"setting": setting, "strategies": [asdict(summary) for summary in summaries]}
        (out / "summary.json").write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"can't write to --out {out}: {error.strerror}") from error


def _summary(
    strategy: Strategy,
    some: Sequence[SimulatedRollout],
    by_strategy: dict[Strategy, list[SimulatedRollout]],
    rest_seconds: float,
) -> Summary:
    off = by_strategy.get(Strategy("off", strategy.policy, strategy.dispatch))
    off = off or next((outcomes for other, outcomes in by_strategy.items() if other.mode == "off"), None)
    saved = Estimate.of([1 - o.seconds / base.seconds for o, base in zip(some, off, strict=True)]) if off else None
    return Summary(
        strategy,
        seconds=Estimate.of([o.seconds for o in some]),
        saved=saved,
        step_seconds=Estimate.of([o.seconds + rest_seconds for o in some]),
        busy=Estimate.of([o.busy for o in some]),
        batch=Estimate.of([o.batch for o in some]),
        speculating=Estimate.of([o.speculating for o in some]),
        regret=Estimate.of([o.regret for o in some]),
        moved=Estimate.of([float(o.sequences_moved) for o in some]),
    )
