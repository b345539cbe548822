"""N-gram drafts: which tokens are proposed, and that they change no distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verifier import PLAIN, TARGET, VERIFICATIONS, VOCABULARY, check_chains

from erollout.configuration.speculation import NGramConfig, SpeculationConfig, check_speculation
from erollout.engine.proposers.base import DraftRequest, Drafts
from erollout.engine.proposers.ngram import NGramIndex, NGramProposer
from erollout.engine.sampling.sampler import Sampler, SamplingRow
from erollout.engine.sampling.verifier import Candidate, Verification, Verifier
from erollout.engine.sequence import Sequence, SequenceState
from erollout.errors import UserError
from erollout.types import SamplingParams

CPU = torch.device("cpu")


def sizes(min_ngram: int, max_ngram: int) -> NGramConfig:
    return NGramConfig(max_ngram=max_ngram, min_ngram=min_ngram)  # type: ignore[call-arg]  # mypy does not see through section


def looked_up(tokens: list[int], options: NGramConfig, length: int) -> list[int]:
    """Prompt lookup as transformers and vLLM define it, by search."""
    for size in range(options.max_ngram, options.min_ngram - 1, -1):
        for start in range(len(tokens) - size):
            if tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size : start + size + length]
    return []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 9, 1, 2], [3, 9, 1]),
        ([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], [5, 8, 1]),  # three tokens rather than two
        ([1, 2, 5, 1, 2, 6, 1, 2], [5, 1, 2]),  # the first of two
        ([4, 4, 4, 4], [4]),  # no more than there is
        ([4, 9, 4], []),  # one token is too few
    ],
)
def test_what_followed_the_longest_ngram_is_proposed(tokens: list[int], expected: list[int]) -> None:
    index = NGramIndex(sizes(2, 3))
    index.extend(tokens)
    assert index.continuation(3) == expected == looked_up(tokens, sizes(2, 3), 3)


@settings(max_examples=300)
@given(
    chunks=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6),
    smallest=st.integers(1, 3),
    more=st.integers(0, 3),
    length=st.integers(1, 8),
)
def test_an_index_that_grows_finds_what_a_search_finds(chunks: list[list[int]], smallest: int, more: int, length: int) -> None:
    options, tokens = sizes(smallest, smallest + more), list[int]()
    index = NGramIndex(options)
    for chunk in chunks:
        index.extend(chunk)
        tokens += chunk
        assert index.continuation(length) == looked_up(tokens, options, length)


def sequence(order: int, prompt: list[int], response: list[int]) -> Sequence:
    return Sequence(order, 0, order, tuple(prompt), SamplingParams(), seed=0, response_ids=response)


def test_drafts_are_functions_of_the_tokens_alone() -> None:
    """In any company and order, at once or token by token, and after sleep; finished sequences are forgotten."""
    options, texts = sizes(1, 3), [[1, 2, 3, 1, 2], [5, 6, 7], [8, 9, 8, 9, 8]]
    proposer = NGramProposer(options, CPU)
    sequences = [sequence(i, text[:1], []) for i, text in enumerate(texts)]
    for end in range(1, 6):
        for each, text in zip(sequences, texts, strict=True):
            each.response_ids[:] = text[1:end]
        drafts = proposer.propose(DraftRequest(sequences, [3, 2, 1]))
    fresh = [sequence(i, text[:2], text[2:]) for i, text in enumerate(texts)]
    again = NGramProposer(options, CPU).propose(DraftRequest(fresh, [3, 2, 1]))
    assert drafts.num_drafts == again.num_drafts == (3, 0, 1) and drafts.processed is None
    assert drafts.token_ids.tolist() == again.token_ids.tolist() == [[3, 0, 9], [1, 0, 0], [2, 0, 0]]
    for each in sequences[1:]:
        each.state = SequenceState.FINISHED
    alone = proposer.propose(DraftRequest(sequences[:1], [3]))
    assert alone.num_drafts == (3,) and list(proposer._indexes) == sequences[:1]
    proposer.sleep()
    assert proposer.propose(DraftRequest(sequences[:1], [3])).token_ids.tolist() == [[3], [1], [2]]


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_tokens_follow_the_targets_distribution(verification: Verification) -> None:
    """Certain drafts, of other numbers for each sequence: accepted as often as p says, else replaced from p without them."""
    count, length, most = 1500, 16, 3
    chains = [[0] for _ in range(count)]
    indexes = [NGramIndex(sizes(1, 2)) for _ in chains]
    verifier, target = Verifier(Sampler(VOCABULARY), verification), TARGET.softmax(-1)
    drafted = accepted = 0
    numbers, expected = set(), 0.0
    while pending := [i for i, chain in enumerate(chains) if len(chain) <= length]:
        for i in pending:
            indexes[i].extend(chains[i][len(indexes[i]) :])
        found = [indexes[i].continuation(most) for i in pending]
        rows = [SamplingRow(PLAIN, i, len(chains[i])) for i in pending]
        candidates = [Candidate(row, len(ids), column) for column, (row, ids) in enumerate(zip(rows, found, strict=True))]
        logits = torch.cat([TARGET[[chains[i][-1], *ids]] for i, ids in zip(pending, found, strict=True)])
        drafts = Drafts.certain(found, most, CPU) if any(found) else None
        for i, ids, run in zip(pending, found, verifier.verify(logits, candidates, drafts), strict=True):
            if ids:
                drafted, accepted = drafted + 1, accepted + (run.num_accepted > 0)
                expected += target[chains[i][-1], ids[0]].item()
            numbers.add(len(ids))
            chains[i] += run.token_ids
    assert numbers == {0, 1, 2, 3}
    assert abs(accepted - expected) < 5 * drafted**0.5 / 2, "a certain draft x is accepted with probability p(x)"
    check_chains(torch.tensor([chain[: length + 1] for chain in chains]), PLAIN)


def test_sizes_that_exclude_every_ngram_are_refused() -> None:
    options = SpeculationConfig(ngram=sizes(3, 2))  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"speculation.ngram.min_ngram = 3 is above max_ngram = 2; lower it"):
        check_speculation(options)
