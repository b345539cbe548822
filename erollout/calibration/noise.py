"""How noisy a sweep was: the spread of its repeated steps, how far the roofline is from its points, and its outliers.

Noise moves the boundary: an error of 1 % in a pass is one of up to 1 % in a speed-up. A point that no other resembles mostly
did not run as meant, as where the cache was too small for the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, pi, sqrt
from statistics import median
from typing import Any

from erollout.calibration.fit import PASSES
from erollout.calibration.sweep_file import SweepRow
from erollout.speculation.cost.measured_table import MOST_OF_ITS_OWN, MeasuredTable
from erollout.speculation.cost.roofline import Pass

MOST_UNCERTAIN = 0.03
"""Relative uncertainty of a median above which a sweep is too noisy to tell where speculation pays."""
MOST_OFF = 0.1
"""Median relative error of the roofline, over the points of a pass, that is worth a warning; real kernels: a few per cent."""
MOST_OUTLIERS = 0.15
"""Share of all points."""
FEWEST_SAMPLES = 3
"""Fewest samples of a row for its spread to mean anything."""
NAMED = 8
"""Outliers that are printed."""
DISTINCT = {"batch": "batch size", "seq": "context", "gamma": "draft length"}
"""What a sweep varies, by column."""


@dataclass(frozen=True, slots=True)
class Noise:
    """All figures are relative."""

    spread: float
    """Standard deviation of a row's repeated steps over their median: the median row's."""
    uncertainty: float
    """Standard error of a row's median, by its spread: the median row's."""
    off: Mapping[str, float]
    """By pass, how far the roofline is from a point: the median point's. Noise, or what the roofline does not know."""
    outliers: Sequence[tuple[str, float]]
    """Points that lie further from what all others tell than MOST_OF_ITS_OWN, with how far; the furthest first."""
    points: int
    single: int
    """Rows of fewer than FEWEST_SAMPLES steps, whose spread says nothing."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "off": dict(self.off), "outliers": [list(outlier) for outlier in self.outliers]}

    def lines(self) -> list[str]:
        """For people, without warnings."""
        off = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.off.items())
        lines = [
            f"noise: repeated steps spread by {100 * self.spread:.2f} %, which makes medians uncertain by "
            f"{100 * self.uncertainty:.2f} %; the roofline is off by {off} (medians)"
        ]
        if self.outliers:
            named = "; ".join(f"{name} ({100 * value:+.0f} %)" for name, value in self.outliers[:NAMED])
            more = f"; and {len(self.outliers) - NAMED} more" if len(self.outliers) > NAMED else ""
            lines.append(f"outliers, of which the fit takes no more than {100 * MOST_OF_ITS_OWN:.0f} %: {named}{more}")
        return lines

    def warnings(self) -> list[str]:
        """What makes the sweep a bad witness; none when all is well."""
        again = "measure again on an idle machine, or longer (--minutes)"
        warnings = []
        if self.uncertainty > MOST_UNCERTAIN:
            warnings.append(
                f"medians are uncertain by {100 * self.uncertainty:.1f} %, above {100 * MOST_UNCERTAIN:.0f} %: {again}"
            )
        if 2 * self.single > self.points:
            warnings.append(
                f"{self.single} of {self.points} rows are of fewer than {FEWEST_SAMPLES} steps (n_samples), which say "
                f"nothing of the noise: {again}"
            )
        for name, value in self.off.items():
            if value > MOST_OFF:
                warnings.append(f"the roofline is off by {100 * value:.0f} % at the median point of {name}: {again}")
        if len(self.outliers) > MOST_OUTLIERS * self.points:
            warnings.append(
                f"{len(self.outliers)} of {self.points} points are outliers: a cache too small for the batch makes fewer "
                "sequences run than meant; leave such places out"
            )
        return warnings


def noise(rows: Sequence[SweepRow], tables: Mapping[tuple[Pass, str], MeasuredTable]) -> Noise:
    """Noise of a sweep. `tables`: those of the calibration that was fitted to it, by pass and format."""
    rows = [row for row in rows if row.mode in PASSES]
    repeated = [row for row in rows if row.n_samples >= FEWEST_SAMPLES]
    spreads = [row.std_ms / row.median_ms for row in repeated]
    errors = [sqrt(pi / 2 / row.n_samples) * row.std_ms / row.median_ms for row in repeated]
    off = {" ".join(key).strip(): median(abs(p.log_ratio) for p in table.points) for key, table in tables.items()}
    outliers = [
        (f"{' '.join(key).strip()} at batch {p.batch}, context {p.context:g}, n = {p.num_speculative_tokens}", exp(rest) - 1)
        for key, table in tables.items()
        for p, rest in table.alone
        if abs(rest) > MOST_OF_ITS_OWN
    ]
    outliers.sort(key=lambda outlier: -abs(outlier[1]))
    spread, error = (median(values) if values else 0.0 for values in (spreads, errors))
    return Noise(spread, error, off, outliers, len(rows), len(rows) - len(repeated))


def gaps(rows: Sequence[SweepRow]) -> list[str]:
    """What a sweep does not vary, so that nothing says how times change with it: one line each."""
    lines = []
    for column, name in DISTINCT.items():
        values = {getattr(row, column) for row in rows if row.mode in PASSES} - {0}
        if len(values) == 1:
            lines.append(
                f"the sweep has one {name} alone, {min(values)}: what others cost is a guess; measure a second one too"
            )
    return lines
