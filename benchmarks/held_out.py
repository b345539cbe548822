"""How well a calibration tells where speculation pays at points that it was not fitted to.

    erollout calibrate fit --csv sweep.csv --out calibration.json
    python benchmarks/held_out.py --config calibration.json --csv sweep.csv [--against reference.json]

Each batch size, each draft length and each context of the sweep is left out in turn, the rest is fitted, and the cycles left
out are predicted. Prints the share of right answers to "does it pay here" at each acceptance rate, of all cycles and of those
near the boundary, and the error of a cycle's predicted cost over the target's, in the middle and of nine in ten.
"""

import argparse
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path
from statistics import median, quantiles

from erollout.calibration.file import Calibration, load_calibration
from erollout.calibration.fit import Measured, fit, measured_passes
from erollout.calibration.sweep_file import read_sweep
from erollout.calibration.validate import NEAR, Cycle, Score, lengths_at, measured_cycles
from erollout.speculation.cost.cost_model import PassTimes

LEFT_OUT = {"a batch size": "batch", "a draft length": "num_speculative_tokens", "a context": "context"}
"""Fields of passes and cycles, by name."""
Predictions = Sequence[tuple[Cycle, PassTimes]]
"""Cycles, and what predicts each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="calibration that was fitted to the sweep")
    parser.add_argument("--csv", required=True, help="sweep")
    parser.add_argument("--against", help="calibration to compare with, ours or the reference's, as it is")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.85, 0.9, 0.95, 0.97])
    options = parser.parse_args()
    calibration = load_calibration(options.config)
    points = measured_passes(read_sweep(options.csv), calibration.identity.formats[0])
    cycles = measured_cycles(points)
    near = [sum(_near(cycle, acceptance) for cycle in cycles) for acceptance in options.acceptance]
    counts = ", ".join(f"{count} at {acceptance:g}" for count, acceptance in zip(near, options.acceptance, strict=True))
    print(f"{len(cycles)} cycles; near the boundary {counts}\n")
    print("| left out | " + " | ".join(f"{a:g} | near" for a in options.acceptance) + " | median error | 90 % |")
    print("|---|" + "---|" * (2 * len(options.acceptance) + 2))
    for name, field in LEFT_OUT.items():
        if len({getattr(cycle, field) for cycle in cycles}) > 1:
            _print(name, list(_held_out(points, cycles, field, calibration)), options.acceptance)
    whole = {"nothing": calibration}
    if options.against:
        whole[f"nothing, {Path(options.against).name}"] = load_calibration(options.against)
    for name, known in whole.items():
        passes = known.passes()
        _print(name, [(cycle, passes) for cycle in cycles], options.acceptance)


def _held_out(
    points: Sequence[Measured], cycles: Sequence[Cycle], field: str, calibration: Calibration
) -> Iterator[tuple[Cycle, PassTimes]]:
    """Each cycle with what is known without its value of the field."""
    for value in sorted({getattr(cycle, field) for cycle in cycles}):
        rest = [p for p in points if getattr(p, field) != value]
        passes = fit(rest, calibration.roofline.size, calibration.identity).passes()
        yield from ((cycle, passes) for cycle in cycles if getattr(cycle, field) == value)


def _near(cycle: Cycle, acceptance: float) -> bool:
    return abs(cycle.speed_up(lengths_at(acceptance)(cycle.num_speculative_tokens)) - 1) < NEAR


def _print(name: str, predicted: Predictions, acceptances: Sequence[float]) -> None:
    cells = []
    for acceptance in acceptances:
        lengths, sign, near = lengths_at(acceptance), Score(), Score()
        for cycle, passes in predicted:
            length = lengths(cycle.num_speculative_tokens)
            right = (cycle.speed_up(length) > 1) == (passes.speed_up(cycle.arm, cycle.batch, cycle.context, length) > 1)
            sign.add(right)
            if _near(cycle, acceptance):
                near.add(right)
        cells += [f"{100 * score.share:.1f} %" for score in (sign, near)]
    errors = [
        abs(log(passes.speed_up(cycle.arm, cycle.batch, cycle.context, 1.0) / cycle.speed_up(1.0)))
        for cycle, passes in predicted
    ]
    cells += [f"{100 * error:.1f} %" for error in (median(errors), quantiles(errors, n=10)[-1])]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
