"""Which parts of the drafter get which format: the choice with the most predicted speed-up, not with the fewest bits. Pure.

A cycle drafts n tokens and verifies them at once; with T_T, T_D, T_V the seconds of a step of the target, a step of the drafter
and a verify pass, r = T_D / T_T, v = T_V / T_T and L the tokens that a cycle yields, the speed-up is L / (n r + v)
(EfficientRollout, arXiv 2606.18967). Every token of a draft is accepted with probability a where those before it are, so
L = 1 + a + a^2 + ... + a^n.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """A format for one unit of layers, measured with all others as the target has them."""

    format: str
    seconds: float
    """Of the unit's layers, for one token."""
    acceptance: float
    """Of a draft, in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Selection:
    formats: dict[str, str]
    """By unit."""
    num_speculative_tokens: int
    """The draft length that the speed-up is predicted for: the best."""
    acceptance: float
    """Predicted, of one draft."""
    speed_up: float
    """Predicted, over the target alone."""


def expected_length(acceptance: float, num_speculative_tokens: int) -> float:
    """L: tokens per cycle, the recovered or bonus token included."""
    return sum(acceptance**i for i in range(num_speculative_tokens + 1))


def predicted_speed_up(acceptance: float, num_speculative_tokens: int, r: float, v: float) -> float:
    """L / (n r + v)."""
    return expected_length(acceptance, num_speculative_tokens) / (num_speculative_tokens * r + v)


def select(
    units: Mapping[str, Sequence[Choice]], other_seconds: float, target_seconds: float, max_tokens: int = 8
) -> Selection:
    """Choose a format for every unit.

    The losses -log(acceptance) of the units add up, which holds for small ones. Starts from each unit's fastest format and
    changes one unit at a time while that helps; a verify pass counts as one step of the target.

    Args:
        units: the choices of each, at least one.
        other_seconds: of a step of the drafter outside the units.
        target_seconds: of a step of the target.
        max_tokens: longest draft to consider.
    """
    chosen = {unit: min(choices, key=lambda choice: choice.seconds) for unit, choices in units.items()}
    best = _predict(chosen, other_seconds, target_seconds, max_tokens)
    improved = True
    while improved:
        improved = False
        for unit, choices in units.items():
            for choice in choices:
                changed = _predict(chosen | {unit: choice}, other_seconds, target_seconds, max_tokens)
                if changed.speed_up > best.speed_up:
                    chosen, best, improved = chosen | {unit: choice}, changed, True
    return best


def _predict(chosen: Mapping[str, Choice], other_seconds: float, target_seconds: float, max_tokens: int) -> Selection:
    acceptance = math.prod(choice.acceptance for choice in chosen.values())
    r = (other_seconds + sum(choice.seconds for choice in chosen.values())) / target_seconds
    lengths = {n: predicted_speed_up(acceptance, n, r, 1.0) for n in range(1, max_tokens + 1)}
    n = max(lengths, key=lambda length: lengths[length])
    formats = {unit: choice.format for unit, choice in chosen.items()}
    return Selection(formats, n, acceptance, lengths[n])
