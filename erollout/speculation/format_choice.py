"""Which parts of the drafter get which format: the choice with the most predicted speed-up, not with the fewest bits. Pure.

A cycle drafts n tokens and verifies them at once; with T_T, T_D, T_V the seconds of a step of the target, a step of the drafter
and a verify pass, r = T_D / T_T, v = T_V / T_T and L the tokens that a cycle yields, the speed-up is L / (n r + v)
(EfficientRollout, arXiv 2606.18967). Every token of a draft is accepted with probability a where those before it are, so
L = 1 + a + a^2 + ... + a^n.
"""

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
    """Choose a format for every unit: the best of all combinations.

    The losses -log(acceptance) of the units add up, which holds for small ones; a verify pass counts as one step of the target.
    The speed-up grows with the acceptance and falls with the seconds: a combination that another one beats in both is dropped
    as soon as it is seen.

    Args:
        units: the choices of each, at least one.
        other_seconds: of a step of the drafter outside the units.
        target_seconds: of a step of the target.
        max_tokens: longest draft to consider.
    """
    front = [_Combination(other_seconds, 1.0, {})]
    for unit, choices in units.items():
        front = _undominated([combination.with_choice(unit, choice) for combination in front for choice in choices])
    selections = [combination.predict(target_seconds, max_tokens) for combination in front]
    return max(selections, key=lambda selection: selection.speed_up)


@dataclass(frozen=True, slots=True)
class _Combination:
    """Choices for some units."""

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
    """Those that no other one beats or equals in both seconds and acceptance."""
    kept: list[_Combination] = []
    for combination in sorted(combinations, key=lambda c: (c.seconds, -c.acceptance)):
        if not kept or combination.acceptance > kept[-1].acceptance:
            kept.append(combination)
    return kept
