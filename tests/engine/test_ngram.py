"""N-gram drafts: which tokens are proposed, and that they change no distribution."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verifier import PLAIN, TARGET, VERIFICATIONS, VOCABULARY, check_chains

from erollout.config import load_config
from erollout.configuration.speculation import NGramConfig, SpeculationConfig, check_speculation
from erollout.engine.proposers.base import DraftRequest, Drafts
from erollout.engine.proposers.ngram import NGramProposer, as_text, continuation
from erollout.engine.sampling.sampler import Sampler, SamplingRow
from erollout.engine.sampling.verifier import Candidate, Verification, Verifier
from erollout.engine.sequence import Sequence
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


def continued(tokens: list[int], options: NGramConfig, length: int) -> list[int]:
    return [ord(character) for character in continuation(as_text(tokens), options, length)]


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
        ([55_296, 200_000, 57_343, 9, 55_296, 200_000], [57_343, 9, 55_296]),  # code points that are no characters
    ],
)
def test_what_followed_the_longest_ngram_is_proposed(tokens: list[int], expected: list[int]) -> None:
    assert continued(tokens, sizes(2, 3), 3) == expected == looked_up(tokens, sizes(2, 3), 3)


@settings(max_examples=300)
@given(
    chunks=st.lists(st.lists(st.integers(0, 3), max_size=24), max_size=6),
    smallest=st.integers(1, 3),
    more=st.integers(0, 3),
    length=st.integers(1, 8),
)
def test_a_growing_text_is_searched_within_the_window(chunks: list[list[int]], smallest: int, more: int, length: int) -> None:
    options = replace(sizes(smallest, smallest + more), window=32)
    proposer, growing = NGramProposer(options, CPU), sequence(0, [1], [])
    for chunk in chunks:
        growing.response_ids += chunk
        tokens = growing.tokens(0, growing.num_tokens)[-32:]
        drafts = proposer.propose(DraftRequest([growing], [length]))
        assert drafts.num_drafts is not None
        assert drafts.token_ids.flatten().tolist()[: drafts.num_drafts[0]] == looked_up(tokens, options, length)


def test_memory_is_bounded_by_the_window_and_ends_with_the_sequence() -> None:
    proposer = NGramProposer(replace(sizes(2, 4), window=1000), CPU)
    sequences = [sequence(i, list(range(50_000)), list(range(50_000))) for i in range(8)]
    proposer.propose(DraftRequest(sequences, [3] * 8))
    assert [(known, len(text)) for known, text in proposer._texts.values()] == [(100_000, 1000)] * 8
    kept = [weakref.ref(each) for each in sequences]
    del sequences[1:]
    gc.collect()
    assert [ref() for ref in kept] == [sequences[0], *[None] * 7], "finished sequences stay in memory"
    assert list(proposer._texts) == sequences


def sequence(order: int, prompt: list[int], response: list[int]) -> Sequence:
    return Sequence(order, 0, order, tuple(prompt), SamplingParams(), seed=0, response_ids=response)


def test_drafts_are_functions_of_the_tokens_alone() -> None:
    """In any company and order, at once or token by token, and after sleep."""
    options, texts = sizes(1, 3), [[1, 2, 3, 1, 2], [5, 6, 7], [8, 9, 8, 9, 8]]
    proposer = NGramProposer(options, CPU)
    sequences = [sequence(i, text[:1], []) for i, text in enumerate(texts)]
    for end in range(1, 6):
        for each, text in zip(sequences, texts, strict=True):
            each.response_ids[:] = text[1:end]
        drafts = proposer.propose(DraftRequest(sequences, [3, 2, 1]))
    fresh = [sequence(i, text[:2], text[2:]) for i, text in enumerate(texts)]
    again = NGramProposer(options, CPU).propose(DraftRequest(fresh, [3, 2, 1]))
    assert drafts.num_drafts == again.num_drafts == (3, 0, 1) and drafts.processed is None and drafts.on_host
    assert drafts.token_ids.tolist() == again.token_ids.tolist() == [[3, 0, 9], [1, 0, 0], [2, 0, 0]]
    assert proposer.propose(DraftRequest(sequences[:1], [3])).num_drafts == (3,)
    proposer.sleep()
    assert proposer.propose(DraftRequest(sequences[:1], [3])).token_ids.tolist() == [[3], [1], [2]]


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_tokens_follow_the_targets_distribution(verification: Verification) -> None:
    """Certain drafts, of other numbers for each sequence: accepted as often as p says, else replaced from p without them."""
    count, length, most = 1500, 16, 3
    chains = [[0] for _ in range(count)]
    verifier, target = Verifier(Sampler(VOCABULARY), verification), TARGET.softmax(-1)
    drafted = accepted = 0
    numbers, expected = set(), 0.0
    while pending := [i for i, chain in enumerate(chains) if len(chain) <= length]:
        found = [continued(chains[i], sizes(1, 2), most) for i in pending]
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


@pytest.mark.parametrize(("key", "value"), [("max_ngram", 17), ("min_ngram", 0), ("window", 16), ("window", 2_000_000)])
def test_lengths_beyond_use_are_refused(key: str, value: int) -> None:
    with pytest.raises(UserError, match=f"speculation.ngram.{key}"):
        load_config(Path(__file__).parents[2] / "configs/demo.yaml", [f"speculation.ngram.{key}={value}"])


def test_sizes_that_exclude_every_ngram_are_refused() -> None:
    options = SpeculationConfig(ngram=sizes(3, 2))  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"speculation.ngram.min_ngram = 3 is above max_ngram = 2; lower it"):
        check_speculation(options)
