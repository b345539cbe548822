"""Fit of a calibration to a sweep: the roofline's coefficients by robust least squares, then a table of the residuals.

Residuals are logarithms of measured over predicted seconds, so relative errors of short and long passes weigh the same. A
soft_l1 loss limits the weight of points that did not run as meant (with a full cache, fewer sequences run). Weak priors fix
what few points do not determine, so a sweep of five seconds gives a usable roofline too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from erollout.calibration.devices import Hardware, find_hardware
from erollout.calibration.file import REFERENCE_FORMAT, Calibration, Identity
from erollout.calibration.sweep_file import SweepRow
from erollout.errors import UserError
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.cost.measured_table import Point
from erollout.speculation.cost.roofline import Communication, ModelSize, Pass, PassCost, Roofline, parts_of

PASSES: Mapping[str, Pass] = {"target_decode": "target", "drafter_decode": "draft", "target_verify": "verify"}
"""Kinds of pass by mode of a sweep. target_decode_sd, an AR step of an engine with an idle drafter, is not used here."""
TILES = (1, 16, 32, 64, 128, 256)
"""Candidate tile sizes of matmuls, in tokens."""
SEQUENCE_TILES = (1, 4, 8, 16, 32)
"""Candidate steps, in sequences, in which the drafter's overhead grows."""
SHAPE_EVIDENCE = 1.0
"""Least log likelihood ratio for preferring a tile to none: few points do not show one."""
FLOOR = 0.02
"""Log residual expected at any point: closer fits count as equal."""
OUTLIER = 0.05
"""Log residual beyond which a point's weight falls."""
TOLERANCE, MOST_STEPS = 1e-5, 100
"""Limits of a search: coefficients that the points do not determine would otherwise keep it going for seconds."""
AT_BOUND = 1e-3
"""Distance from a bound, in the units of the search, within which a coefficient counts as at the bound."""
PRIOR_WEIGHT = 0.01
"""Weight of a coefficient's prior, relative to a point's."""


Shape = TypeVar("Shape")
"""Discrete parameters of a search, chosen from a list."""
Costs = TypeVar("Costs", bound=tuple[PassCost, ...])
"""Pass costs of a search, one for each group of points."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured pass of a sweep."""

    kind: Pass
    format: str
    """"" for target and verify."""
    batch: int
    context: float
    num_speculative_tokens: int
    seconds: float


def measured_passes(rows: Sequence[SweepRow], format: str = REFERENCE_FORMAT) -> list[Measured]:
    """The rows that a calibration is fitted to, with their medians. `format`: drafter format if rows do not state it."""
    return [
        Measured(
            PASSES[row.mode],
            (row.format or format) if row.mode == "drafter_decode" else "",
            row.batch,
            float(row.seq),
            row.gamma,
            row.median_ms / 1e3,
        )
        for row in rows
        if row.mode in PASSES
    ]


def fit(
    points: Sequence[Measured],
    size: ModelSize,
    identity: Identity,
    model_name: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> Calibration:
    """Fit a calibration to measured passes: at least one of the target, of the verify pass and of each drafter.

    The peaks of the identity's hardware, if known, bound the coefficients; all-reduces are assumed to have typical costs.

    Raises UserError if one of these passes is missing.
    """
    _check_complete(points, identity.formats)
    hardware = find_hardware(identity.hardware)
    links = hardware.communication if size.reduces else Communication()
    target, verify, bounds = _fit_target(points, size, links, hardware)
    drafts, at_bounds = {}, {"target and verify": bounds}
    for format in identity.formats:
        drafts[format], at_bounds[f"draft {format}"] = _fit_draft(points, format, size, links, target)
    roofline = Roofline(size, target, verify, drafts, links)
    diagnostics = {"roofline": _accuracies(points, roofline), "at bounds": at_bounds}
    return Calibration(identity, roofline, _tables(points, roofline), model_name, dict(provenance or {}), diagnostics)


def _check_complete(points: Sequence[Measured], formats: Sequence[str]) -> None:
    present = {(p.kind, p.format) for p in points}
    needed: list[tuple[Pass, str]] = [("target", ""), ("verify", ""), *(("draft", format) for format in formats)]
    missing = [" ".join(key).strip() for key in needed if key not in present]
    if missing or not formats:
        raise UserError(f"the sweep has no times of {', '.join(missing) or 'any drafter'}; measure them too")


class _Passes:
    """The measured points of one kind of pass, as arrays."""

    def __init__(self, points: Sequence[Measured], size: ModelSize, links: Communication) -> None:
        self.measured = np.array([p.seconds for p in points])
        self._size, self._links = size, links
        self._weights = np.array([size.draft_bytes[p.format] if p.kind == "draft" else size.weight_bytes for p in points])
        self._batch = np.array([float(p.batch) for p in points])
        self._context = np.array([p.context for p in points])
        self._width = np.array([p.num_speculative_tokens + 1.0 for p in points])
        self._per_sequence = self._width if points[0].kind == "verify" else np.ones_like(self._width)

    def seconds(self, cost: PassCost) -> NDArray[np.float64]:
        """The roofline's seconds of every point."""
        rows = self._weights, self._batch, self._context, self._width, self._per_sequence
        return parts_of(self._size, cost, self._links, *rows).seconds


def _fit_target(
    points: Sequence[Measured], size: ModelSize, links: Communication, peaks: Hardware
) -> tuple[PassCost, PassCost, list[str]]:
    """Fit target and verify pass together: they share weights and matmuls, but not cache reads and overheads."""
    mine = [p for p in points if p.kind != "draft"]
    groups = [_Passes([p for p in mine if p.kind == kind], size, links) for kind in ("target", "verify")]
    unit = min(p.seconds for p in mine)
    fastest = max(size.flops * p.batch * (p.num_speculative_tokens + 1) / p.seconds for p in mine)
    bandwidth = min(size.weight_bytes / unit, 0.8 * peaks.bandwidth)
    compute = min(2 * fastest, 0.8 * peaks.compute)
    search = [
        _Coefficient("bandwidth", log(bandwidth), log(bandwidth) - 1, log(min(peaks.bandwidth, 100 * bandwidth))),
        _Coefficient("compute", log(compute), log(compute) - 1.5, log(min(peaks.compute, 1e4 * compute))),
        *(replace(c, name=f"{kind} {c.name}") for kind in ("target", "verify") for c in _own_search(mine)),
        _Coefficient("verify per_token", 0.001, 0.0, 0.2),
    ]

    def costs(x: NDArray[np.float64], tile: int) -> tuple[PassCost, PassCost]:
        shared = PassCost(float(np.exp(x[0])), float(np.exp(x[1])), tile=tile)
        return _own(shared, x[2:6], unit), replace(_own(shared, x[6:10], unit), per_token=float(x[10]) * unit)

    (target, verify), bounds = _search(groups, costs, search, TILES, _places(mine))
    return target, verify, bounds


def _fit_draft(
    points: Sequence[Measured], format: str, size: ModelSize, links: Communication, target: PassCost
) -> tuple[PassCost, list[str]]:
    """Fit one drafter: reading its weights and computing may be slower or faster than for the target."""
    mine = [p for p in points if p.kind == "draft" and p.format == format]
    unit = min(p.seconds for p in mine)
    search = [_Coefficient("weight_factor", 0.0, -1.5, 2.5), _Coefficient("compute", 0.0, -3.0, 4.0), *_own_search(mine)]

    def costs(x: NDArray[np.float64], shape: tuple[int, bool]) -> tuple[PassCost]:
        factor, compute = float(np.exp(x[0])), target.compute * float(np.exp(x[1]))
        shared = replace(target, compute=compute, weight_factor=factor, tile=1, sequence_tile=shape[0], padded=shape[1])
        return (_own(shared, x[2:6], unit),)

    shapes = [(tile, padded) for padded in (False, True) for tile in SEQUENCE_TILES]
    (cost,), bounds = _search([_Passes(mine, size, links)], costs, search, shapes, _places(mine))
    return cost, bounds


def _places(points: Sequence[Measured]) -> int:
    """Number of distinct points that say something about tiles: contexts don't count."""
    return len({(p.batch, p.num_speculative_tokens) for p in points})


@dataclass(frozen=True, slots=True)
class _Coefficient:
    """A coefficient of the search: its prior value and its bounds."""

    name: str
    start: float
    low: float
    high: float
    weight: float = PRIOR_WEIGHT
    """Weight of the prior value, relative to a point's."""


_OWN = (
    _Coefficient("kv_factor", 0.0, -3.0, 1.5, 5 * PRIOR_WEIGHT),
    _Coefficient("per_pass", 0.05, 0.0, 1.0, 10 * PRIOR_WEIGHT),
    _Coefficient("per_sequence", 0.01, 0.0, 0.5),
    _Coefficient("per_context", 0.01, 0.0, 1.0),
)
"""Coefficients of each pass: log kv_factor; per_pass, per_sequence and per_context in units of the shortest measured pass."""
_CONTEXT_UNIT = 1000
"""Unit of per_context in the search, in tokens."""
_BY_CONTEXT = ("kv_factor", "per_context")
"""Coefficients that points of a single context do not determine: any growth with the batch could be due to them."""


def _own_search(points: Sequence[Measured]) -> tuple[_Coefficient, ...]:
    contexts = [p.context for p in points]
    if max(contexts) >= 2 * min(contexts):
        return _OWN
    return tuple(replace(c, weight=1.0) if c.name in _BY_CONTEXT else c for c in _OWN)


def _own(cost: PassCost, x: NDArray[np.float64], unit: float) -> PassCost:
    per_pass, per_sequence, per_context = (float(value) * unit for value in x[1:])
    kv_factor = float(np.exp(x[0]))
    return replace(
        cost, kv_factor=kv_factor, per_pass=per_pass, per_sequence=per_sequence, per_context=per_context / _CONTEXT_UNIT
    )


def _search(
    groups: Sequence[_Passes],
    costs: Callable[[NDArray[np.float64], Shape], Costs],
    coefficients: Sequence[_Coefficient],
    shapes: Sequence[Shape],
    places: int,
) -> tuple[Costs, list[str]]:
    """The costs with the least loss, without tiles (the first shape) unless another shape is clearly better.

    Also returns the names of the coefficients that ended at a bound: evidence against the model, or none for the coefficient.
    """
    start, low, high, weight = (np.array([getattr(c, f) for c in coefficients]) for f in ("start", "low", "high", "weight"))

    def residuals(x: NDArray[np.float64], shape: Shape) -> NDArray[np.float64]:
        pairs = zip(groups, costs(x, shape), strict=True)
        return np.concatenate([*(np.log(g.seconds(cost) / g.measured) for g, cost in pairs), weight * (x - start)])

    floor = 0.5 * FLOOR**2 * sum(len(group.measured) for group in groups)
    best, least = None, float("inf")
    for shape in shapes:
        found = least_squares(
            residuals,
            start,
            bounds=(low, high),
            loss="soft_l1",
            f_scale=OUTLIER,
            args=(shape,),
            ftol=TOLERANCE,
            max_nfev=MOST_STEPS,
        )
        loss = found.cost + floor
        if best is None or places * log(least / loss) > (SHAPE_EVIDENCE if best[1] == shapes[0] else 0):
            best, least = (found.x, shape), loss
    assert best
    x, shape = best
    at_bounds = [c.name for c, value in zip(coefficients, x, strict=True) if min(value - c.low, c.high - value) < AT_BOUND]
    return costs(x, shape), at_bounds


def _residual(point: Measured, roofline: Roofline) -> float:
    predicted = roofline.seconds(point.kind, point.format, point.batch, point.context, point.num_speculative_tokens)
    return log(predicted / point.seconds)


def _tables(points: Sequence[Measured], roofline: Roofline) -> dict[tuple[Pass, str], tuple[Point, ...]]:
    tables: dict[tuple[Pass, str], list[Point]] = {}
    for p in points:
        point = Point(p.batch, p.context, p.num_speculative_tokens, -_residual(p, roofline))
        tables.setdefault((p.kind, p.format), []).append(point)
    return {key: tuple(table) for key, table in tables.items()}


def _accuracies(points: Sequence[Measured], roofline: Roofline) -> dict[str, dict[str, float]]:
    """Accuracy of the roofline alone by component: the table is exact at its points."""

    def passes(_: int) -> PassTimes:
        return PassTimes(roofline)

    keys = dict.fromkeys((p.kind, p.format) for p in points)
    return {" ".join(key).strip(): accuracy([p for p in points if (p.kind, p.format) == key], passes) for key in keys}


def accuracy(points: Sequence[Measured], passes_for: Callable[[int], PassTimes]) -> dict[str, float]:
    """R2 of the seconds (none if all are equal), mean absolute error, mean relative error in per cent and number of points.

    `passes_for`: returns the pass times that predict a given batch size.
    """
    true = np.array([p.seconds for p in points])
    guess = np.array(
        [passes_for(p.batch).seconds(p.kind, p.format, p.batch, p.context, p.num_speculative_tokens) for p in points]
    )
    spread = float(((true - true.mean()) ** 2).sum())
    relative = guess / true - 1
    r2 = {"r2": 1 - float(((guess - true) ** 2).sum()) / spread} if spread else {}
    return {
        **r2,
        "mape": 100 * float(np.abs(relative).mean()),
        "bias": 100 * float(relative.mean()),
        "points": len(points),
    }
