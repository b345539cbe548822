"""Plot of accepted drafts by position, and of the tokens per pass that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import sqrt
from operator import mul
from typing import TYPE_CHECKING

from erollout.plots.style import MUTED, SERIES, figure, legend_beside, plain, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Z = 1.96
"""Standard deviations of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Accepted drafts of one drafter in one rollout."""

    name: str
    drafted_at: Sequence[int]
    """Number of tokens drafted at the first, second, ... position."""
    accepted_at: Sequence[int]
    """Number of these that were accepted."""
    prior: Sequence[float] = ()
    """Conditional acceptance by position that was expected before the rollout."""


def acceptance(series: Sequence[Accepted], title: str = "Accepted drafts") -> "Figure":
    """Share of first, second, ... draft tokens that were accepted, with 95 % Wilson intervals and the prior, beside the tokens
    per pass for each draft length."""
    made = figure(10, 4, title)
    shares, tokens = made.subplots(1, 2)
    plain(shares, "position in the draft", "share accepted")
    plain(tokens, "num_speculative_tokens", "tokens per pass of the target")
    longest = max((len(_counted(s)) or len(s.prior) for s in series), default=0)
    if not longest:
        say(shares, "nothing was drafted")
        say(tokens, "")
        return made
    for color, one in zip(SERIES * len(series), series, strict=False):
        _draw_shares(shares, one, color, longest)
        _draw_tokens(tokens, one, color, longest)
    tokens.plot(range(longest + 1), range(1, longest + 2), color=MUTED, linewidth=1, linestyle=":", label="all accepted")
    lowest = [value for one in series for value in (*_shares(one), *_prior(one, longest))]
    shares.set_ylim(0 if min(lowest) < 0.5 else 0.4, 1.02)
    shares.set_xticks(range(1, longest + 1))
    shares.set_xlim(0.6, longest + 0.4)
    tokens.set_xticks(range(longest + 1))
    legend_beside(tokens)
    return made


def interval(accepted: int, drafted: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    share, square = accepted / drafted, Z * Z / drafted
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * sqrt(share * (1 - share) / drafted + square / drafted / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def _counted(one: Accepted) -> list[tuple[int, int]]:
    """Accepted and drafted counts, up to the last position with a draft."""
    pairs = list(zip(one.accepted_at, one.drafted_at, strict=True))
    while pairs and not pairs[-1][1]:
        pairs.pop()
    return [pair for pair in pairs if pair[1]]


def _shares(one: Accepted) -> list[float]:
    return [accepted / drafted for accepted, drafted in _counted(one)]


def _prior(one: Accepted, longest: int) -> list[float]:
    """Expected share of all drafts accepted at each position."""
    return list(accumulate(one.prior[:longest], mul))


def _draw_shares(axes: "Axes", one: Accepted, color: str, longest: int) -> None:
    if counts := _counted(one):
        at = range(1, len(counts) + 1)
        low, high = zip(*(interval(*pair) for pair in counts), strict=True)
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(at, _shares(one), "o-", color=color, linewidth=1.8, markersize=5)
    if prior := _prior(one, longest):
        axes.plot(range(1, len(prior) + 1), prior, color=color, linewidth=1.4, linestyle="--")


def _draw_tokens(axes: "Axes", one: Accepted, color: str, longest: int) -> None:
    if shares := _shares(one):
        tokens = _cumulated(shares)
        name = f"{one.name}, {sum(one.drafted_at):,} drafted:\n{tokens[-1]:.2f} tokens at {len(shares)}"
        axes.plot(range(len(tokens)), tokens, "o-", color=color, linewidth=1.8, markersize=5, label=name)
    if prior := _prior(one, longest):
        label = f"{one.name}, expected before"
        axes.plot(range(len(prior) + 1), _cumulated(prior), color=color, linewidth=1.4, linestyle="--", label=label)


def _cumulated(shares: Sequence[float]) -> list[float]:
    """Tokens per pass with 0, 1, 2, ... drafts: one more than the accepted ones."""
    values = [1.0]
    for share in shares:
        values.append(values[-1] + share)
    return values
