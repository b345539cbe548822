"""Output of the calibrate commands: identity of a calibration, accuracy of its fit and predictions, and savings."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from erollout.calibration import regret
from erollout.calibration.file import Calibration
from erollout.calibration.fit import Measured
from erollout.calibration.validate import NEAR, Lengths, Predictor, Validation, measured_cycles, validate
from erollout.speculation.cost.roofline import Roofline
from erollout.tracking.console import print_summary
from erollout.tracking.terminal import print_whole


def print_identity(calibration: Calibration) -> None:
    identity = calibration.identity
    rows = [
        ("model", calibration.model_name),
        ("sizes", identity.model),
        ("hardware", identity.hardware),
        ("tensor_model_parallel_size", identity.tensor_model_parallel_size),
        ("drafters", ", ".join(identity.formats)),
        ("dtype, kernels", f"{identity.dtype} {identity.kernels}".strip()),
        ("measured points", sum(len(points) for points in calibration.tables.values())),
        *calibration.provenance.items(),
    ]
    print_summary([(name, value) for name, value in rows if value not in ("", None)], title=calibration.source)


def print_accuracies(title: str, components: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("pass", "R2", "MAPE %", "bias %", "points"):
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for name, c in components.items():
        r2 = f"{c['r2']:.3f}" if "r2" in c else ""
        table.add_row(name, r2, f"{c['mape']:.2f}", f"{c['bias']:+.2f}", str(c["points"]))
    print_whole(table)


def print_signs(
    validations: Mapping[str, Validation],
    points: Sequence[Measured],
    predictors: Mapping[str, Predictor],
    assumption: str,
) -> None:
    """Print sign accuracies of all predictors, overall and at the point of the reference's figures near the boundary."""
    table = Table(title=f"does speculation pay? correct predictions, {assumption}", title_justify="left")
    table.add_column("")
    for name in validations:
        table.add_column(name, justify="right")
    table.add_row("overall", *(str(v.sign) for v in validations.values()))
    table.add_row(f"measured speed-up within {100 * NEAR:.0f} % of 1", *(str(v.near) for v in validations.values()))
    for n in next(iter(validations.values())).by_length:
        table.add_row(f"n = {n}", *(str(v.by_length[n]) for v in validations.values()))
    sevens = [p for p in points if p.num_speculative_tokens in (0, 7)]
    if len({p.num_speculative_tokens for p in sevens}) == 2:
        scores = [validate(sevens, predictor, lambda n: 6.0).sign for predictor in predictors.values()]
        table.add_row("n = 7 at L = 6", *map(str, scores))
    print_whole(table)


def print_regrets(points: Sequence[Measured], predictors: Mapping[str, Predictor], lengths: Lengths) -> None:
    cycles = measured_cycles(points)
    places = regret.measured_places(cycles, lengths)
    threshold = regret.best_threshold(places)
    choosers: dict[str, regret.Chooser] = {"off": regret.autoregressive}
    choosers |= {f"always {arm}": regret.always(arm) for arm in sorted({cycle.arm for cycle in cycles})}
    choosers[f"{threshold[1]} up to {threshold[0]} sequences (best in hindsight)"] = regret.below(*threshold)
    choosers |= {name: regret.predicted_best(predictor, lengths) for name, predictor in predictors.items()}
    table = Table(title="time lost against always choosing the best measured arm, %", title_justify="left")
    for heading in ("choice", "over the grid", "over a rollout"):
        table.add_column(heading, justify="left" if heading == "choice" else "right")
    for name, lost in regret.regrets(places, choosers).items():
        table.add_row(name, f"{100 * lost.grid:.2f}", f"{100 * lost.rollout:.2f}")
    print_whole(table)


def print_roofline(roofline: Roofline) -> None:
    costs = {"target": roofline.target, "verify": roofline.verify, **{f"draft {f}": c for f, c in roofline.draft.items()}}
    table = Table(title="roofline", title_justify="left")
    headings = ("pass", "TB/s", "TFLOP/s", "weights x", "cache x", "us/pass", "us/seq", "us/token", "us/1k context", "tile")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for name, c in costs.items():
        micro = (f"{1e6 * value:.1f}" for value in (c.per_pass, c.per_sequence, c.per_token, 1000 * c.per_context))
        rates = (f"{c.bandwidth / 1e12:.3g}", f"{c.compute / 1e12:.4g}", f"{c.weight_factor:.2f}", f"{c.kv_factor:.2f}")
        table.add_row(name, *rates, *micro, str(max(c.tile, c.sequence_tile)))
    print_whole(table)
