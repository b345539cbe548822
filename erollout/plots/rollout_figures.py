"""Plots of a rollout: replica timeline, accepted drafts, and one replica's decisions."""

from typing import TYPE_CHECKING

from erollout.plots.accepted_drafts import Accepted, acceptance
from erollout.plots.decision_timeline import decisions
from erollout.plots.replica_timeline import Lane, Transfer, occupancy
from erollout.rollout.rollout_worker import RolloutResult
from erollout.speculation.toggle import Toggle

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rollout_figures(result: RolloutResult, toggle: Toggle | None, subject: str) -> dict[str, "Figure"]:
    """Plots by name.

    Args:
        toggle: that of the replica whose decisions are drawn, before its next rollout.
        subject: run, model and step, for the titles.
    """
    lanes = [Lane(f"replica {index}", summary.seconds, summary.bins) for index, summary in enumerate(result.summaries)]
    moves = result.summaries[0].moves if result.summaries else []
    figures = {
        "occupancy": occupancy(
            lanes, [Transfer(s, m.source, m.target, m.num_sequences) for s, m in moves], f"Rollout: {subject}"
        )
    }
    speculation = result.speculation
    if speculation.num_drafts:
        figures["acceptance"] = acceptance(
            [Accepted("drafts", speculation.drafted_at, speculation.accepted_at)], f"Accepted drafts: {subject}"
        )
    if toggle is not None:
        figures["decisions"] = decisions(toggle.trace, toggle.cost.step_seconds, f"Decisions of replica 0: {subject}")
    return figures
