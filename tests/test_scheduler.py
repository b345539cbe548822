"""The scheduler alone: integers in, decisions out."""

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


def step(scheduler: Scheduler) -> Batch:
    """One pass in which every sequence that catches up gets a token and stops at its own length."""
    batch = scheduler.schedule()
    for item in batch.scheduled:
        for sequence in scheduler.computed(item):
            sequence.append(token_id=7, logprob=0.0, raw_logprob=0.0)
            if len(sequence.response_ids) == sequence.sampling.max_tokens:
                scheduler.finish(sequence)
    return batch


GROUPS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(1, 12)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    groups=GROUPS,
    num_blocks=st.integers(8, 30),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(1, 40),
)
# the only running sequence gives way to earlier ones that wait with blocks: one of them must run in the same pass
@example(groups=[(17, 3, 2), (11, 1, 7)], num_blocks=9, max_num_seqs=2, max_num_batched_tokens=14)
def test_everything_finishes_within_the_limits_and_the_pool_returns_to_full(
    groups: list[tuple[int, int, int]], num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    scheduler = make_scheduler(num_blocks, max_num_seqs, max_num_batched_tokens)
    sequences = add_groups(scheduler, groups)
    for _ in range(20_000):
        if not scheduler.has_unfinished:
            break
        batch = step(scheduler)
        assert 0 < batch.num_tokens <= max_num_batched_tokens
        assert len(batch.scheduled) <= max_num_seqs
        for item in batch.scheduled:
            assert item.start + item.num_tokens <= item.sequence.num_tokens
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
