"""The engine with drafts: coupled samples are those without drafts, bit for bit, whatever happens on the way."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from test_engine import COMPANY, GREEDY, SAMPLED, by_sample, make_requests, word_tokenizer
from test_verifier import VERIFICATIONS
from tiny_decode import make_engine, prompts, reference_logprobs, reference_model
from tiny_speculation import DRAFTER, NOISE, make_speculative_engine

from erollout.engine.engine import Engine
from erollout.engine.model.inputs import slots_of
from erollout.engine.orders import FixedControl
from erollout.engine.proposers.base import DraftRequest, Drafts, Proposer
from erollout.engine.proposers.quantized_policy import ModelProposer
from erollout.engine.sampling.verifier import Verification
from erollout.speculation.step import Arm, StepOutcome
from erollout.types import Rollout, RolloutRequest, SamplingParams

THREE = Arm(DRAFTER, 3)

PROCESSED = SamplingParams(temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.3, max_tokens=24)


def check_pool(engine: Engine) -> None:
    assert engine.blocks.num_free == engine.blocks.num_blocks


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drafter", [*NOISE, "ngram"])
def test_coupled_samples_are_bit_equal_to_those_without_drafts(drafter: str, dtype: str) -> None:
    requests = make_requests(SAMPLED)
    expected = by_sample(make_engine("llama", dtype=dtype).generate(requests))
    for num_speculative_tokens in (1, 3, 7):
        engine = make_speculative_engine(drafter, "coupled", num_speculative_tokens, dtype=dtype)
        assert by_sample(engine.generate(requests)) == expected
        check_pool(engine)
        speculation = engine.stats.speculation
        assert len(speculation.drafted_at) == num_speculative_tokens
        if drafter == "same":
            assert speculation.acceptance_rate == 1 and speculation.wasted == 0
            assert engine.stats.steps == 1 + -(-23 // (1 + num_speculative_tokens))
        else:
            assert 0 < speculation.accepted < speculation.drafted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coupled_samples_are_bit_equal_in_any_company(dtype: str) -> None:
    requests = make_requests(SAMPLED)
    expected = by_sample(make_engine("llama", dtype=dtype).generate(requests))
    for what, settings in COMPANY.items():
        engine = make_speculative_engine("good", "coupled", 3, dtype=dtype, **settings)
        assert by_sample(engine.generate(requests)) == expected, what
        assert (engine.stats.preemptions > 0) == (what == "preempted")
        check_pool(engine)
    engine = make_speculative_engine("good", "coupled", 3, dtype=dtype)
    assert by_sample(engine.generate(requests[::-1])) == expected


class Sparing:
    """A proposer that has fewer drafts than asked, and now and then none."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer

    def require(self, policy_version: int) -> None:
        self.proposer.require(policy_version)

    def propose(self, request: DraftRequest) -> Drafts:
        numbers = (s.num_tokens % (1 + asked) for s, asked in zip(request.sequences, request.num_drafts, strict=True))
        return replace(self.proposer.propose(request), num_drafts=tuple(numbers))

    def sleep(self) -> None:
        self.proposer.sleep()


@dataclass(frozen=True)
class Listener(FixedControl):
    outcomes: list[StepOutcome] = field(default_factory=list)

    def observe(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_a_proposer_may_have_fewer_drafts_than_asked(verification: Verification) -> None:
    requests = make_requests(SAMPLED)
    expected = by_sample(make_engine("llama").generate(requests))
    for settings in ({}, COMPANY["preempted"], {"max_num_seqs": 1}):
        engine = make_speculative_engine("good", verification, 3, **settings)
        engine.proposers = {DRAFTER: Sparing(engine.proposers[DRAFTER])}
        listener = Listener(THREE)
        samples = by_sample(engine.run(listener, requests=requests))
        assert verification == "rejection" or samples == expected
        check_pool(engine)
        speculation, outcomes = engine.stats.speculation, listener.outcomes
        assert 0 < speculation.accepted < speculation.drafted < speculation.requested
        assert speculation.requested == sum(outcome.requested for outcome in outcomes)
        assert all((outcome.arm == THREE) == bool(outcome.requested) for outcome in outcomes)
        if settings.get("max_num_seqs") == 1:
            empty = [outcome for outcome in outcomes if outcome.requested and not outcome.drafted_at]
            assert empty and all(outcome.seconds_drafting > 0 and outcome.emitted == 1 for outcome in empty), (
                "autoregressive steps"
            )


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("drafter", ["same", "good", "ngram"])
def test_coupled_samples_under_every_filter_and_a_penalty(drafter: str) -> None:
    requests = make_requests(PROCESSED)
    engine = make_speculative_engine(drafter, "coupled", 3)
    assert by_sample(engine.generate(requests)) == by_sample(make_engine("llama").generate(requests))
    if drafter == "same":
        assert engine.stats.speculation.acceptance_rate == 1  # the drafter applies the same settings, to its own drafts too


@pytest.mark.quick(every=5)
@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("name", ["llama3-tied-wide", "qwen2-tied", "qwen3-tied"])
def test_greedy_tokens_are_those_without_drafts(name: str, verification: Verification) -> None:
    requests = [
        RolloutRequest(i, ids, 1, replace(GREEDY, max_tokens=12), seed=0) for i, ids in enumerate(prompts(*range(1, 41)))
    ]
    expected = by_sample(make_engine(name).generate(requests))
    for num_speculative_tokens in (1, 3, 7):
        engine = make_speculative_engine("good", verification, num_speculative_tokens, name=name)
        assert by_sample(engine.generate(requests)) == expected
        assert 0 < engine.stats.speculation.accepted < engine.stats.speculation.drafted


@pytest.mark.full
def test_greedy_tokens_are_those_without_drafts_over_a_thousand_prompts() -> None:
    lengths = [1 + i % 37 for i in range(1000)]
    requests = [RolloutRequest(i, ids, 1, replace(GREEDY, max_tokens=12), seed=0) for i, ids in enumerate(prompts(*lengths))]
    expected = by_sample(make_engine("llama", num_kv_blocks=2000).generate(requests))
    for verification in VERIFICATIONS:
        for num_speculative_tokens in (1, 3, 7):
            engine = make_speculative_engine("good", verification, num_speculative_tokens, num_kv_blocks=2000)
            assert by_sample(engine.generate(requests)) == expected


def test_responses_end_inside_an_accepted_run_where_they_end_without_drafts() -> None:
    """At stop ids, at max_tokens; what was accepted beyond is dropped."""
    wasted = 0
    for sampling in (
        replace(SAMPLED, stop_token_ids=(3, 11, 40, 41, 42, 90)),
        *(replace(SAMPLED, max_tokens=n) for n in (1, 2, 3, 5)),
    ):
        requests = make_requests(sampling)
        engine = make_speculative_engine("same", "coupled", 7)
        assert by_sample(engine.generate(requests)) == by_sample(make_engine("llama").generate(requests))
        check_pool(engine)
        speculation = engine.stats.speculation
        assert speculation.acceptance_rate in (0, 1)
        wasted += speculation.wasted
        if sampling.max_tokens < 24:
            assert speculation.wasted == 0  # no more is drafted than can be emitted
        assert engine.stats.decode_tokens == sum(len(r.response_ids) for r in engine.generate(requests))
    assert wasted > 0


def test_a_stop_string_ends_a_response_inside_an_accepted_run() -> None:
    plain, speculative = make_engine("llama"), make_speculative_engine("same", "coupled", 7)
    free = by_sample(plain.generate(make_requests(SAMPLED)))
    plain.tokenizer = speculative.tokenizer = word_tokenizer()
    third, last = free[0, 0][0][2:4]
    requests = make_requests(replace(SAMPLED, stop=(f"w{third} w{last}",), ignore_eos=True))
    stopped = by_sample(speculative.generate(requests))
    assert stopped == by_sample(plain.generate(requests))
    assert stopped[0, 0][0] == free[0, 0][0][:4] and stopped[0, 0][3] == "stop"


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("drafter", ["same", "good", "bad", "ngram"])
def test_rejection_under_preemption(drafter: str) -> None:
    """Its samples differ from those without drafts, and with the passes that they are drafted in; neighbours don't matter."""
    requests = make_requests(SAMPLED)
    engine = make_speculative_engine(drafter, "rejection", 3)
    expected = by_sample(engine.generate(requests))
    assert (engine.stats.speculation.acceptance_rate == 1) == (drafter == "same")
    assert by_sample(engine.generate(requests[::-1])) == expected
    preempted = make_speculative_engine(drafter, "rejection", 3, num_kv_blocks=14)
    assert [len(r.response_ids) for r in preempted.generate(requests)] == [24] * 15
    assert preempted.stats.preemptions > 0
    check_pool(preempted)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_logprobs_are_transformers_log_softmax(verification: Verification) -> None:
    """Accepted, recovered and bonus tokens have the log-probs of transformers."""
    engine, model = make_speculative_engine("good", verification, 3), reference_model("llama")
    for rollout in engine.generate(make_requests(replace(SAMPLED, temperature=0.7), group_size=2)):
        logprobs = reference_logprobs(model, [*rollout.prompt_ids, *rollout.response_ids])[len(rollout.prompt_ids) - 1 : -1]
        chosen = torch.tensor(rollout.response_ids)[:, None]
        processed = (logprobs / 0.7).log_softmax(-1).gather(1, chosen)[:, 0]
        raw = logprobs.gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.raw_logprobs), raw, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), processed, atol=1e-4, rtol=0)
    assert 0 < engine.stats.speculation.accepted < engine.stats.speculation.drafted


@pytest.mark.parametrize("drafter", ["good", pytest.param("bad", marks=pytest.mark.full)])
def test_two_drafted_tokens_follow_the_models_distribution(drafter: str) -> None:
    """Chi-square of the two tokens after a sampled one, against transformers' probabilities of all 27 responses."""
    sampling = SamplingParams(temperature=1.5, top_k=3, max_tokens=4)
    engine = make_speculative_engine(drafter, "rejection", 2, max_num_seqs=256)
    prompt = prompts(9)[0]
    rollouts = engine.generate([RolloutRequest(0, prompt, 2000, sampling, seed=7)])
    paths = path_probabilities(prompt, sampling, 3)
    counts = {path: 0 for path in paths}
    for rollout in rollouts:
        counts[rollout.response_ids[:3]] += 1
    assert len(paths) == 27 and 0 < engine.stats.speculation.accepted < engine.stats.speculation.drafted
    chi_square = sum((counts[path] - 2000 * p) ** 2 / (2000 * p) for path, p in paths.items())
    assert chi_square < 26 + 5 * math.sqrt(2 * 26)


def path_probabilities(prompt: tuple[int, ...], sampling: SamplingParams, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every response of this length under temperature and top-k."""
    model, paths = reference_model("llama"), {(): 1.0}
    for _ in range(length):
        longer = {}
        for path, probability in paths.items():
            top = (reference_logprobs(model, [*prompt, *path])[-1] / sampling.temperature).topk(sampling.top_k)
            for token, p in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                longer[*path, token] = probability * p
        paths = longer
    return paths


class Watched:
    """A proposer, and what an observer sees before and after each of its proposals."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.proposer = engine, engine.proposers[DRAFTER]
        self.calls = self.crossings = 0
        engine.speculate({DRAFTER: self}, engine.arm, engine.verifier.verification)

    def require(self, policy_version: int) -> None:
        self.proposer.require(policy_version)

    def sleep(self) -> None:
        self.proposer.sleep()

    def propose(self, request: DraftRequest) -> Drafts:
        cache = self.engine.cache
        before = self._slots()
        drafts = self.proposer.propose(request)
        changed = set((self._slots() != before).any(1).nonzero().flatten().tolist())
        reserved: set[int] = set()
        for sequence, num_drafts in zip(request.sequences, request.num_drafts, strict=True):
            start = sequence.num_computed_tokens
            reserved |= set(slots_of(sequence.block_table, cache.block_size, start, start + num_drafts))
            self.crossings += start // cache.block_size < (start + num_drafts) // cache.block_size
        assert changed <= reserved
        assert changed & reserved
        self.calls += 1
        return drafts

    def _slots(self) -> torch.Tensor:
        """Everything in the cache, by slot."""
        cache = self.engine.cache
        layers = torch.stack([cache.layer(i) for i in range(self.engine.architecture.num_layers)])
        return layers.permute(2, 3, 0, 1, 4).flatten(2).flatten(0, 1).clone()


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 30, "max_num_batched_tokens": 60}], ids=["plain", "preempted"])
def test_drafting_writes_to_reserved_slots_alone(settings: dict[str, Any]) -> None:
    """Across block borders, beside prompts that are computed in chunks and siblings that share blocks."""
    engine = make_speculative_engine("good", "coupled", 7, **{"num_kv_blocks": 60, "block_size": 8, **settings})
    watched = Watched(engine)
    rollouts = engine.generate(make_requests(SAMPLED))
    assert by_sample(rollouts) == by_sample(make_engine("llama").generate(make_requests(SAMPLED)))
    assert watched.calls > 5 and watched.crossings > 10


class Failing:
    """Spoils the whole cache and raises, in the third proposal."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.proposer, self.calls = engine, engine.proposers[DRAFTER], 0

    def require(self, policy_version: int) -> None:
        self.proposer.require(policy_version)

    def sleep(self) -> None:
        self.proposer.sleep()

    def propose(self, request: DraftRequest) -> Drafts:
        self.calls += 1
        if self.calls == 3:
            for layer in range(self.engine.architecture.num_layers):
                self.engine.cache.layer(layer).fill_(float("nan"))
            raise InterruptedError("in the middle of drafting")
        return self.proposer.propose(request)


def test_an_error_while_drafting_leaves_nothing_behind() -> None:
    engine = make_speculative_engine("good", "coupled", 3, num_kv_blocks=30)
    expected = by_sample(engine.generate(make_requests(SAMPLED)))
    engine.speculate({DRAFTER: Failing(engine)}, THREE)
    with pytest.raises(InterruptedError):
        engine.generate(make_requests(SAMPLED))
    check_pool(engine)
    assert by_sample(engine.generate(make_requests(SAMPLED))) == expected  # its later proposals work


def test_a_caller_that_cancels_gets_a_full_pool() -> None:
    engine = make_speculative_engine("good", "coupled", 3, num_kv_blocks=30)

    def cancel(rollout: Rollout) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_requests(SAMPLED), on_finished=cancel)
    check_pool(engine)
    assert len(engine.generate(make_requests(SAMPLED))) == 15


def test_a_stale_proposer_is_refused() -> None:
    engine = make_speculative_engine("good", "coupled", 3)
    engine.weights_updated(2)
    with pytest.raises(RuntimeError, match="policy version 1 but the engine holds version 2"):
        engine.generate(make_requests(SAMPLED))
    proposer = engine.proposers[DRAFTER]
    engine.speculate({DRAFTER: proposer})
    engine.generate(make_requests(SAMPLED, 1))  # nobody asks it
    assert isinstance(proposer, ModelProposer)
    proposer.weights_updated(2)
    engine.speculate({DRAFTER: proposer}, THREE)
    assert {r.policy_version for r in engine.generate(make_requests(SAMPLED, 1))} == {2}


def test_sleep_reaches_the_proposer_and_it_wakes_with_the_engine() -> None:
    engine = make_speculative_engine("good", "rejection", 3)
    first = by_sample(engine.generate(make_requests(SAMPLED)))
    engine.sleep()
    engine.wake_up()
    assert by_sample(engine.generate(make_requests(SAMPLED))) == first


def test_speculation_can_change_between_rollouts() -> None:
    engine = make_speculative_engine("good", "coupled", 3)
    expected = by_sample(engine.generate(make_requests(SAMPLED)))
    with_drafts = engine.stats
    assert with_drafts.speculation.num_drafts > 0
    assert with_drafts.speculation.seconds_drafting > 0 and with_drafts.speculation.seconds_verifying > 0
    assert with_drafts.decode_tokens == 15 * 24
    engine.speculate({})
    assert by_sample(engine.generate(make_requests(SAMPLED))) == expected
    assert engine.stats.speculation.num_drafts == 0 and engine.stats.steps == 24 > with_drafts.steps


def generate_on_this_rank(
    sampling: SamplingParams, verification: Verification, numbers: list[int], settings: dict[str, Any]
) -> list[dict[tuple[int, int], tuple[Any, ...]]]:
    """Without drafts, then with each number of them."""
    torch.set_num_threads(1)
    runs = [by_sample(make_engine("llama", dist.group.WORLD, **settings).generate(make_requests(sampling)))]
    for number in numbers:
        engine = make_speculative_engine("good", verification, number, dist.group.WORLD, **settings)
        runs.append(by_sample(engine.generate(make_requests(sampling))))
        assert 0 < engine.stats.speculation.accepted < engine.stats.speculation.drafted
        check_pool(engine)
    return runs


@pytest.mark.distributed
@pytest.mark.parametrize(
    "sampling",
    [SAMPLED, pytest.param(GREEDY, marks=pytest.mark.full), pytest.param(PROCESSED, marks=pytest.mark.full)],
    ids=["sampled", "greedy", "processed"],
)
def test_coupled_samples_on_two_ranks(rank_pool: RankPool, sampling: SamplingParams) -> None:
    expected = by_sample(make_engine("llama").generate(make_requests(sampling)))
    numbers, settings = ([3], {"num_kv_blocks": 14, "max_num_batched_tokens": 40}) if sampling is SAMPLED else ([1, 3, 7], {})
    ranks = rank_pool.run(2, generate_on_this_rank, sampling, "coupled", numbers, settings)
    assert ranks[0] == ranks[1]
    for with_drafts in ranks[0][1:]:
        assert with_drafts == ranks[0][0]
    assert {key: values[0] for key, values in ranks[0][0].items()} == {key: values[0] for key, values in expected.items()}


@pytest.mark.distributed
def test_rejection_keeps_ranks_in_step(rank_pool: RankPool) -> None:
    for sampling in (SAMPLED, GREEDY):
        ranks = rank_pool.run(2, generate_on_this_rank, sampling, "rejection", [3], {"dtype": "bfloat16"})
        assert ranks[0] == ranks[1]
        without, with_drafts = ranks[0]
        assert (with_drafts == without) == (sampling is GREEDY)
