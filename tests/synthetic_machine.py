"""A machine whose truth is known, for closed loops: rollouts under a toggle, with what it lost against the truth."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import comb, exp, log
from typing import Any

from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.cost.roofline import ModelSize, PassCost, Roofline, parts_of
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.toggle import Toggle

FORMATS = ("w4", "w8")
_SIZE = ModelSize(270e6, {"w4": 70e6, "w8": 140e6}, 270e6, 2e4, 46e3)
PROMPT = 64


def passes(target: float = 1.0, draft: float = 1.0, verify: float = 1.0) -> PassTimes:
    """About SmolLM2-135M on one CPU core; the factors are on the seconds of its passes."""
    return PassTimes(
        Roofline(
            _SIZE,
            PassCost(22.5e9 / target, 230e9 / target, per_sequence=1e-4 * target),
            PassCost(22.5e9 / verify, 180e9 / verify, per_sequence=1e-4 * verify),
            {f: PassCost(22.5e9 / draft, 250e9 / draft, per_pass=1e-3 * draft, per_sequence=1e-4 * draft) for f in FORMATS},
        )
    )


def long_tailed(count: int, seed: int, median: float = 100.0, longest: int = 1000) -> list[int]:
    """Response lengths."""
    rng = random.Random(seed)
    return [max(2, min(longest, round(median * exp(rng.gauss(0.0, 1.0))))) for _ in range(count)]


@dataclass
class Machine:
    """A synthetic machine whose steps take the time of the passes, times noise."""

    truth: PassTimes
    acceptance: Callable[[int], float] = lambda step: 0.93
    """Conditional acceptance of a draft token, by step."""
    coverage: float = 1.0
    """Share of the sequences for which the proposer has a draft, at random in every step."""
    slow: Callable[[int, Arm], float] = lambda step, arm: 1.0
    """Factor on the seconds of a step."""
    noise: float = 0.05
    outliers: float = 0.01
    """Share of steps that take up to ten times as long."""
    times_drafting: bool = True
    """Whether the host's clock tells how long drafting takes."""
    seed: int = 0
    step: int = 0
    now: float = 0.0
    seconds: float = 0.0
    """Total seconds of all steps, without noise."""
    lost: float = 0.0
    """Seconds lost against the best arm of every step, without noise."""
    best_arms: list[Arm] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    known: dict[tuple[Arm, int, int], float] = field(default_factory=dict)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def clock(self) -> float:
        return self.now

    def length(self, n: int) -> float:
        return 1 + self.coverage * sum(self.acceptance(self.step) ** i for i in range(1, n + 1))

    def step_seconds(self, arm: Arm, load: Load) -> float:
        """The mean over the numbers of sequences with a draft."""
        key = (arm, load.decoding, int(load.context) // 16)
        if key not in self.known:
            batch = load.decoding
            chances = {k: comb(batch, k) * self.coverage**k * (1 - self.coverage) ** (batch - k) for k in range(batch + 1)}
            at = replace(load, context=16 * key[2] + 8)
            self.known[key] = sum(chance * self._pass_seconds(arm, at, k) for k, chance in chances.items() if chance)
        return self.known[key] * self.slow(self.step, arm)

    def _pass_seconds(self, arm: Arm, load: Load, drafts: int) -> float:
        """Seconds of a step in which so many sequences have a draft."""
        batch, context, n = load.decoding, max(1.0, load.context), arm.num_speculative_tokens
        if not n or drafts == batch:
            return self.truth.step_seconds(arm, batch, context)
        search = n * self.truth.draft_seconds(arm.format, batch, context, n)
        if not drafts:
            return search + self.truth.target_seconds(batch, context)
        known = self.truth.roofline
        size, links = known.size, known.communication
        tokens = (batch + drafts * n) / batch
        return search + parts_of(size, known.verify, links, size.weight_bytes, batch, context, n + 1, tokens).seconds

    def rollout(
        self, toggle: Toggle, lengths: Sequence[int], choices: Sequence[Arm], slots: int = 64, learns: bool = True
    ) -> None:
        """Responses of these lengths, so many at once. `choices`: what the oracle chooses from."""
        waiting: list[int] = list(lengths)
        running: list[list[int]] = []  # tokens done and to do
        toggle.begin_rollout(learns)
        while waiting or running:
            prefill = 0
            while waiting and len(running) < slots:
                running.append([0, waiting.pop(0)])
                prefill += PROMPT
            arm = toggle.decide(self._load(running, prefill, len(waiting)))
            toggle.observe(self._step(arm, running, prefill, len(waiting), choices))
            running = [s for s in running if s[0] < s[1]]
        toggle.end_rollout()

    def _load(self, running: list[list[int]], prefill: int, waiting: int) -> Load:
        decoding = [PROMPT + done for done, _ in running if done]
        return Load(len(decoding), sum(decoding) / max(1, len(decoding)), prefill, waiting)

    def _step(self, arm: Arm, running: list[list[int]], prefill: int, waiting: int, choices: Sequence[Arm]) -> StepOutcome:
        load = self._load(running, prefill, waiting)
        emitted = finished = requested = 0
        drafts = load.decoding
        drafted_at, accepted_at = [0] * arm.num_speculative_tokens, [0] * arm.num_speculative_tokens
        a = self.acceptance(self.step)
        for s in running:
            n = min(arm.num_speculative_tokens, s[1] - s[0] - 1) if s[0] else 0
            requested += n
            if s[0] and self.coverage < 1 and self.rng.random() >= self.coverage:
                n, drafts = 0, drafts - 1
            accepted = 0
            while accepted < n and self.rng.random() < a:
                accepted += 1
            for i in range(n):
                drafted_at[i] += 1
                accepted_at[i] += i < accepted
            emitted += accepted + 1
            s[0] += accepted + 1
            finished += s[0] == s[1]
        while drafted_at and not drafted_at[-1]:
            drafted_at.pop()
            accepted_at.pop()
        done = arm if requested else OFF
        seconds = self._seconds(done, load, choices)
        if self.coverage < 1 and load.decoding:
            bare = replace(load, prefill_tokens=0)
            seconds += self._pass_seconds(done, bare, drafts) * self.slow(self.step, done) - self.step_seconds(done, bare)
        noisy = seconds * exp(self.rng.gauss(0.0, self.noise)) if self.noise else seconds
        if self.rng.random() < self.outliers:
            noisy *= 1 + 9 * self.rng.random()
        self.now += noisy
        self.step += 1
        self.arms.append(done)
        drafting = noisy * self._drafting_share(done, load, drafts) if self.times_drafting else 0.0
        counts = tuple(drafted_at), tuple(accepted_at), finished, requested
        return StepOutcome(done, load, noisy, drafting, emitted, *counts)

    def _drafting_share(self, arm: Arm, load: Load, drafts: int) -> float:
        """Share of drafting in a step's seconds, which the host's clock tells on a CPU."""
        if not load.decoding or not arm.speculates:
            return 0.0
        n, context = arm.num_speculative_tokens, max(1.0, load.context)
        drafting = n * self.truth.draft_seconds(arm.format, load.decoding, context, n)
        return drafting / self._pass_seconds(arm, load, drafts)

    def _seconds(self, arm: Arm, load: Load, choices: Sequence[Arm]) -> float:
        """True seconds of a step, and the account of what was lost."""
        prefill = self.truth.prefill_seconds(load.prefill_tokens) if load.prefill_tokens else 0.0
        self.seconds += prefill
        if not load.decoding:
            return prefill
        per_token = {c: self.step_seconds(c, load) / self.length(c.num_speculative_tokens) for c in choices}
        best = min(per_token, key=lambda c: per_token[c])
        seconds = self.step_seconds(arm, load)
        self.best_arms.append(best)
        self.seconds += seconds
        self.lost += seconds - self.length(arm.num_speculative_tokens) * per_token[best]
        return seconds + prefill


class Learner:
    """A cost model that starts from passes, right or wrong, and learns a factor of every drafter and of every arm by batch."""

    def __init__(self, start: PassTimes) -> None:
        self.start = start
        self.parts: dict[str, list[float]] = {}
        """Logarithm of the factor, and steps that it was learnt from."""

    def step_seconds(self, arm: Arm, load: Load, proposed: float = 1.0) -> float:
        prefill = self.start.prefill_seconds(load.prefill_tokens) if load.prefill_tokens else 0.0
        return prefill + (self._bare(arm, load) * exp(self._factor(arm, load)) if load.decoding else 0.0)

    def observe(self, arm: Arm, load: Load, seconds: float, drafting: float = 0.0, proposed: float = 1.0) -> None:
        if load.decoding and not load.prefill_tokens:
            surprise = log(seconds / self._bare(arm, load)) - self._factor(arm, load)
            for key in self._keys(arm, load):
                part = self.parts.setdefault(key, [0.0, 0])
                part[0] += max(0.05, 0.5 / (1 + part[1])) * max(-0.7, min(0.7, surprise))
                part[1] = 0 if abs(surprise) > 0.5 else part[1] + 1

    def state_dict(self) -> dict[str, object]:
        return {"parts": self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts = {key: list(part) for key, part in state["parts"].items()}

    def _keys(self, arm: Arm, load: Load) -> tuple[str, str]:
        return arm.format, f"{arm} at {load.decoding.bit_length()}"

    def _factor(self, arm: Arm, load: Load) -> float:
        return sum(self.parts[key][0] for key in self._keys(arm, load) if key in self.parts)

    def _bare(self, arm: Arm, load: Load) -> float:
        return self.start.step_seconds(arm, load.decoding, max(1.0, load.context))
