"""Scheduler: chooses the sequences of the next forward pass, and their numbers of tokens. Pure.

One rule: every sequence's num_computed_tokens must catch up with its num_tokens. A prompt is a sequence that lags by many
tokens (and may catch up in chunks), a decoding sequence lags by one. Sequences are served in order of arrival; when the pool
runs out of blocks, the latest one is preempted and later computes its tokens again. Draft tokens get what is left of the
pass's tokens and of the pool: no sequence is preempted for them. Every decision depends on equal integers on all ranks of a
tensor-parallel group, so all ranks take the same one.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from erollout.engine.block_manager import BlockCopy, BlockManager
from erollout.engine.sequence import Sequence, SequenceState
from erollout.errors import UserError
from erollout.speculation.step import Load


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Positions [start, start + num_tokens) of a sequence to compute in this pass, and the drafts after them."""

    sequence: Sequence
    start: int
    num_tokens: int
    num_drafts: int = 0
    """Number of draft tokens to verify, at positions [end, end + num_drafts), whose blocks are reserved too."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def catches_up(self) -> bool:
        """Whether the pass computes the last known token, so that the next one can be sampled."""
        return self.end == self.sequence.num_tokens

    @property
    def decodes(self) -> bool:
        """Whether only the last known token of one sequence is computed, so that drafts may follow it."""
        return self.num_tokens == 1 and self.catches_up and not self.sequence.followers


@dataclass(slots=True)
class Batch:
    """One forward pass."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    """Block copies to make before the pass, in this order."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the pass, drafts included."""
        return sum(item.num_tokens + item.num_drafts for item in self.scheduled)


class Scheduler:
    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: list[Sequence] = []
        """Waiting sequences in order of arrival."""
        self.running: list[Sequence] = []
        """Running sequences in order of arrival."""
        self.num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raise UserError for a request that can never be served."""
        if prompt_tokens == 0:
            raise UserError("a prompt has no tokens; give every prompt at least one")
        if prompt_tokens + max_tokens > self.max_model_len:
            raise UserError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_tokens = {max_tokens} exceed the model's "
                f"{self.max_model_len} positions; lower rollout.max_tokens or raise model.max_position_embeddings"
            )
        needed = self.blocks.blocks_for(prompt_tokens + max_tokens - 1)  # the last token is never computed
        if needed > self.blocks.num_blocks:
            raise UserError(
                f"a prompt of {prompt_tokens} tokens and rollout.max_tokens = {max_tokens} need {needed} KV blocks but the "
                f"pool has {self.blocks.num_blocks}; raise rollout.kv_cache_gib or rollout.num_kv_blocks"
            )

    def add(self, group: Iterable[Sequence]) -> None:
        """Queue the samples of one prompt: the first one prefills it, the others wait for that."""
        leader, *followers = group
        leader.followers = followers
        self._wait(leader)

    def load(self) -> Load:
        """The load of the next pass: running sequences, and waiting ones that may be admitted."""
        slots = self.max_num_seqs - len(self.running)
        lags = [s.num_tokens - s.num_computed_tokens for s in self.running]
        lags += [s.num_tokens - s.num_computed_tokens for s in self.waiting[:slots]]
        context = sum(s.num_computed_tokens for s in self.running)
        prefill = min(sum(lag for lag in lags if lag > 1), self.max_num_batched_tokens)
        return Load(lags.count(1), context / max(1, len(self.running)), prefill, len(self.waiting))

    def schedule(self, num_speculative_tokens: int = 0) -> Batch:
        """The next pass, with up to num_speculative_tokens drafts for each decoding sequence.

        Not empty while there are unfinished sequences.
        """
        batch = Batch()
        budget = self.max_num_batched_tokens
        preemptions = self.num_preemptions
        for sequence in list(self.running):
            if budget and sequence.state is SequenceState.RUNNING:
                budget -= self._schedule_running(sequence, budget, batch)
        pool_suffices = self.num_preemptions == preemptions
        # after a preemption none is admitted, unless the last running sequence was preempted for earlier ones that wait
        while budget and (pool_suffices or not batch.scheduled) and self._can_admit():
            budget -= self._admit(budget, batch)
        if num_speculative_tokens:
            self._add_drafts(num_speculative_tokens, budget, batch)
        assert batch.scheduled or not self.has_unfinished, "nothing can run"
        return batch

    def keep_drafts(self, batch: Batch, numbers: Iterable[int]) -> None:
        """Reduce the drafts of a batch's sequences to these numbers, and free the blocks reserved for the others."""
        for index, (item, number) in enumerate(zip(batch.scheduled, numbers, strict=True)):
            if number < item.num_drafts:
                batch.scheduled[index] = replace(item, num_drafts=number)
                self.blocks.truncate(item.sequence.block_table, item.end + number)

    def computed(self, item: ScheduledSequence) -> list[Sequence]:
        """Record that a scheduled sequence's pass is done.

        Returns the sequences whose next token can be sampled from its last position: itself once it has caught up and, when
        it leads a group whose prompt is now complete, every sibling, which shares its blocks from here on.
        """
        sequence = item.sequence
        sequence.num_computed_tokens = item.end
        if not item.catches_up:
            return []
        followers, sequence.followers = sequence.followers, []
        for follower in followers:
            follower.block_table = self.blocks.fork(sequence.block_table)
            follower.num_computed_tokens = sequence.num_computed_tokens
            self._wait(follower)
        return [sequence, *followers]

    def verified(self, sequence: Sequence) -> None:
        """Record that the tokens of a sequence which had drafts are known: all but the last one are computed.

        The state computed for rejected drafts is dropped, and its blocks are freed.
        """
        sequence.num_computed_tokens = sequence.num_tokens - 1
        self.blocks.truncate(sequence.block_table, sequence.num_computed_tokens)

    def finish(self, sequence: Sequence) -> None:
        """Remove a finished sequence and free its blocks."""
        queue = self.running if sequence.state is SequenceState.RUNNING else self.waiting
        queue.remove(sequence)
        sequence.state = SequenceState.FINISHED
        self.blocks.truncate(sequence.block_table, 0)

    def release(self, count: int) -> list[Sequence]:
        """Remove up to `count` sequences, cheapest to prefill again first, and free their blocks.

        A sequence that others wait for stays.
        """
        chosen = sorted((s for s in [*self.running, *self.waiting] if not s.followers), key=lambda s: (s.num_tokens, -s.order))
        for sequence in chosen[:count]:
            self.finish(sequence)
        return chosen[:count]

    def cancel(self) -> None:
        """Remove all unfinished sequences and free their blocks."""
        for sequence in [*self.running, *self.waiting]:
            self.finish(sequence)

    def _schedule_running(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Schedule a running sequence, preempting later ones for its blocks. Returns its tokens; 0: it was preempted itself."""
        start = sequence.num_computed_tokens
        num_tokens = min(sequence.num_tokens - start, budget)
        while not self._fits(sequence, start + num_tokens):
            victim = self._latest_holder()
            self._preempt(victim)
            if victim is sequence:
                return 0
        return self._take(sequence, num_tokens, batch)

    def _can_admit(self) -> bool:
        """Whether the first waiting sequence fits with all of its tokens."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        first = self.waiting[0]
        while not (fits := self._fits(first, first.num_tokens)) and not self.running:
            self._preempt(self._latest_holder())  # waiting siblings must not keep the last sequence from running
        return fits

    def _fits(self, sequence: Sequence, end: int) -> bool:
        """Whether the pool has the blocks for a sequence's tokens up to `end`."""
        return self.blocks.missing(sequence.block_table, sequence.num_computed_tokens, end) <= self.blocks.num_free

    def _admit(self, budget: int, batch: Batch) -> int:
        sequence = self.waiting.pop(0)
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=_arrival)
        return self._take(sequence, min(sequence.num_tokens - sequence.num_computed_tokens, budget), batch)

    def _take(self, sequence: Sequence, num_tokens: int, batch: Batch) -> int:
        start = sequence.num_computed_tokens
        batch.copies += self.blocks.reserve(sequence.block_table, start, start + num_tokens)
        batch.scheduled.append(ScheduledSequence(sequence, start, num_tokens))
        return num_tokens

    def _add_drafts(self, wanted: int, budget: int, batch: Batch) -> None:
        """Add drafts to the batch's decoding sequences in order of arrival, as far as tokens and free blocks allow."""
        for index, item in enumerate(batch.scheduled):
            if num_drafts := self._num_drafts(item, min(wanted, budget)):
                end = item.end + num_drafts
                batch.copies += self.blocks.reserve(item.sequence.block_table, item.end, end)
                batch.scheduled[index] = replace(item, num_drafts=num_drafts)
                budget -= num_drafts

    def _num_drafts(self, item: ScheduledSequence, most: int) -> int:
        """Number of drafts up to `most`, limited by the tokens still to emit (one more than its drafts per pass) and blocks."""
        if not item.decodes:
            return 0
        sequence = item.sequence
        num_drafts = min(most, sequence.sampling.max_tokens - len(sequence.response_ids) - 1)
        table, free = sequence.block_table, self.blocks.num_free
        while num_drafts > 0 and self.blocks.missing(table, item.end, item.end + num_drafts) > free:
            num_drafts -= 1
        return num_drafts

    def _latest_holder(self) -> Sequence:
        """The latest sequence that holds blocks, running or waiting (a waiting sibling holds its group's prompt)."""
        holders = [queue for queue in (self.running, [s for s in self.waiting if s.block_table]) if queue]
        return max((queue[-1] for queue in holders), key=_arrival)

    def _preempt(self, sequence: Sequence) -> None:
        """Free a sequence's blocks; it computes all of its tokens again when it is next admitted."""
        self.blocks.truncate(sequence.block_table, 0)
        sequence.num_computed_tokens = 0
        self.num_preemptions += 1
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        insort(self.waiting, sequence, key=_arrival)


def _arrival(sequence: Sequence) -> int:
    return sequence.order
