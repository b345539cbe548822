"""The whole engine: the samples are the policy's, and they depend on nothing but the policy, the prompt and the seed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_decode import MODELS, make_engine, prompts, reference_logprobs, reference_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from erollout.engine.engine import Engine
from erollout.errors import UserError
from erollout.types import Rollout, RolloutRequest, SamplingParams

PROMPTS = prompts(5, 1, 16, 33, 150)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def make_requests(sampling: SamplingParams, group_size: int = 3) -> list[RolloutRequest]:
    return [RolloutRequest(i, ids, group_size, sampling, seed=100 + i) for i, ids in enumerate(PROMPTS)]


def by_sample(rollouts: list[Rollout]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Everything that must not depend on the company a sample was made in."""
    return {
        (r.prompt_index, r.sample_index): (r.response_ids, r.rollout_logprobs, r.raw_logprobs, r.finish_reason)
        for r in rollouts
    }


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_full_recomputation_by_transformers(name: str) -> None:
    model = reference_model(name)
    for rollout in make_engine(name).generate(make_requests(GREEDY, group_size=1)):
        ids = [*rollout.prompt_ids, *rollout.response_ids]
        logprobs = reference_logprobs(model, ids)[len(rollout.prompt_ids) - 1 : -1]
        best, second = logprobs.topk(2).values.unbind(-1)
        assert (best - second).min() > 1e-4  # no ties: the comparison means something
        assert logprobs.argmax(-1).tolist() == list(rollout.response_ids)


def test_logprobs_are_transformers_log_softmax() -> None:
    model = reference_model("llama")
    sampling = replace(SAMPLED, temperature=0.7)
    for rollout in make_engine("llama").generate(make_requests(sampling, group_size=2)):
        logprobs = reference_logprobs(model, [*rollout.prompt_ids, *rollout.response_ids])[len(rollout.prompt_ids) - 1 : -1]
        chosen = torch.tensor(rollout.response_ids)[:, None]
        raw = logprobs.gather(1, chosen)[:, 0]
        processed = (logprobs / 0.7).log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.raw_logprobs), raw, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), processed, atol=1e-4, rtol=0)


COMPANY: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1},
    "two at a time": {"max_num_seqs": 2},
    "prompts in chunks of 7": {"max_num_batched_tokens": 7},
    "prompts in chunks of 50": {"max_num_batched_tokens": 50},
    "preempted": {"num_kv_blocks": 14},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_are_bit_equal_in_any_company(dtype: str) -> None:
    requests = make_requests(SAMPLED)
    expected = by_sample(make_engine("llama", dtype=dtype).generate(requests))
    assert len({tokens for tokens, *_ in expected.values()}) == len(expected)  # the samples of a group differ
    for what, settings in COMPANY.items():
        engine = make_engine("llama", dtype=dtype, **settings)
        assert by_sample(engine.generate(requests)) == expected, what
        assert (engine.stats.preemptions > 0) == (what == "preempted")
        assert engine.blocks.num_free == engine.blocks.num_blocks
    engine = make_engine("llama", dtype=dtype)
    assert by_sample(engine.generate(requests[::-1])) == expected
    for request in requests:
        alone = by_sample(engine.generate([replace(request, group_size=1)]))
        assert alone.items() <= expected.items()


def test_a_groups_prompt_is_prefilled_once() -> None:
    engine = make_engine("llama")
    rollouts = engine.generate(make_requests(SAMPLED, group_size=4))
    stats = engine.stats
    assert stats.prefill_tokens == sum(len(ids) for ids in PROMPTS)
    assert stats.recomputed_tokens == 0
    assert stats.decode_tokens == sum(len(r.response_ids) for r in rollouts) == 5 * 4 * 24
    assert stats.steps == len(stats.running) == 24
    assert max(stats.running) == 20


def test_preemption_computes_again_and_counts_it() -> None:
    engine = make_engine("llama", num_kv_blocks=14)
    engine.generate(make_requests(SAMPLED))
    assert engine.stats.prefill_tokens > sum(len(ids) for ids in PROMPTS)
    assert engine.stats.recomputed_tokens > 0


def test_rollouts_are_ordered_and_reported_as_they_finish() -> None:
    stop = SamplingParams(max_tokens=24, stop_token_ids=(3, 11, 40, 41, 42, 90))
    finished: list[Rollout] = []
    rollouts = make_engine("llama").generate(make_requests(stop), on_finished=finished.append)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [(p, s) for p in range(5) for s in range(3)]
    assert by_sample(finished) == by_sample(rollouts)
    lengths = [len(r.response_ids) for r in finished]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]  # all start together: the short ones come first


def test_stop_ids_end_a_response_and_stay_in_it() -> None:
    engine = make_engine("llama")
    free = by_sample(engine.generate(make_requests(SAMPLED)))
    stop_ids = (3, 11, 40, 41, 42, 90)
    for key, (tokens, logprobs, _, reason) in by_sample(
        engine.generate(make_requests(replace(SAMPLED, stop_token_ids=stop_ids)))
    ).items():
        whole = free[key][0]
        stops = [i for i, token in enumerate(whole) if token in stop_ids]
        end = stops[0] + 1 if stops else len(whole)
        assert tokens == whole[:end] and logprobs == free[key][1][:end]
        assert reason == ("stop" if stops else "length")
    ignoring = replace(SAMPLED, stop_token_ids=stop_ids, ignore_eos=True)
    assert by_sample(engine.generate(make_requests(ignoring))) == free


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word w<i>."""
    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings_end_a_response_when_its_text_holds_one() -> None:
    engine = make_engine("llama")
    free = by_sample(engine.generate(make_requests(SAMPLED)))
    engine.tokenizer = word_tokenizer()
    third, last = free[0, 0][0][2:4]
    stop = f"w{third} w{last}"  # spans two tokens
    stopped = by_sample(engine.generate(make_requests(replace(SAMPLED, stop=(stop,), ignore_eos=True))))
    assert stopped[0, 0][0] == free[0, 0][0][:4]
    assert stopped[0, 0][3] == "stop"
    for key, (tokens, *_, reason) in stopped.items():
        assert tokens == free[key][0][: len(tokens)]
        assert (reason == "stop") == (stop in engine.tokenizer.decode(tokens))


def test_requests_with_different_sampling_share_a_batch() -> None:
    engine = make_engine("llama")
    kinds = [GREEDY, SAMPLED, replace(SAMPLED, top_k=1), replace(SAMPLED, repetition_penalty=1.5, max_tokens=9), GREEDY]
    mixed = [replace(r, sampling=s) for r, s in zip(make_requests(SAMPLED, 1), kinds, strict=True)]
    alone = [engine.generate([request])[0] for request in mixed]
    assert by_sample(engine.generate(mixed)) == by_sample(alone)


def test_sleep_releases_and_weights_change_the_samples() -> None:
    engine = make_engine("llama")
    first = engine.generate(make_requests(GREEDY, 1))
    addresses = {name: tensor.data_ptr() for name, tensor in engine.local_tensors().items()}
    engine.sleep()
    assert not engine.cache.is_allocated
    with pytest.raises(RuntimeError, match="sleeps"):
        engine.generate(make_requests(GREEDY, 1))
    engine.wake_up()
    assert by_sample(engine.generate(make_requests(GREEDY, 1))) == by_sample(first)
    engine.local_tensors()["layers.0.o_proj.weight"].mul_(-1)
    engine.weights_updated(2)
    second = engine.generate(make_requests(GREEDY, 1))
    assert by_sample(second) != by_sample(first)
    assert {r.policy_version for r in first} == {1} and {r.policy_version for r in second} == {2}
    assert {name: tensor.data_ptr() for name, tensor in engine.local_tensors().items()} == addresses


def test_generate_without_weights_is_refused() -> None:
    engine = make_engine("llama")
    bare = Engine(engine.architecture, engine.rollout, None, torch.device("cpu"), None, 512)
    with pytest.raises(RuntimeError, match="before the engine has weights"):
        bare.generate(make_requests(GREEDY, 1))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RolloutRequest(0, (1,) * 500, 1, SamplingParams(max_tokens=13), 0), "exceed the model's 512 positions"),
        (RolloutRequest(0, (1,) * 300, 1, SamplingParams(max_tokens=22), 0), "need 21 KV blocks"),
        (RolloutRequest(0, (), 1, SAMPLED, 0), "no tokens"),
        (RolloutRequest(3, (97,), 1, SAMPLED, 0), "prompt 3 has token ids beyond the model's vocabulary of 97"),
        (RolloutRequest(0, (1,), 1, SamplingParams(stop=("x",)), 0), "needs a tokenizer"),
    ],
)
def test_what_can_never_be_served_is_refused_before_any_work(request_: RolloutRequest, message: str) -> None:
    engine = make_engine("llama", num_kv_blocks=20)
    finished: list[Rollout] = []
    with pytest.raises(UserError, match=message):
        engine.generate([*make_requests(GREEDY, 1), request_], on_finished=finished.append)
    assert finished == []


def generate_on_this_rank(
    dtype: str, sampling: SamplingParams, settings: dict[str, Any]
) -> dict[tuple[int, int], tuple[Any, ...]]:
    torch.set_num_threads(1)
    engine = make_engine("llama", dist.group.WORLD, dtype=dtype, **settings)
    return by_sample(engine.generate(make_requests(sampling)))


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 14, "max_num_batched_tokens": 40}], ids=["plain", "preempted"])
def test_two_ranks_sample_the_same_tokens_as_one(rank_pool, settings: dict[str, Any]) -> None:
    expected = by_sample(make_engine("llama").generate(make_requests(SAMPLED)))
    ranks = rank_pool.run(2, generate_on_this_rank, "float32", SAMPLED, settings)
    assert ranks[0] == ranks[1]
    assert {key: values[0] for key, values in ranks[0].items()} == {key: values[0] for key, values in expected.items()}


@pytest.mark.distributed
def test_bfloat16_ranks_stay_in_step_in_any_company(rank_pool) -> None:
    ranks = rank_pool.run(2, generate_on_this_rank, "bfloat16", SAMPLED, {"max_num_seqs": 4})
    assert ranks[0] == ranks[1]
    assert rank_pool.run(2, generate_on_this_rank, "bfloat16", SAMPLED, {"max_num_batched_tokens": 40})[0] == ranks[0]
