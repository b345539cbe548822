"""Plots of simulated rollouts as PNG files, for `erollout simulate --out`."""

from collections.abc import Sequence
from pathlib import Path

from erollout.errors import UserError
from erollout.plots.replica_timeline import Lane, occupancy
from erollout.plots.simulated_rollouts import Bar, rollout_times, utilisation
from erollout.simulation.experiment import SimulatedRollout, Strategy
from erollout.simulation.replica import BusySpan
from erollout.simulation.report import Summary
from erollout.speculation.trace import Bin, binned

BINS = 200
"""Number of bins over a rollout's time."""


def draw(out: Path, outcomes: Sequence[SimulatedRollout], summaries: Sequence[Summary]) -> None:
    """Draw `rollouts.png`, `utilisation.png` and `occupancy-<strategy>.png` of its first rollout. Raises UserError."""
    bars = [
        Bar(s.strategy.mode, f"{s.strategy.policy}, {s.strategy.dispatch}", s.seconds.mean, s.seconds.half) for s in summaries
    ]
    figures = {"rollouts": rollout_times(bars)}
    first: dict[Strategy, SimulatedRollout] = {}
    for outcome in outcomes:
        first.setdefault(outcome.strategy, outcome)
    shares = {}
    for strategy, outcome in first.items():
        lanes = [
            Lane(f"replica {index}", outcome.seconds, bins_of(spans, outcome.seconds))
            for index, spans in enumerate(outcome.spans)
        ]
        figures[f"occupancy-{'-'.join((strategy.mode, strategy.policy, strategy.dispatch))}"] = occupancy(
            lanes, title=str(strategy)
        )
        at = [index * outcome.seconds / BINS for index in range(BINS)]
        shares[str(strategy)] = at, [sum(lane.bins[index].busy for lane in lanes) / len(lanes) for index in range(BINS)]
    figures["utilisation"] = utilisation(shares)
    try:
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png", dpi=120)
    except OSError as error:
        raise UserError(f"can't write to --out {out}: {error.strerror}") from error


def bins_of(spans: Sequence[BusySpan], seconds: float) -> list[Bin]:
    """Means over equal parts of [0, seconds)."""
    return binned(((s.start, s.end, s.running, 0.0, s.arm.num_speculative_tokens) for s in spans), BINS, seconds)
