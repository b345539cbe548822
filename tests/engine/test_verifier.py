"""Verification alone: what it emits follows the target's distribution, whatever the drafts were drawn from."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor

from erollout.engine.proposers.base import Drafts
from erollout.engine.sampling.logits import process_logits, shard_logits
from erollout.engine.sampling.random import draft_seed
from erollout.engine.sampling.sampler import Sampler, SamplingRow, draw
from erollout.engine.sampling.verifier import Candidate, Verification, VerifiedRun, Verifier
from erollout.kernels import native
from erollout.types import SamplingParams

PLAIN = SamplingParams()
FILTERED = replace(PLAIN, temperature=0.8, top_k=4, top_p=0.9)
VOCABULARY = 6


def table(seed: int, scale: float = 1.5) -> Tensor:
    """Logits of the next token after each token, [VOCABULARY, VOCABULARY]."""
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


TARGET = table(0)
DRAFTERS = {"same": TARGET, "good": TARGET + table(1, 0.4), "bad": table(2)}


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """What rows of logits are sampled from."""
    rows = len(logits)
    processed = process_logits(shard_logits(logits, logits.shape[1]), [params] * rows, [None] * rows)
    return processed.logprobs()[:, : logits.shape[1]].exp().double()


def make_drafts(
    drafter: Tensor, last: list[int], rows: list[SamplingRow], num_drafts: int, verification: Verification
) -> Drafts:
    """What a drafter with logits drafter[previous token] proposes."""
    noise = [row if verification == "coupled" else replace(row, seed=draft_seed(row.seed)) for row in rows]
    token, token_ids, processed = torch.tensor(last), [], []
    for i in range(num_drafts):
        shard = shard_logits(drafter[token], drafter.shape[1])
        processed.append(process_logits(shard, [row.params for row in rows], [None] * len(rows)))
        token = draw(processed[-1], [replace(row, position=row.position + i) for row in noise])[1]
        token = token.clamp(0, drafter.shape[1] - 1)
        token_ids.append(token)
    return Drafts(torch.stack(token_ids), None if verification == "coupled" else tuple(processed))


def certain_drafts(last: list[int], num_drafts: int) -> Drafts:
    """Every draft is token 3."""
    return Drafts(torch.full((num_drafts, len(last)), 3), None)


def logits_after(last: list[int], drafts: Drafts, target: Tensor = TARGET) -> Tensor:
    """The target's logits after each sequence's last token and after each of its drafts."""
    tokens = torch.cat([torch.tensor([last]), drafts.token_ids])
    return target[tokens.T.flatten()]


@dataclass
class Chain:
    """Sequences whose next token depends on the last one alone, each with a seed of its own."""

    params: SamplingParams
    verification: Verification
    drafter: Tensor | None
    """None: certain drafts."""
    num_drafts: int

    def step(self, seeds: list[int], last: list[int], position: int) -> list[VerifiedRun]:
        """Draft and verify, with the sequences' next tokens at `position`."""
        rows = [SamplingRow(self.params, seed, position) for seed in seeds]
        if self.drafter is None:
            drafts = certain_drafts(last, self.num_drafts)
        else:
            drafts = make_drafts(self.drafter, last, rows, self.num_drafts, self.verification)
        candidates = [Candidate(row, self.num_drafts, column) for column, row in enumerate(rows)]
        verifier = Verifier(Sampler(VOCABULARY), self.verification)
        return verifier.verify(logits_after(last, drafts), candidates, drafts)


def sample_chains(chain: Chain, sequences: int, length: int) -> tuple[Tensor, int, int]:
    """Chains of tokens [sequences, length] after token 0, by as many verifications as it takes; tokens drafted and accepted."""
    chains = [[0] for _ in range(sequences)]
    drafted = accepted = 0
    while pending := [i for i, tokens in enumerate(chains) if len(tokens) <= length]:
        position = min(len(chains[i]) for i in pending)
        now = [i for i in pending if len(chains[i]) == position]
        for i, run in zip(now, chain.step(now, [chains[i][-1] for i in now], position), strict=True):
            chains[i] += run.token_ids
            drafted += chain.num_drafts
            accepted += run.num_accepted
    return torch.tensor([tokens[: length + 1] for tokens in chains]), drafted, accepted


def check_chains(chains: Tensor, params: SamplingParams) -> None:
    """One token after another, and pairs of tokens after another one, as often as the target says."""
    target = probabilities(TARGET, params)
    previous, following = chains[:, :-1].flatten(), chains[:, 1:].flatten()
    ones = torch.bincount(previous * VOCABULARY + following, minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY)
    triples = (chains[:, 0:-2:2] * VOCABULARY + chains[:, 1:-1:2]) * VOCABULARY + chains[:, 2::2]
    twos = torch.bincount(triples.flatten(), minlength=VOCABULARY**3).view(VOCABULARY, VOCABULARY, VOCABULARY)
    check_distribution(ones, target)
    check_distribution(twos, target[:, :, None] * target[None])


def check_distribution(counts: Tensor, probabilities: Tensor) -> None:
    """Chi-square of counts [given, ...] against probabilities of the rest once the first is given."""
    counts, expected = counts.flatten(1).double(), probabilities.flatten(1)
    expected = expected * counts.sum(-1, keepdim=True)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - int((expected.sum(-1) > 0).sum())
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), (chi_square, freedom)


VERIFICATIONS: list[Verification] = ["coupled", "rejection"]


def run_case(params: SamplingParams, verification: Verification, drafter: str, tokens: int) -> None:
    chain = Chain(params, verification, DRAFTERS[drafter], num_drafts=1 if drafter == "bad" else 3)
    sequences = min(1000, tokens // 10)
    chains, drafted, accepted = sample_chains(chain, sequences, tokens // sequences)
    check_chains(chains, params)
    rate = accepted / drafted
    assert rate == 1 if drafter == "same" else 0.6 < rate < 0.95 if drafter == "good" else rate < 0.5


@pytest.mark.full
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_200_000_tokens_follow_the_targets_distribution(verification: Verification, drafter: str) -> None:
    run_case(PLAIN, verification, drafter, 200_000)


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_tokens_follow_the_targets_distribution(verification: Verification, drafter: str, params: SamplingParams) -> None:
    run_case(params, verification, drafter, 5_000)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_certain_drafts_do_not_change_the_distribution(verification: Verification) -> None:
    chains, drafted, accepted = sample_chains(Chain(PLAIN, verification, None, 2), 500, 12)
    check_chains(chains, PLAIN)
    assert 0 < accepted < drafted


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_drafter_without_a_softmax_does_not_change_the_distribution(bad: float) -> None:
    drafter = DRAFTERS["good"].clone()
    drafter[1:3] = bad  # after these tokens; after the others the drafter is what it was
    drafter[4, 2] = bad if bad != -math.inf else drafter[4, 2]
    chains, _, accepted = sample_chains(Chain(PLAIN, "rejection", drafter, 2), 500, 12)
    check_chains(chains, PLAIN)
    assert accepted
    lost = Chain(PLAIN, "rejection", torch.full_like(drafter, bad), 2)
    chains, _, accepted = sample_chains(lost, 500, 4)
    check_chains(chains, PLAIN)
    assert accepted == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_draft_is_rejected_where_one_logit_leaves_no_softmax(bad: float) -> None:
    """Even one that the target finds likely, and whose own logit is sound."""
    last, rows = [0] * 500, [SamplingRow(PLAIN, i, 1) for i in range(500)]
    likely = int(TARGET[0].argmax())
    logits = TARGET[[0]].repeat(500, 1)
    logits[:, (likely + 1) % VOCABULARY] = bad
    drafts = Drafts(torch.full((1, 500), likely), (shard_logits(logits, VOCABULARY),))
    candidates = [Candidate(row, 1, i) for i, row in enumerate(rows)]
    runs = Verifier(Sampler(VOCABULARY), "rejection").verify(logits_after(last, drafts), candidates, drafts)
    assert all(run.num_accepted == 0 for run in runs)
    counts = torch.bincount(torch.tensor([run.token_ids[0] for run in runs]), minlength=VOCABULARY)
    check_distribution(counts[None], probabilities(TARGET[[0]], PLAIN))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("params", [PLAIN, FILTERED, replace(PLAIN, temperature=0.0)], ids=["plain", "filtered", "greedy"])
def test_coupled_runs_are_what_is_sampled_without_drafts(params: SamplingParams, drafter: str) -> None:
    """Tokens and both log-probs, to the last bit."""
    seeds, last = list(range(60)), [i % VOCABULARY for i in range(60)]
    runs = Chain(params, "coupled", DRAFTERS[drafter], 3).step(seeds, last, 7)
    for seed, token, run in zip(seeds, last, runs, strict=True):
        for i, got in enumerate(zip(run.token_ids, run.logprobs, run.raw_logprobs, strict=True)):
            one = Sampler(VOCABULARY).sample(TARGET[[token]], [SamplingRow(params, seed, 7 + i)])
            token = one.token_ids[0]
            assert got == (token, one.logprobs[0], one.raw_logprobs[0])
    if drafter == "good":
        assert {run.num_accepted for run in runs} == {0, 1, 2, 3}


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered"])
def test_logprobs_of_rejection_are_the_targets(params: SamplingParams) -> None:
    """Accepted, recovered and bonus tokens have the target's log-probs."""
    last = [i % VOCABULARY for i in range(300)]
    runs = Chain(params, "rejection", DRAFTERS["good"], 2).step(list(range(300)), last, 7)
    processed, raw = probabilities(TARGET, params).log(), TARGET.double().log_softmax(-1)
    for token, run in zip(last, runs, strict=True):
        path = torch.tensor([token, *run.token_ids])
        assert run.logprobs == pytest.approx(processed[path[:-1], path[1:]].tolist(), abs=1e-6)
        assert run.raw_logprobs == pytest.approx(raw[path[:-1], path[1:]].tolist(), abs=1e-6)
    assert {run.num_accepted for run in runs} == {0, 1, 2}


KINDS = [
    PLAIN,
    replace(PLAIN, temperature=0.0),
    FILTERED,
    replace(PLAIN, repetition_penalty=1.8),
    replace(PLAIN, temperature=0.0, repetition_penalty=3.0),
    replace(PLAIN, min_p=0.2),
]


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_greedy_and_penalized_sequences_share_a_call(verification: Verification) -> None:
    """Each as if alone, with 0, 1, 2 or 3 drafts; a greedy run is the target's own."""
    last = [i % VOCABULARY for i in range(24)]
    contexts = [[token, 1, 2] for token in last]
    kinds = [KINDS[i % len(KINDS)] for i in range(24)]
    pairs = zip(kinds, contexts, strict=True)
    rows = [SamplingRow(p, i, 3, c if p.repetition_penalty != 1 else None) for i, (p, c) in enumerate(pairs)]
    drafts = make_drafts(DRAFTERS["good"], last, [replace(row, params=PLAIN) for row in rows], 3, verification)
    candidates = [Candidate(row, i // 6, i) for i, row in enumerate(rows)]
    logits = logits_after(last, drafts).view(24, 4, VOCABULARY)
    verifier = Verifier(Sampler(VOCABULARY), verification)
    parts = [x[: 1 + candidate.num_drafts] for x, candidate in zip(logits, candidates, strict=True)]
    together = verifier.verify(torch.cat(parts), candidates, drafts)
    for index, (candidate, run) in enumerate(zip(candidates, together, strict=True)):
        (alone,) = verifier.verify(parts[index], [candidate], drafts)
        assert alone == run
        assert run.num_accepted <= candidate.num_drafts
        if candidate.is_greedy:
            check_greedy(run, last[index], contexts[index], candidate.row.params.repetition_penalty)


def check_greedy(run: VerifiedRun, last: int, context: list[int], penalty: float) -> None:
    for token in run.token_ids:
        x = TARGET[last].clone()
        for seen in set(context):
            x[seen] = x[seen] / penalty if x[seen] > 0 else x[seen] * penalty
        assert token == int(x.argmax())
        last, context = token, [*context, token]


@pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_native_sampling_decides_what_torch_decides(verification: Verification) -> None:
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(1201, 1201, generator=generator) * 4
    drafter = target + torch.randn(1201, 1201, generator=generator)
    rows, last = wide_rows(1201)
    drafts = make_drafts(drafter, last, rows, 3, verification)
    candidates = [Candidate(row, 3, i) for i, row in enumerate(rows)]
    logits = logits_after(last, drafts, target)
    ours, theirs = (
        Verifier(Sampler(1201, kernel=kernel), verification).verify(logits, candidates, drafts)
        for kernel in ("native", "torch")
    )
    assert [run.token_ids for run in ours] == [run.token_ids for run in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-6)
        assert a.raw_logprobs == pytest.approx(b.raw_logprobs, abs=2e-6)


def verify_shard(target: Tensor, drafter: Tensor, verification: Verification) -> list[VerifiedRun]:
    """Each rank has its columns of the target's logits and of the drafter's."""
    vocabulary = target.shape[1]
    columns = -(-vocabulary // dist.get_world_size())
    start = dist.get_rank() * columns
    rows, last = wide_rows(vocabulary)
    whole = make_drafts(drafter, last, rows, 3, verification)
    cut = []
    for token in torch.cat([torch.tensor([last]), whole.token_ids[:-1]]):
        shard = shard_logits(drafter[token][:, start : start + columns], vocabulary, start, dist.group.WORLD)
        cut.append(process_logits(shard, [row.params for row in rows], [None] * len(rows)))
    drafts = Drafts(whole.token_ids, None if whole.processed is None else tuple(cut))
    logits = logits_after(last, drafts, target)[:, start : start + columns]
    verifier = Verifier(Sampler(vocabulary, start, dist.group.WORLD), verification)
    return verifier.verify(logits, [Candidate(row, 3, i) for i, row in enumerate(rows)], drafts)


def wide_rows(vocabulary: int) -> tuple[list[SamplingRow], list[int]]:
    kinds = [PLAIN, FILTERED, replace(PLAIN, temperature=0.0)]
    return [SamplingRow(kinds[i % 3], i, 5) for i in range(60)], [i % vocabulary for i in range(60)]


@pytest.mark.distributed
@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_shards_decide_what_one_rank_decides(rank_pool: RankPool, verification: Verification) -> None:
    """Both shards have a part of the same tile."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(1201, 1201, generator=generator) * 4
    drafter = target + torch.randn(1201, 1201, generator=generator)
    rows, last = wide_rows(1201)
    drafts = make_drafts(drafter, last, rows, 3, verification)
    candidates = [Candidate(row, 3, i) for i, row in enumerate(rows)]
    one = Verifier(Sampler(1201), verification).verify(logits_after(last, drafts, target), candidates, drafts)
    assert {run.num_accepted for run in one} == {0, 1, 2, 3}
    for shard in rank_pool.run(2, verify_shard, target, drafter, verification):
        assert [run.token_ids for run in shard] == [run.token_ids for run in one]
        for ours, theirs in zip(shard, one, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-6)
            assert ours.raw_logprobs == pytest.approx(theirs.raw_logprobs, abs=2e-6)
