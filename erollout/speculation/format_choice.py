"""Choice of a format for each part of the drafter, by the highest predicted speed-up, not by the fewest bits. Pure.

A cycle drafts n tokens and verifies them at once. With T_T, T_D, T_V the seconds of a target step, a drafter step and a verify
pass, r = T_D / T_T, v = T_V / T_T and L the tokens that a cycle yields, the speed-up is L / (n r + v)
(EfficientRollout, arXiv 2606.18967). Every token of a draft is accepted with probability a where those before it are, so
L = 1 + a + a^2 + ... + a^n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """A format for one unit of layers, measured with all other units as in the target."""

    format: str
    seconds: float
    """Seconds of the unit's layers for one token."""
    acceptance: float
    """Acceptance of a draft token, in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Selection:
    formats: dict[str, str]
    """Format names by unit."""
    num_speculative_tokens: int
    """The best draft length, for which the speed-up is predicted."""
    acceptance: float
    """Predicted acceptance of a draft token."""
    speed_up: float
    """Predicted speed-up over autoregressive decoding."""


def expected_length(acceptance: float, num_speculative_tokens: int) -> float:
    """L: expected tokens per cycle, including the recovered or bonus token."""
    return sum(acceptance**i for i in range(num_speculative_tokens + 1))


def predicted_speed_up(acceptance: float, num_speculative_tokens: int, r: float, v: float) -> float:
    """Speed-up L / (n r + v) over autoregressive decoding."""
    return expected_length(acceptance, num_speculative_tokens) / (num_speculative_tokens * r + v)


def select(
    units: Mapping[str, Sequence[Choice]], other_seconds: float, target_seconds: float, max_tokens: int = 8
) -> Selection:
    """Choose a format for every unit: the best of all combinations.

    The losses -log(acceptance) of the units are added, which holds for small ones; a verify pass counts as one target step. The
    speed-up grows with acceptance and falls with seconds, so a combination dominated in both is dropped at once.

    Args:
        units: choices of each unit, at least one.
        other_seconds: seconds of a drafter step outside the units.
        target_seconds: seconds of a target step.
        max_tokens: longest draft length considered.
    """
    front = [_Combination(other_seconds, 1.0, {})]
    for unit, choices in units.items():
        front = _undominated([combination.with_choice(unit, choice) for combination in front for choice in choices])
    selections = [combination.predict(target_seconds, max_tokens) for combination in front]
    return max(selections, key=lambda selection: selection.speed_up)


@dataclass(frozen=True, slots=True)
class _Combination:
    """A choice for each of the first units."""

    seconds: float
    acceptance: float
    formats: dict[str, str]

    def with_choice(self, unit: str, choice: Choice) -> "_Combination":
        formats = self.formats | {unit: choice.format}
        return _Combination(self.seconds + choice.seconds, self.acceptance * choice.acceptance, formats)

    def predict(self, target_seconds: float, max_tokens: int) -> Selection:
        r = self.seconds / target_seconds
        speed_ups = {n: predicted_speed_up(self.acceptance, n, r, 1.0) for n in range(1, max_tokens + 1)}
        n = max(speed_ups, key=lambda length: speed_ups[length])
        return Selection(self.formats, n, self.acceptance, speed_ups[n])


def _undominated(combinations: list[_Combination]) -> list[_Combination]:
    """The combinations on the Pareto front of seconds and acceptance."""
    kept: list[_Combination] = []
    for combination in sorted(combinations, key=lambda c: (c.seconds, -c.acceptance)):
        if not kept or combination.acceptance > kept[-1].acceptance:
            kept.append(combination)
    return kept
