"""The scheduler alone: integers in, decisions out."""

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from erollout.engine.block_manager import BlockManager
from erollout.engine.scheduler import Batch, Scheduler
from erollout.engine.sequence import Sequence, SequenceState
from erollout.errors import UserError
from erollout.types import SamplingParams

BLOCK = 4


def make_scheduler(num_blocks: int = 64, max_num_seqs: int = 8, max_num_batched_tokens: int = 64) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, BLOCK), max_num_seqs, max_num_batched_tokens, max_model_len=1000)


def add_groups(scheduler: Scheduler, groups: list[tuple[int, int, int]]) -> list[Sequence]:
    """Groups of (prompt length, group size, response length)."""
    sequences: list[Sequence] = []
    for index, (prompt, size, response) in enumerate(groups):
        sampling = SamplingParams(max_tokens=response)
        group = [Sequence(len(sequences) + i, index, i, tuple(range(prompt)), sampling, seed=0) for i in range(size)]
        scheduler.add(group)
        sequences += group
    return sequences


def step(scheduler: Scheduler, num_speculative_tokens: int = 0, accept: Callable[[int], int] = lambda drafts: drafts) -> Batch:
    """One pass in which every sequence that catches up gets its accepted drafts and a token, up to its own length."""
    batch = scheduler.schedule(num_speculative_tokens)
    for item in batch.scheduled:
        for sequence in scheduler.computed(item):
            for _ in range(1 + accept(item.num_drafts)):
                sequence.append(token_id=7, logprob=0.0, raw_logprob=0.0)
            if item.num_drafts:
                scheduler.verified(sequence)
            if len(sequence.response_ids) == sequence.sampling.max_tokens:
                scheduler.finish(sequence)
    return batch


GROUPS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(1, 12)), min_size=1, max_size=6)


@settings(max_examples=150)
@given(
    groups=GROUPS,
    num_blocks=st.integers(8, 30),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(1, 40),
    num_speculative_tokens=st.sampled_from([0, 1, 3, 7]),
    seed=st.integers(0, 1000),
)
# the only running sequence gives way to earlier ones that wait with blocks: one of them must run in the same pass
@example(
    groups=[(17, 3, 2), (11, 1, 7)],
    num_blocks=9,
    max_num_seqs=2,
    max_num_batched_tokens=14,
    num_speculative_tokens=0,
    seed=0,
)
def test_everything_finishes_within_the_limits_and_the_pool_returns_to_full(
    groups: list[tuple[int, int, int]],
    num_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_speculative_tokens: int,
    seed: int,
) -> None:
    chance = Random(seed)
    scheduler = make_scheduler(num_blocks, max_num_seqs, max_num_batched_tokens)
    sequences = add_groups(scheduler, groups)
    for _ in range(20_000):
        if not scheduler.has_unfinished:
            break
        batch = step(scheduler, num_speculative_tokens, lambda drafts: chance.randint(0, drafts))
        assert 0 < batch.num_tokens <= max_num_batched_tokens
        assert len(batch.scheduled) <= max_num_seqs
        for item in batch.scheduled:
            assert item.start + item.num_tokens <= item.sequence.num_tokens
            assert item.num_drafts <= num_speculative_tokens
        for sequence in scheduler.running:
            assert sequence.num_computed_tokens < sequence.num_tokens
            assert len(sequence.block_table) == scheduler.blocks.blocks_for(sequence.num_computed_tokens)
    assert [len(s.response_ids) for s in sequences] == [s.sampling.max_tokens for s in sequences]
    assert all(s.state is SequenceState.FINISHED for s in sequences)
    assert scheduler.blocks.num_free == num_blocks


def test_a_groups_prompt_is_computed_once() -> None:
    scheduler = make_scheduler()
    add_groups(scheduler, [(10, 4, 3)])
    assert [item.num_tokens for item in step(scheduler).scheduled] == [10]
    second = step(scheduler)
    assert [item.num_tokens for item in second.scheduled] == [1, 1, 1, 1]
    assert len(second.copies) == 3  # of the half-full last prompt block, for all but its last holder


def test_long_prompts_are_computed_in_chunks_beside_decoding() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add_groups(scheduler, [(3, 1, 9), (12, 1, 2)])
    tokens = [[item.num_tokens for item in step(scheduler).scheduled] for _ in range(4)]
    assert tokens == [[3, 5], [1, 7], [1, 1], [1]]


def test_the_latest_sequence_gives_its_blocks_back_and_starts_over() -> None:
    scheduler = make_scheduler(num_blocks=4)
    first, second = add_groups(scheduler, [(7, 1, 6), (7, 1, 6)])
    for _ in range(3):
        step(scheduler)
    assert scheduler.num_preemptions == 1
    assert first.state is SequenceState.RUNNING
    assert (second.state, second.num_computed_tokens, second.block_table) == (SequenceState.WAITING, 0, [])
    assert len(second.response_ids) == 2  # what it has sampled stays
    while first.state is SequenceState.RUNNING:
        step(scheduler)
    again = scheduler.schedule().scheduled
    assert [(item.sequence, item.start, item.end) for item in again] == [(second, 0, 9)]


def num_drafts(batch: Batch) -> list[int]:
    return [item.num_drafts for item in batch.scheduled]


def test_decoding_sequences_get_drafts_and_prompts_none() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    (early,) = add_groups(scheduler, [(3, 1, 20)])
    step(scheduler, 3)
    add_groups(scheduler, [(10, 1, 9)])
    batch = step(scheduler, 3)  # beside a prompt
    assert [(item.num_tokens, item.num_drafts) for item in batch.scheduled] == [(1, 1), (10, 0)]
    assert early.num_computed_tokens == 5 and len(early.response_ids) == 3
    batch = step(scheduler, 3)
    assert [(item.start, item.end, item.num_drafts) for item in batch.scheduled] == [(5, 6, 3), (10, 11, 3)]


def test_siblings_draft_once_they_have_their_first_token() -> None:
    scheduler = make_scheduler()
    add_groups(scheduler, [(1, 3, 9)])  # a prompt of one token lags by one, but its siblings wait for it
    assert num_drafts(step(scheduler, 3)) == [0]
    batch = step(scheduler, 3)
    assert num_drafts(batch) == [3, 3, 3]
    assert len(batch.copies) == 2


def test_no_more_is_drafted_than_can_be_emitted() -> None:
    scheduler = make_scheduler()
    add_groups(scheduler, [(3, 1, 7), (3, 1, 1)])
    assert [num_drafts(step(scheduler, 4, lambda drafts: 0)) for _ in range(7)] == [[0, 0], [4], [4], [3], [2], [1], [0]]
    assert not scheduler.has_unfinished


def test_nobody_gives_way_for_drafts() -> None:
    """The pool holds two sequences of two blocks and one block more: the first one's drafts take that, the second gets few."""
    scheduler = make_scheduler(num_blocks=5)
    first, second = add_groups(scheduler, [(6, 1, 12), (6, 1, 12)])
    step(scheduler)
    assert scheduler.blocks.num_free == 1
    batch = step(scheduler, 5, lambda drafts: 0)
    assert num_drafts(batch) == [5, 1]  # positions 7 .. 11 and 7
    assert scheduler.num_preemptions == 0
    assert scheduler.blocks.num_free == 1  # the third block went back
    assert (first.num_computed_tokens, len(first.block_table), len(second.block_table)) == (7, 2, 2)


def test_drafts_take_what_the_passes_tokens_leave() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    add_groups(scheduler, [(2, 1, 20), (2, 1, 20), (2, 1, 20)])
    step(scheduler, 4)
    assert num_drafts(step(scheduler, 4)) == [3, 0, 0]


def test_blocks_of_drafts_that_nobody_proposed_are_free_for_others() -> None:
    scheduler = make_scheduler(num_blocks=20)
    sequences = add_groups(scheduler, [(4, 1, 30), (4, 1, 30)])
    step(scheduler)
    free = scheduler.blocks.num_free
    batch = scheduler.schedule(9)
    assert [item.num_drafts for item in batch.scheduled] == [9, 9] and scheduler.blocks.num_free == free - 6
    scheduler.keep_drafts(batch, [0, 5])
    assert [item.num_drafts for item in batch.scheduled] == [0, 5] and scheduler.blocks.num_free == free - 3
    assert [len(sequence.block_table) for sequence in sequences] == [2, 3], "positions 0 to 4, and 0 to 9"


def test_cancelling_gives_everything_back() -> None:
    scheduler = make_scheduler(num_blocks=30, max_num_seqs=3)
    add_groups(scheduler, [(9, 4, 8), (5, 2, 8)])
    step(scheduler, 3)
    step(scheduler, 3)
    scheduler.schedule(3)  # in the middle of a pass
    assert scheduler.running and scheduler.waiting
    scheduler.cancel()
    assert not scheduler.has_unfinished
    assert scheduler.blocks.num_free == 30


def test_waiting_siblings_are_preempted_before_the_only_runner_starves() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=1)
    sequences = add_groups(scheduler, [(14, 3, 16)])
    while scheduler.has_unfinished:
        step(scheduler)
    assert [len(s.response_ids) for s in sequences] == [16, 16, 16]


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        (0, 5, "no tokens"),
        (900, 101, "rollout.max_tokens = 101 exceed the model's 1000 positions"),
        (250, 8, "need 65 KV blocks but the pool has 64; raise rollout.kv_cache_gib"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(prompt: int, response: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scheduler().check(prompt, response)


def test_a_request_that_just_fits_is_accepted() -> None:
    make_scheduler().check(250, 7)
    make_scheduler(num_blocks=300).check(900, 100)
