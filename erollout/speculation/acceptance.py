"""How many drafts of one drafter are accepted, by their position in the draft, estimated while drafts are verified. Pure.

Of every position a decaying count of drafts that got so far (all tokens before were accepted) and of those whose token was
accepted there too. A position of which little is known takes after the one before it: acceptance is nearly flat in depth.
When the latest drafts contradict the counts, most of the counts are forgotten at once.
"""

from collections.abc import Sequence
from math import exp, isfinite
from typing import Any

PRIOR = 0.8
"""Acceptance before any draft. INT4 drafters lie between 0.6 and 0.97: drafting looks worth a try, no more."""
PRIOR_DRAFTS = 4.0
"""Drafts that the prior weighs as much as."""
NEIGHBOUR_DRAFTS = 50.0
"""Drafts that the position before weighs as much as."""
WHOLE_DRAFTS = 30.0
"""Drafts at other contexts that count for one context, in all."""
RECENT = 0.1
"""Of the window: what counts as the latest drafts."""
LEFT = 8.0
"""Drafts that all together weigh when the latest contradict them."""
CONTRADICTION = 4.0
"""Standard errors between the latest drafts and all, at least: many, since drafts of one passage resemble each other."""
CARRIED = 0.25
"""Of the window: most that all earlier rollouts weigh when one begins, since the policy has changed in between."""


class Acceptance:
    """Of one drafter, over the whole run."""

    def __init__(self, window: float, whole: "Acceptance | None" = None) -> None:
        """
        Args:
            window: drafts after which an old one counts e times less.
            whole: what this is a part of: where little is known here, its rates are taken instead.
        """
        self.window = window
        self.whole = whole
        self.tried: list[float] = []
        """By position: drafts whose tokens before it were all accepted."""
        self.accepted: list[float] = []
        self._recent = (0.0, 0.0)
        """Of the latest drafts, all positions together: tokens tried and accepted."""

    def begin_rollout(self) -> None:
        most = CARRIED * self.window
        if self.tried and self.tried[0] > most:
            self._scale(most / self.tried[0])

    def observe(self, drafted_at: Sequence[int], accepted_at: Sequence[int]) -> None:
        """Count one step's drafts, as StepOutcome has them."""
        if not drafted_at:
            return
        self._scale(exp(-drafted_at[0] / self.window))
        missing = len(drafted_at) - len(self.tried)
        if missing > 0:
            self.tried += [0.0] * missing
            self.accepted += [0.0] * missing
        before, reached, total = drafted_at[0], float(drafted_at[0]), 0.0
        for position, (drafted, accepted) in enumerate(zip(drafted_at, accepted_at, strict=True)):
            if drafted != before:  # some drafts ended: those that go on were accepted so far as often as all
                reached *= drafted / before
                before = drafted
            self.tried[position] += reached
            self.accepted[position] += accepted
            total += reached
            reached = accepted
        self._compare(drafted_at[0], total, sum(accepted_at))

    def _compare(self, drafts: int, tried: float, accepted: int) -> None:
        """Forget most where the latest drafts, these among them, contradict all."""
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
        """Of the first, second, ... token of a draft: the chance that it is accepted where those before it are."""
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

    def lengths(self, num_speculative_tokens: int, survival: float = 1.0) -> list[float]:
        """Tokens that a verify pass yields with drafts of 0, 1, 2, ... tokens, the recovered or bonus token included.

        `survival`: chance that a token does not end its response; what is accepted behind one that does is lost.
        """
        lengths, chance = [1.0], 1.0
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
        """Raises ValueError for counts that no drafts can have."""
        tried, accepted, recent = [[float(count) for count in state[key]] for key in ("tried", "accepted", "recent")]
        counts = tried + accepted + recent
        if len(tried) != len(accepted) or not all(isfinite(count) and count >= 0 for count in counts):
            raise ValueError(f"acceptance counts {accepted} of {tried} drafts, {recent} of them recent")
        recent_tried, recent_accepted = recent
        self.tried, self.accepted, self._recent = tried, accepted, (recent_tried, recent_accepted)

    def _scale(self, factor: float) -> None:
        self.tried = [count * factor for count in self.tried]
        self.accepted = [count * factor for count in self.accepted]


class AcceptanceByContext:
    """Of one drafter, over the whole run: in all, and at each octave of context, since long responses accept otherwise."""

    def __init__(self, window: float) -> None:
        self.window = window
        self.whole = Acceptance(window)
        self.parts: dict[int, Acceptance] = {}
        """By the number of binary digits of the mean context."""

    def begin_rollout(self) -> None:
        for known in (self.whole, *self.parts.values()):
            known.begin_rollout()

    def observe(self, drafted_at: Sequence[int], accepted_at: Sequence[int], context: float) -> None:
        """Count one step's drafts, as StepOutcome has them."""
        self.whole.observe(drafted_at, accepted_at)
        self.parts.setdefault(int(context).bit_length(), self._part()).observe(drafted_at, accepted_at)

    def at(self, context: float) -> Acceptance:
        """What is known about a context, with what is known about others where that is little."""
        return self.parts.get(int(context).bit_length(), self.whole)

    def state_dict(self) -> dict[str, object]:
        parts = {str(octave): part.state_dict() for octave, part in self.parts.items()}
        return {"whole": self.whole.state_dict(), "parts": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for counts that no drafts can have."""
        self.whole.load_state_dict(state["whole"])
        self.parts = {int(octave): self._part() for octave in state["parts"]}
        for octave, part in state["parts"].items():
            self.parts[int(octave)].load_state_dict(part)

    def _part(self) -> Acceptance:
        return Acceptance(self.window, self.whole)
