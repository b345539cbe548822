"""Figures of recorded runs by name, for `erollout plot` and the report."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from erollout.errors import UserError
from erollout.plots import training_curves as curves
from erollout.plots.rollout_traces import replica_decisions, rollout_occupancy, toggle_boundary
from erollout.tracking.recorded_run import RecordedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVER_STEPS: dict[str, Callable[[Sequence[RecordedRun]], "Figure"]] = {
    "reward": curves.reward_curve,
    "curves": curves.curves,
    "response_lengths": curves.response_lengths,
    "phase_seconds": curves.phase_seconds,
    "acceptance": curves.acceptance_over_steps,
    "memory": curves.memory,
}
"""Figures of one run or several, overlaid."""
OF_A_ROLLOUT = ("occupancy", "decisions", "boundary")
"""Figures of one run, from the traces of its rollouts."""
FIGURES = (*OVER_STEPS, *OF_A_ROLLOUT)


def draw(name: str, runs: Sequence[RecordedRun], step: int | None = None, replica: int = 0) -> "Figure":
    """A figure of FIGURES. Raises UserError; NoData if what it needs was not tracked.

    Args:
        step: step of the rollout, counted from 1; None: the newest with a trace. For OF_A_ROLLOUT only.
        replica: for `decisions` only.
    """
    if name in OVER_STEPS:
        if step is not None:
            raise UserError(f"--step = {step}: {name} shows all steps; leave it out, or use --figure {OF_A_ROLLOUT[0]}")
        return OVER_STEPS[name](runs)
    if len(runs) > 1:
        raise UserError(f"--figure = {name} shows one run, but {len(runs)} are named; name one")
    if name == "decisions":
        return replica_decisions(runs[0], step, replica)
    return (rollout_occupancy if name == "occupancy" else toggle_boundary)(runs[0], step)
