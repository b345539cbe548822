"""Pictures of the last training rollout, or of any: who was busy when, with what drafts, and what became of them."""

from typing import TYPE_CHECKING

from erollout.pictures.acceptance import Accepted, acceptance
from erollout.pictures.occupancy import Lane, occupancy
from erollout.rollout import RolloutResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rollout_figures(result: RolloutResult, drafter: str) -> dict[str, "Figure"]:
    """By name. `drafter`: name of the default format, for the legend."""
    lanes = [Lane(f"replica {index}", course.seconds, course.bins) for index, course in enumerate(result.courses)]
    speculation = result.speculation
    figures = {"occupancy": occupancy(lanes)}
    if speculation.num_drafts:
        accepted = Accepted(drafter, speculation.drafted_at, speculation.accepted_at)
        figures["acceptance"] = acceptance([accepted])
    return figures
