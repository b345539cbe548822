"""Online estimate of the acceptance of one drafter, by position in the draft. Pure.

For each position there are two decaying counts: drafts that reached it (all tokens before it were accepted), and those whose
token was accepted there as well. A position with few drafts takes over the rate of the one before it: acceptance is nearly flat
in depth. When the latest drafts contradict the counts, most of the counts are dropped at once: a collapse from 0.95 to 0.3 is
noticed within 60 drafts instead of 220 (tests/speculation/test_acceptance.py), which matters where few sequences are left.
"""

from collections.abc import Sequence
from math import exp, inf, isfinite
from typing import Any

PRIOR = 0.8
"""Assumed acceptance before any draft. INT4 drafters lie between 0.6 and 0.97, so this makes drafting just worth a try."""
PRIOR_DRAFTS = 4.0
"""Weight of the prior, in drafts."""
NEIGHBOUR_DRAFTS = 50.0
"""Weight of the previous position's rate, in drafts."""
WHOLE_DRAFTS = 30.0
"""Weight of the drafts at all contexts in the rate at one context, in drafts."""
RECENT = 0.1
"""Share of the window that counts as the latest drafts."""
LEFT = 8.0
"""Weight that remains of all counts, in drafts, when the latest ones contradict them."""
CONTRADICTION = 4.0
"""Standard errors between the latest drafts and all that count as a contradiction: many, since nearby drafts are alike."""
CARRIED = 0.25
"""Largest weight of all earlier rollouts at the start of one, as a share of the window: the policy has changed since."""


class Acceptance:
    """Acceptance estimate of one drafter, kept for the whole run."""

    def __init__(self, window: float, whole: "Acceptance | None" = None) -> None:
        """
        Args:
            window: number of drafts after which an old one weighs e times less.
            whole: estimate over all contexts, whose rates are used where this one has few drafts.
        """
        self.window = window
        self.whole = whole
        self.tried: list[float] = []
        """Number of drafts that reached each position: all tokens before it were accepted."""
        self.accepted: list[float] = []
        self._recent = (0.0, 0.0)
        """Tokens tried and accepted in the latest drafts, all positions together."""

    def begin_rollout(self) -> None:
        most = CARRIED * self.window
        if self.tried and self.tried[0] > most:
            self._scale(most / self.tried[0])

    def observe(self, drafted_at: Sequence[int], accepted_at: Sequence[int]) -> None:
        """Count the drafts of one step; arguments as in StepOutcome."""
        if not drafted_at:
            return
        self._scale(exp(-drafted_at[0] / self.window))
        missing = len(drafted_at) - len(self.tried)
        if missing > 0:
            self.tried += [0.0] * missing
            self.accepted += [0.0] * missing
        before, reached, total = drafted_at[0], float(drafted_at[0]), 0.0
        for position, (drafted, accepted) in enumerate(zip(drafted_at, accepted_at, strict=True)):
            if drafted != before:  # some drafts were shorter: the longer ones were accepted up to here as often as all
                reached *= drafted / before
                before = drafted
            self.tried[position] += reached
            self.accepted[position] += accepted
            total += reached
            reached = accepted
        self._compare(drafted_at[0], total, sum(accepted_at))

    def _compare(self, drafts: int, tried: float, accepted: int) -> None:
        """Drop most of the counts if the latest drafts, including these, contradict them."""
        keep = exp(-drafts / (RECENT * self.window))
        recent_tried, recent_accepted = self._recent
        recent_tried, recent_accepted = recent_tried * keep + tried, recent_accepted * keep + accepted
        self._recent = recent_tried, recent_accepted
        rate = min(1.0, sum(self.accepted) / sum(self.tried))
        excess = recent_accepted - rate * recent_tried
        is_old = self.tried[0] > RECENT * self.window
        if is_old and excess * excess > CONTRADICTION**2 * max(rate * (1 - rate), 0.01) * recent_tried:
            self._scale(LEFT / self.tried[0])

    def rates(self, num_speculative_tokens: int) -> list[float]:
        """Probability that the first, second, ... token of a draft is accepted, given that all before it are."""
        if self.whole is not None:
            return self._partial_rates(self.whole.rates(num_speculative_tokens))
        rates, rate, weight = [], PRIOR, PRIOR_DRAFTS
        for tried, accepted in zip(self.tried[:num_speculative_tokens], self.accepted, strict=False):
            rate = min(1.0, (accepted + weight * rate) / (tried + weight))
            rates.append(rate)
            weight = NEIGHBOUR_DRAFTS
        return rates + [rate] * (num_speculative_tokens - len(rates))

    def _partial_rates(self, whole: list[float]) -> list[float]:
        known = zip(self.accepted, self.tried, whole, strict=False)
        rates = [min(1.0, (accepted + WHOLE_DRAFTS * rate) / (tried + WHOLE_DRAFTS)) for accepted, tried, rate in known]
        return rates + whole[len(rates) :]

    def lengths(self, num_speculative_tokens: int, survival: float = 1.0, proposed: float = 1.0) -> list[float]:
        """Expected tokens per step and sequence with drafts of 0, 1, 2, ... tokens, including the recovered or bonus token.

        Args:
            survival: probability that a token does not end its response; tokens accepted after one that does are lost.
            proposed: probability that the sequence has a draft.
        """
        lengths, chance = [1.0], proposed
        for rate in self.rates(num_speculative_tokens):
            chance *= rate * survival
            lengths.append(lengths[-1] + chance)
        return lengths

    def length(self, num_speculative_tokens: int) -> float:
        """Expected acceptance_length."""
        return self.lengths(num_speculative_tokens)[-1]

    def state_dict(self) -> dict[str, object]:
        return {"tried": list(self.tried), "accepted": list(self.accepted), "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for impossible counts."""
        tried, accepted, recent = [[float(count) for count in state[key]] for key in ("tried", "accepted", "recent")]
        counts = tried + accepted + recent
        if len(tried) != len(accepted) or not all(isfinite(count) and count >= 0 for count in counts):
            raise ValueError(f"acceptance counts {accepted} of {tried} drafts, {recent} of them recent")
        recent_tried, recent_accepted = recent
        self.tried, self.accepted, self._recent = tried, accepted, (recent_tried, recent_accepted)

    def _scale(self, factor: float) -> None:
        self.tried = [count * factor for count in self.tried]
        self.accepted = [count * factor for count in self.accepted]


class ProposedShare:
    """Online estimate of the share of the requested draft tokens that a proposer has; exactly 1 while it has all of them."""

    def __init__(self, window: float) -> None:
        """`window`: as in Acceptance."""
        self.window = window
        self.requested = self.proposed = PRIOR_DRAFTS

    @property
    def value(self) -> float:
        return self.proposed / self.requested

    def begin_rollout(self) -> None:
        keep = min(1.0, CARRIED * self.window / self.requested)
        self.requested, self.proposed = keep * self.requested, keep * self.proposed

    def observe(self, drafts: int, share: float) -> None:
        """Count the drafts requested in one step, of which the proposer had a share."""
        keep = exp(-drafts / self.window)
        self.requested = keep * self.requested + drafts
        self.proposed = keep * self.proposed + drafts * share

    def state_dict(self) -> dict[str, object]:
        return {"requested": self.requested, "proposed": self.proposed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for impossible counts."""
        requested, proposed = float(state["requested"]), float(state["proposed"])
        if not (0 <= proposed <= requested < inf and requested):
            raise ValueError(f"{proposed} proposed of {requested} requested drafts")
        self.requested, self.proposed = requested, proposed


class AcceptanceByContext:
    """Acceptance of one drafter, overall and per octave of context: it differs between short and long responses."""

    def __init__(self, window: float) -> None:
        self.window = window
        self.whole = Acceptance(window)
        self.parts: dict[int, Acceptance] = {}
        """Estimates by the bit length of the mean context."""
        self.proposed = ProposedShare(window)

    def begin_rollout(self) -> None:
        for known in (self.whole, *self.parts.values()):
            known.begin_rollout()
        self.proposed.begin_rollout()

    def observe(self, drafted_at: Sequence[int], accepted_at: Sequence[int], context: float) -> None:
        """Count the drafts of one step; arguments as in StepOutcome."""
        if drafted_at:
            self.whole.observe(drafted_at, accepted_at)
            self.parts.setdefault(int(context).bit_length(), self._part()).observe(drafted_at, accepted_at)

    def at(self, context: float) -> Acceptance:
        """The estimate at a context, which falls back on all contexts where it has few drafts."""
        return self.parts.get(int(context).bit_length(), self.whole)

    def lengths(self, context: float, num_speculative_tokens: int, survival: float) -> list[float]:
        """As Acceptance.lengths, at a context, where the proposer has drafts as often as it had lately."""
        return self.at(context).lengths(num_speculative_tokens, survival, self.proposed.value)

    def state_dict(self) -> dict[str, object]:
        parts = {str(octave): part.state_dict() for octave, part in self.parts.items()}
        return {"whole": self.whole.state_dict(), "parts": parts, "proposed": self.proposed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for impossible counts."""
        self.whole.load_state_dict(state["whole"])
        self.parts = {int(octave): self._part() for octave in state["parts"]}
        for octave, part in state["parts"].items():
            self.parts[int(octave)].load_state_dict(part)
        if "proposed" in state:  # older ones are of drafters that have all drafts
            self.proposed.load_state_dict(state["proposed"])

    def _part(self) -> Acceptance:
        return Acceptance(self.window, self.whole)
