"""Noise of a sweep: the spread of repeated steps, the roofline's distance from the points, and outliers.

Noise moves the boundary: an error of 1 % in a pass is one of up to 1 % in a speed-up. Most outliers did not run as meant, for
example because the cache was too small for the batch.
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
"""Median relative error of the roofline over a pass's points that triggers a warning; real kernels have a few per cent."""
MOST_OUTLIERS = 0.15
"""Share of outliers among all points that triggers a warning."""
FEWEST_SAMPLES = 3
"""Least number of samples per row for a meaningful spread."""
NAMED = 8
"""Number of outliers printed."""
DISTINCT = {"batch": "batch size", "seq": "context", "gamma": "draft length"}
"""Quantities that a sweep varies, by column."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise figures of a sweep, all relative."""

    spread: float
    """Standard deviation of repeated steps over their median; median over rows."""
    uncertainty: float
    """Standard error of a row's median, from its spread; median over rows."""
    off: Mapping[str, float]
    """Relative error of the roofline by pass, median over points: noise, or effects that the roofline lacks."""
    outliers: Sequence[tuple[str, float]]
    """Points further than MOST_OF_ITS_OWN from the prediction of all others, with their distance; the furthest first."""
    points: int
    single: int
    """Number of rows with fewer than FEWEST_SAMPLES steps, whose spread says nothing."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "off": dict(self.off), "outliers": [list(outlier) for outlier in self.outliers]}

    def lines(self) -> list[str]:
        """Lines to print, without warnings."""
        off = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.off.items())
        lines = [
            f"noise: repeated steps spread by {100 * self.spread:.2f} %, so medians are uncertain by "
            f"{100 * self.uncertainty:.2f} %; the roofline is off by {off} (medians)"
        ]
        if self.outliers:
            named = "; ".join(f"{name} ({100 * value:+.0f} %)" for name, value in self.outliers[:NAMED])
            more = f"; and {len(self.outliers) - NAMED} more" if len(self.outliers) > NAMED else ""
            lines.append(f"outliers, of which the fit takes no more than {100 * MOST_OF_ITS_OWN:.0f} %: {named}{more}")
        return lines

    def warnings(self) -> list[str]:
        """Reasons not to trust the sweep, one line each; none if all is well."""
        again = "measure again on an idle machine, or longer (--minutes)"
        warnings = []
        if self.uncertainty > MOST_UNCERTAIN:
            warnings.append(
                f"medians are uncertain by {100 * self.uncertainty:.1f} %, above {100 * MOST_UNCERTAIN:.0f} %: {again}"
            )
        if 2 * self.single > self.points:
            warnings.append(
                f"{self.single} of {self.points} rows have fewer than {FEWEST_SAMPLES} steps (n_samples), which says "
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
    """Noise of a sweep. `tables`: tables of the calibration fitted to it, by pass and format."""
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
    """Quantities that the sweep does not vary, so that their effect on times is unknown: one line each."""
    lines = []
    for column, name in DISTINCT.items():
        values = {getattr(row, column) for row in rows if row.mode in PASSES} - {0}
        if len(values) == 1:
            lines.append(
                f"the sweep has a single {name}, {min(values)}: the cost of others is a guess; measure a second one too"
            )
    return lines
