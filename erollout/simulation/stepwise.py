"""A virtual replica that takes every step of its engine, with the engine's own scheduler and block pool."""

from collections.abc import Iterator, Sequence

import numpy as np

from erollout.engine.block_manager import BlockManager
from erollout.engine.scheduler import Batch, ScheduledSequence, Scheduler
from erollout.engine.sequence import Sequence as Response
from erollout.simulation.replica import Chooser, Limits, Part, Replica
from erollout.simulation.truth import Truth
from erollout.simulation.workload import Workload
from erollout.speculation.statistics import SpeculationStatistics
from erollout.speculation.step import OFF, Load, StepOutcome
from erollout.types import SamplingParams

ROOM_FOR_DRAFTS = 16
"""Tokens per sequence added to a pool that must never run out."""


class StepwiseReplica(Replica):
    """The loop of erollout/engine/engine.py, with true seconds and acceptance in place of the model."""

    def __init__(
        self,
        workload: Workload,
        truth: Truth,
        chooser: Chooser,
        limits: Limits,
        generator: np.random.Generator,
        max_tokens: int,
    ) -> None:
        super().__init__(workload, truth, chooser, limits, generator)
        longest = int(workload.prompt_tokens.max()) + max_tokens
        enough = 2 * (limits.max_num_seqs + workload.group_size) * (longest + ROOM_FOR_DRAFTS + 2 * limits.block_size)
        blocks = (limits.kv_tokens or enough) // limits.block_size
        self.blocks = BlockManager(blocks, limits.block_size)
        self.scheduler = Scheduler(self.blocks, limits.max_num_seqs, limits.max_num_batched_tokens, longest)
        self.scheduler.check(int(workload.prompt_tokens.max()), max_tokens)
        self.sampling = SamplingParams(max_tokens=max_tokens)
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._outstanding = self._arrivals = 0
        self._chances: Iterator[float] = iter(())

    @property
    def outstanding(self) -> int:
        return self._outstanding

    def take(self, prompts: Sequence[int]) -> None:
        for prompt in prompts:
            self.scheduler.add([self._response(prompt, sample, 0) for sample in range(self.workload.group_size)])

    def arrive(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self.scheduler.add([self._response(*part)])
            self.ledger.recomputed_tokens += part.emitted

    def release(self, count: int) -> list[Part]:
        released = self.scheduler.release(count)
        self._outstanding -= len(released)
        return [Part(r.request_index, r.sample_index, len(r.response_ids)) for r in released]

    def _response(self, prompt: int, sample: int, emitted: int) -> Response:
        tokens = int(self.workload.prompt_tokens[prompt])
        prompt_ids = self._prompts.setdefault(tokens, (0,) * tokens)
        response = Response(self._arrivals, prompt, sample, prompt_ids, self.sampling, 0, response_ids=[0] * emitted)
        self._arrivals += 1
        self._outstanding += 1
        self._given(prompt, 1)
        return response

    def _load(self) -> Load:
        return self.scheduler.load()

    def _step(self, limit: float) -> None:
        arm = self.chooser.decide(self.scheduler.load(), self.imposed)
        batch = self.scheduler.schedule(arm.num_speculative_tokens)
        load = _computed(batch, self.scheduler)
        if not any(item.num_drafts for item in batch.scheduled):
            arm = OFF
        seconds = self._seconds(arm, load)
        self._count(arm, load, seconds, 1)
        statistics, tokens, finished = SpeculationStatistics(), self.ledger.tokens, self.ledger.finished
        self._chances = iter(self.generator.random(len(batch.scheduled)).tolist())
        for item in batch.scheduled:
            self._advance(item, statistics)
        self.ledger.num_drafts += statistics.num_drafts
        self.ledger.drafted += statistics.drafted
        self.ledger.accepted += statistics.accepted
        self.ledger.preemptions = self.scheduler.num_preemptions
        emitted, finished = self.ledger.tokens - tokens, self.ledger.finished - finished
        counts = tuple(statistics.drafted_at), tuple(statistics.accepted_at)
        self.chooser.observe(StepOutcome(arm, load, seconds, 0.0, emitted, *counts, finished))

    def _advance(self, item: ScheduledSequence, statistics: SpeculationStatistics) -> None:
        """Append the tokens of a computed item to its sequences."""
        chance = next(self._chances)
        for response in self.scheduler.computed(item):
            accepted = self.truth.acceptance.draw(item.num_drafts, chance) if item.num_drafts else 0
            left = int(self.workload.response_tokens[response.request_index, response.sample_index]) - len(
                response.response_ids
            )
            emitted = min(1 + accepted, left)
            response.response_ids += [0] * emitted
            self.ledger.tokens += emitted
            if item.num_drafts:
                statistics.record(item.num_drafts, accepted, min(emitted, accepted))
                self.scheduler.verified(response)
            if emitted == left:
                self._finish(response)

    def _finish(self, response: Response) -> None:
        self.scheduler.finish(response)
        self._outstanding -= 1
        self.ledger.finished += 1
        self.finished_at = self.now


def _computed(batch: Batch, scheduler: Scheduler) -> Load:
    """The load of a pass, as the engine reports it."""
    decoding = [item.start for item in batch.scheduled if item.num_tokens == 1 and item.catches_up]
    prefill = sum(item.num_tokens for item in batch.scheduled) - len(decoding)
    return Load(len(decoding), sum(decoding) / len(decoding) if decoding else 0.0, prefill, len(scheduler.waiting))
