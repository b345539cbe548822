"""A virtual replica that jumps from event to event (a response ends or is admitted, a window) instead of step to step.

Its arithmetic follows the scheduler's rules: first come, first served; a group's first response prefills the prompt for all;
prompts get the tokens that decoding leaves in a pass. The cache is always large enough. Passes with prompt tokens are simulated
one by one; between them, all steps of a jump have the same arm and the duration of its middle step. The tokens that a response
gets in a jump are drawn as a sum.
"""

import heapq
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erollout.simulation.replica import Chooser, Limits, Part, Replica
from erollout.simulation.truth import Truth
from erollout.simulation.workload import Workload
from erollout.speculation.step import OFF, Arm, Load, StepOutcome

FINISHES = 1 / 12
"""Share of the responses whose completion ends a jump (at least one; exactly one when others wait for the slot)."""
GROWTH = 0.2
"""Relative growth of the context that ends a jump."""
STRIDE = 4
"""Largest ratio of a jump's steps to those of the previous jump with the same arm."""
FEW_STEPS = 16
"""Largest number of draws made one by one; the sum of more is drawn from a normal distribution."""


class _Waiting(NamedTuple):
    """A response that is queued or in prefill."""

    order: int
    prompt: int
    sample: int
    emitted: int
    lag: int
    """Number of tokens to prefill before the next one can be sampled."""
    leads: bool = False
    """Whether the rest of its group waits for its prompt."""


class JumpingReplica(Replica):
    def __init__(
        self, workload: Workload, truth: Truth, chooser: Chooser, limits: Limits, generator: np.random.Generator
    ) -> None:
        super().__init__(workload, truth, chooser, limits, generator)
        assert limits.kv_tokens is None, "a jumping replica does not preempt"
        self._decoding = np.empty((4, 0), np.int64)
        """Decoding responses; rows: order, prompt, sample, tokens in the cache."""
        self._left = np.empty(0, np.int64)
        """Remaining tokens of each decoding response."""
        self._prefilling: list[_Waiting] = []
        self._waiting: list[_Waiting] = []
        """A heap by order."""
        self._outstanding = self._arrivals = 0
        self._stride = 1

    @property
    def outstanding(self) -> int:
        return self._outstanding

    def take(self, prompts: Sequence[int]) -> None:
        size = self.workload.group_size
        for prompt in prompts:
            lag = int(self.workload.prompt_tokens[prompt])
            heapq.heappush(self._waiting, _Waiting(self._arrivals, prompt, 0, 0, lag, size > 1))
            self._arrivals += size
            self._outstanding += size
            self._given(prompt, size)

    def arrive(self, parts: Sequence[Part]) -> None:
        for part in parts:
            lag = int(self.workload.prompt_tokens[part.prompt]) + part.emitted
            heapq.heappush(self._waiting, _Waiting(self._arrivals, *part, lag))
            self._arrivals += 1
            self._outstanding += 1
            self._given(part.prompt, 1)
            self.ledger.recomputed_tokens += part.emitted

    def release(self, count: int) -> list[Part]:
        emitted = self._emitted()
        candidates = [
            (int(tokens) + 1, -int(order), Part(int(prompt), int(sample), int(done)), int(order))
            for (order, prompt, sample, tokens), done in zip(self._decoding.T, emitted, strict=True)
        ]
        candidates += [
            (int(self.workload.prompt_tokens[w.prompt]) + w.emitted, -w.order, Part(w.prompt, w.sample, w.emitted), w.order)
            for w in [*self._prefilling, *self._waiting]
            if not w.leads
        ]
        chosen = sorted(candidates)[:count]
        orders = {order for *_, order in chosen}
        self._keep(~np.isin(self._decoding[0], list(orders)))
        self._prefilling = [w for w in self._prefilling if w.order not in orders]
        self._waiting = [w for w in self._waiting if w.order not in orders]
        heapq.heapify(self._waiting)
        self._outstanding -= len(chosen)
        return [part for _, _, part, _ in chosen]

    def _load(self) -> Load:
        slots = self._slots
        joining = heapq.nsmallest(slots, self._waiting) if slots and self._waiting else []
        decoding = len(self._left)
        lags = [w.lag for w in [*self._prefilling, *joining]]
        ready = decoding + lags.count(1)
        prefill = min(sum(lag for lag in lags if lag > 1), self.limits.max_num_batched_tokens)
        computed = float(self._decoding[3].sum())
        return Load(ready, computed / max(1, decoding + len(self._prefilling)), prefill, len(self._waiting))

    @property
    def _slots(self) -> int:
        return self.limits.max_num_seqs - len(self._left) - len(self._prefilling)

    def _step(self, limit: float) -> None:
        load = self._load()
        arm = self.chooser.decide(load, self.imposed)
        if self._prefilling or (self._waiting and self._slots):
            self._pass(arm)
        else:
            self._jump(arm, load, limit)

    def _pass(self, arm: Arm) -> None:
        """One pass that admits or prefills."""
        budget = self.limits.max_num_batched_tokens - len(self._left)
        chunks: list[tuple[_Waiting, int]] = []
        for waiting in self._prefilling:
            chunks.append((waiting, min(waiting.lag, budget)))
            budget -= chunks[-1][1]
        while budget and self._waiting and self._slots > len(chunks) - len(self._prefilling):
            waiting = heapq.heappop(self._waiting)
            chunks.append((waiting, min(waiting.lag, budget)))
            budget -= chunks[-1][1]
        ready = [w for w, _ in chunks if w.lag == 1]
        self._admit(ready)
        prefill = sum(tokens for w, tokens in chunks if w.lag > 1)
        drafting = self._drafting(arm, budget)
        arm = arm if drafting else OFF
        context = float(self._decoding[3].mean()) if len(self._left) else 0.0
        load = Load(len(self._left), context, prefill, len(self._waiting))
        seconds = self._seconds(arm, load)
        self._count(arm, load, seconds, 1)
        self._emit(arm, load, seconds, self._rates(arm, 1, drafting), 1, drafting)
        rest = [(w, tokens) for w, tokens in chunks if w.lag > 1]
        self._prefilling = [w._replace(lag=w.lag - tokens) for w, tokens in rest if tokens < w.lag]
        for waiting, tokens in rest:
            if tokens == waiting.lag:
                self._first_tokens(waiting)

    def _first_tokens(self, waiting: _Waiting) -> None:
        """Give the first token to a prefilled response and to those that waited for the same prompt."""
        lengths = self.workload.response_tokens[waiting.prompt]
        samples = range(self.workload.group_size) if waiting.leads else (waiting.sample,)
        for index, sample in enumerate(samples):
            self.ledger.tokens += 1
            if int(lengths[sample]) == waiting.emitted + 1:
                self._finish(1)
                continue
            one = _Waiting(waiting.order + index, waiting.prompt, sample, waiting.emitted + 1, 1)
            if index:
                heapq.heappush(self._waiting, one)
            else:
                self._admit([one])

    def _admit(self, ready: Sequence[_Waiting]) -> None:
        """Move prefilled responses to decoding."""
        if not ready:
            return
        prompts, lengths = self.workload.prompt_tokens, self.workload.response_tokens
        rows = [(w.order, w.prompt, w.sample, int(prompts[w.prompt]) + w.emitted - 1) for w in ready]
        left = [int(lengths[w.prompt, w.sample]) - w.emitted for w in ready]
        self._decoding = np.concatenate([self._decoding, np.array(rows, np.int64).T], axis=1)
        self._left = np.concatenate([self._left, np.array(left, np.int64)])

    def _jump(self, arm: Arm, load: Load, limit: float) -> None:
        """Several steps of pure decoding."""
        each = self.truth.step_seconds(arm, load)
        length = self.truth.acceptance.length(arm.num_speculative_tokens)
        self._stride = STRIDE * self._stride if arm == self._arm else 1
        until = ceil((limit - self.now) / each) if limit < inf else self._stride
        planned = max(1, min(self._stride, until, int(1 + GROWTH * load.context / length)))
        drafting = self._drafting(arm, self.limits.max_num_batched_tokens - len(self._left))
        rates = self._rates(arm, planned, drafting)
        times = np.ceil(self._left / rates)
        ending = 1 if self._waiting else 1 + int(FINISHES * len(times))
        steps = max(1, min(planned, int(np.partition(times, ending - 1)[ending - 1])))
        running = round(float(np.minimum(times, steps).sum()) / steps)
        middle = replace(
            load, decoding=max(1, running), context=load.context + float(rates.sum()) / len(rates) * (steps - 1) / 2
        )
        seconds = steps * self._mean_seconds(arm, middle, steps)
        self._count(arm, middle, seconds, steps)
        self._emit(arm, middle, seconds / steps, rates, steps, drafting)

    def _mean_seconds(self, arm: Arm, load: Load, steps: int) -> float:
        """Mean seconds per step over `steps` steps, with noise."""
        seconds = self.truth.step_seconds(arm, load)
        if self.truth.noise:
            seconds *= 1 + self.truth.noise / steps**0.5 * float(self.generator.standard_normal())
        return seconds

    def _drafting(self, arm: Arm, room: int) -> int:
        """Number of responses that get drafts in a pass with room for `room` draft tokens."""
        return min(len(self._left), room // arm.num_speculative_tokens) if arm.speculates else 0

    def _rates(self, arm: Arm, steps: int, drafting: int) -> NDArray[np.float64]:
        """Tokens per step of each decoding response, over `steps` steps in which the first `drafting` ones have drafts."""
        n, acceptance = arm.num_speculative_tokens, self.truth.acceptance
        rates = np.ones(len(self._left))
        if steps > FEW_STEPS:
            deviation = (acceptance.variance(n) / steps) ** 0.5
            drawn = acceptance.length(n) + deviation * self.generator.standard_normal(drafting)
            rates[:drafting] = np.clip(drawn, 1, n + 1)
        elif drafting:
            rejected = np.searchsorted(acceptance.shares[:n][::-1], self.generator.random((steps, drafting)), side="right")
            rates[:drafting] += n - rejected.mean(axis=0)
        return rates

    def _emit(self, arm: Arm, load: Load, seconds: float, rates: NDArray[np.float64], steps: int, drafting: int) -> None:
        """Give the decoding responses their tokens, and let the chooser observe one of the steps."""
        count, n, ledger = len(self._left), arm.num_speculative_tokens, self.ledger
        if not count:
            return
        progress = np.minimum(self._left, np.rint(rates * steps).astype(np.int64))
        self._left -= progress
        self._decoding[3] += progress
        ledger.tokens += int(progress.sum())
        in_a_step = float(rates.sum())
        ledger.num_drafts += drafting * steps
        ledger.drafted += drafting * steps * n
        ledger.accepted += round((in_a_step - count) * steps)
        ended = count - int(np.count_nonzero(self._left))
        if ended:
            self._finish(ended)
            self._keep(self._left > 0)
        drafts = self._drafts(n, drafting)
        self.chooser.observe(StepOutcome(arm, load, seconds, 0.0, self._whole(in_a_step), *drafts, self._whole(ended / steps)))

    def _drafts(self, n: int, drafting: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens drafted and accepted at each position in one step."""
        if not drafting:
            return (), ()
        chances = np.sort(self.generator.random(drafting))
        accepted = np.searchsorted(chances, self.truth.acceptance.shares[:n])
        return (drafting,) * n, tuple(accepted.tolist())

    def _whole(self, mean: float) -> int:
        """A random integer with the given mean."""
        return int(mean + self.generator.random())

    def _finish(self, count: int) -> None:
        self._outstanding -= count
        self.ledger.finished += count
        self.finished_at = self.now

    def _keep(self, mask: NDArray[np.bool_]) -> None:
        if not mask.all():
            self._decoding = self._decoding[:, mask]
            self._left = self._left[mask]

    def _emitted(self) -> list[int]:
        lengths = self.workload.response_tokens[self._decoding[1], self._decoding[2]]
        return (lengths - self._left).tolist()
