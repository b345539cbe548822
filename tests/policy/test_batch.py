"""Micro-batches, shares of data-parallel ranks and weights: properties that hold for any lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erollout.algorithm.grpo import GRPO
from erollout.algorithm.minibatch import split
from erollout.config import AlgorithmConfig
from erollout.policy.batch import TrainSample, balance, collate, cut_micro_batches, token_weights
from erollout.types import PartialRollout, Rollout, ScoredRollout

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)
AGGREGATION = st.sampled_from(["token-mean", "sequence-mean"])
FAST = settings(max_examples=60)


@st.composite
def _samples(draw: st.DrawFn) -> list[TrainSample]:
    """Prompts of at least one token; responses may be empty; every token id and log-prob of the list is different."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=8))
    ids = iter(range(1, 1000))
    samples = []
    for prompt, response in shapes:
        tokens = [next(ids) for _ in range(prompt + response)]
        answer = tokens[prompt:]
        samples.append(
            TrainSample(
                tokens[:prompt],
                answer,
                advantage=tokens[0] / 2,
                rollout_logprobs=[-float(t) for t in answer],
                old_logprobs=[-t - 0.25 for t in answer],
                ref_logprobs=[-t - 0.5 for t in answer],
            )
        )
    return samples


@FAST
@given(LENGTHS, st.integers(1, 200))
def test_micro_batches_hold_every_sequence_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    groups = cut_micro_batches(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert padded <= max_tokens or len(group) == 1


def test_micro_batches_are_as_few_as_the_budget_allows() -> None:
    assert cut_micro_batches([3, 8, 4, 4], max_tokens=12) == [[1], [2, 3, 0]]


@FAST
@given(LENGTHS, st.integers(1, 8))
def test_shares_hold_every_sequence_once_and_are_even(lengths: list[int], parts: int) -> None:
    shares = balance(lengths, parts)
    assert len(shares) == parts
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    if len(lengths) >= parts:
        assert all(shares)
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


@FAST
@given(_samples(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_collate_puts_everything_beside_the_token_it_is_about(samples: list[TrainSample], multiple: int, random) -> None:
    indices = list(range(len(samples)))
    random.shuffle(indices)
    indices = indices[: random.randint(1, len(indices))]
    weights = [[1.0 / (i + 1)] * len(sample.response_ids) for i, sample in enumerate(samples)]
    batch = collate(samples, indices, weights, multiple)
    width = batch.tokens.shape[1]
    longest = max(samples[i].length - 1 for i in indices)
    assert width % multiple == 0 and longest <= width < max(1, longest) + multiple
    assert batch.indices == tuple(indices)
    for row, index in enumerate(indices):
        sample = samples[index]
        ids = [*sample.prompt_ids, *sample.response_ids]
        assert batch.tokens[row].tolist() == ids[:-1] + [0] * (width - len(ids) + 1)
        assert batch.labels[row].tolist() == ids[1:] + [0] * (width - len(ids) + 1)
        assert batch.position_ids[row].tolist() == list(range(width))
        response = batch.responses[row]
        assert torch.equal(batch.mask[row], response.float())
        assert batch.labels[row][response].tolist() == list(sample.response_ids)
        assert batch.advantages[row].tolist() == [sample.advantage]
        for tensor, values in (
            (batch.weights, weights[index]),
            (batch.old_logprobs, sample.old_logprobs),
            (batch.ref_logprobs, sample.ref_logprobs),
            (batch.rollout_logprobs, sample.rollout_logprobs),
        ):
            assert tensor[row][response].tolist() == pytest.approx(list(values))
            assert not tensor[row][~response].any()
    assert batch.advantages.dtype == torch.float32 and batch.tokens.dtype == batch.labels.dtype == torch.int64


def test_collate_of_a_single_token_has_a_position() -> None:
    batch = collate([TrainSample([5], [])], [0], [[]], 1)
    assert batch.tokens.shape == (1, 1) and not batch.mask.any()


def test_collate_takes_whole_number_advantages() -> None:
    assert collate([TrainSample([5], [6], advantage=1)], [0], [[1.0]], 1).advantages.dtype == torch.float32


@pytest.mark.parametrize(
    "sample", [TrainSample([], [1, 2]), TrainSample([1], [2, 3], old_logprobs=[-1.0])], ids=["no prompt", "too few log-probs"]
)
def test_collate_refuses_what_would_be_misaligned(sample: TrainSample) -> None:
    with pytest.raises(AssertionError):
        collate([sample], [0], [[1.0, 1.0]], 1)


def _scored(lengths: list[tuple[int, int]]) -> list[ScoredRollout]:
    return [
        ScoredRollout(Rollout(i, 0, (1,) * p, (2,) * r, (-1.0,) * r, (-1.0,) * r, "stop", 0), reward=0.0, task="t")
        for i, (p, r) in enumerate(lengths)
    ]


@FAST
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=24), st.integers(1, 4), AGGREGATION)
def test_weights_of_all_ranks_response_tokens_sum_to_one(lengths: list[tuple[int, int]], ranks: int, aggregation: str) -> None:
    scored = _scored(lengths)
    size = len(scored) // 2
    by_rank = [split(scored, size, ranks, rank, GRPO(AlgorithmConfig(aggregation=aggregation))) for rank in range(ranks)]
    for step in range(len(by_rank[0])):
        shares = [batches[step] for batches in by_rank]
        start, end = step * size, min((step + 1) * size, len(scored))
        assert sorted(i for share in shares for i in share.indices) == list(range(start, end))
        total = 0.0
        for share in shares:
            if share.samples:
                total += collate(share.samples, range(len(share.samples)), share.weights, 1).weights.sum().item()
            for index, sample in zip(share.indices, share.samples, strict=True):
                assert (len(sample.prompt_ids), len(sample.response_ids)) == lengths[index]
        assert total == pytest.approx(1.0, rel=1e-5)


def test_weights_by_hand() -> None:
    assert token_weights([[1], [1, 1, 1]], "token-mean") == [[0.25], [0.25] * 3]
    assert token_weights([[1], [1] * 4], "sequence-mean") == [[0.5], [0.125] * 4]
    assert token_weights([[], [1, 1]], "sequence-mean") == [[], [0.25, 0.25]]  # an empty response takes its share of the mean
    assert token_weights([[], [0]], "token-mean") == [[], [0.0]]
    assert token_weights([[1, 0, 1], [1, 1]], "token-mean") == [[0.25, 0.0, 0.25], [0.25, 0.25]]
    assert token_weights([[1, 0, 1], [1, 1]], "sequence-mean") == [[0.25, 0.0, 0.25], [0.25, 0.25]]


def test_masked_tokens_are_no_part_of_mask_weights_and_logprobs() -> None:
    sample = TrainSample([1, 2], [3, 4, 5], 1.0, [-1.0, 0.0, -2.0], [-1.5, -9.0, -2.5], [-1.0, -9.0, -2.0], [1, 0, 1])
    batch = collate([sample], [0], token_weights([sample.loss_mask], "token-mean"), 1)
    assert batch.responses.tolist() == [[False, True, True, True]]
    assert batch.mask.tolist() == [[0.0, 1.0, 0.0, 1.0]] and batch.weights.tolist() == [[0.0, 0.5, 0.0, 0.5]]
    assert batch.old_logprobs.tolist() == [[0.0, -1.5, 0.0, -2.5]] and batch.rollout_logprobs.tolist() == [
        [0.0, -1.0, 0.0, -2.0]
    ]


def test_a_response_without_a_mask_is_all_sampled() -> None:
    rollout = Rollout(0, 0, (1,), (2, 3), (-1.0,) * 2, (-1.0,) * 2, "stop", 0)
    assert rollout.loss_mask == (1, 1) == PartialRollout(0, 0, (2, 3), (-1.0,) * 2, (-1.0,) * 2).loss_mask
    assert TrainSample([1], [2, 3]).loss_mask == (1, 1)
    half = Rollout(0, 0, (1,), (2, 3), (-1.0,) * 2, (-1.0,) * 2, "stop", 0, (1, 0))
    (batch,) = split([ScoredRollout(half, 1.0, "t")], 1, 1, 0, GRPO(AlgorithmConfig()))
    assert batch.samples[0].loss_mask == (1, 0) and batch.weights == [[1.0, 0.0]] and half.num_sampled == 1
