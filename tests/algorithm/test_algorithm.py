"""GRPO and its kin: values worked out by hand, and gradients against loops over samples and tokens."""

import math

import pytest
import torch
from ranks import RankPool
from torch import Tensor

from erollout.algorithm import build_algorithm
from erollout.algorithm.grpo import GRPO
from erollout.algorithm.mismatch import mismatch_metrics
from erollout.algorithm.supervised import Supervised
from erollout.config import AlgorithmConfig
from erollout.policy.batch import MicroBatch, TrainSample, collate, cut_micro_batches
from erollout.policy.logprobs import VocabShard, logprobs_and_entropy

K1, K2, K3 = 0.5, 0.125, math.exp(-0.5) - 1 + 0.5
"""The three estimators of KL(policy || reference) for log-probs -1.0 and -1.5."""


def _grpo(**options) -> GRPO:
    return GRPO(AlgorithmConfig(**options))


def _one_token(advantage: float, old: float, ref: float = 0.0) -> MicroBatch:
    """A prompt of one token and a response of one token."""
    return collate([TrainSample([1], [2], advantage, old_logprobs=[old], ref_logprobs=[ref])], [0], [[1.0]], 1)


def _one_token_loss(algorithm: GRPO, ratio: float, advantage: float, ref: float = 0.0) -> tuple[float, float, dict[str, float]]:
    """(loss, d loss / d logprob, report) of a token of log-prob -1 whose old log-prob makes that ratio; its entropy is 2."""
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    losses, report = algorithm.token_loss(logprobs, torch.tensor([[2.0]]), _one_token(advantage, -1.0 - math.log(ratio), ref))
    losses.sum().backward()
    assert tuple(report) == algorithm.metric_names
    return losses.item(), logprobs.grad.item(), {name: value.item() for name, value in report.items()}


def test_advantages_are_relative_to_the_group() -> None:
    # group 7: mean 0.5, unbiased deviation sqrt(4 * 0.25 / 3); group 3: mean 2, deviation sqrt(2)
    rewards, groups = [1.0, 0.0, 1.0, 0.0, 1.0, 3.0], [7, 7, 7, 7, 3, 3]
    plain = _grpo(normalize_advantages=False).advantages(rewards, groups)
    assert plain == pytest.approx([0.5, -0.5, 0.5, -0.5, -1.0, 1.0])
    a, b = 0.5 / math.sqrt(1 / 3), 1 / math.sqrt(2)
    assert _grpo().advantages(rewards, groups) == pytest.approx([a, -a, a, -a, -b, b], rel=1e-5)


def test_samples_of_a_group_need_not_be_adjacent() -> None:
    rewards, groups = [1.0, 1.0, 0.0, 3.0, 1.0, 0.0], [7, 3, 7, 3, 7, 7]
    a, b = 0.5 / math.sqrt(1 / 3), 1 / math.sqrt(2)
    assert _grpo().advantages(rewards, groups) == pytest.approx([a, -b, -a, b, a, -a], rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.3, 1e6 + 0.1])
def test_equal_rewards_have_advantage_zero(normalize: bool, reward: float) -> None:
    advantages = _grpo(normalize_advantages=normalize).advantages([reward] * 3 + [1.0, 0.0], [0, 0, 0, 1, 1])
    assert advantages[:3] == [0.0, 0.0, 0.0]
    assert advantages[3] > 0 > advantages[4]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_group_of_one_sample_has_advantage_zero(normalize: bool) -> None:
    assert _grpo(normalize_advantages=normalize).advantages([0.3, 5.0], [1, 2]) == [0.0, 0.0]


def test_no_samples_have_no_advantages() -> None:
    assert _grpo().advantages([], []) == []


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "low", "high"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.25, 1.0, -1.25, -1.25, 0, 0),  # within the upper bound of 1.3
        (1.5, 1.0, -1.3, 0.0, 0, 1),  # beyond it: no more incentive
        (0.5, 1.0, -0.5, -0.5, 0, 0),  # a good token that became rare is never clipped
        (0.85, -1.0, 0.85, 0.85, 0, 0),  # within the lower bound of 0.8
        (0.5, -1.0, 0.8, 0.0, 1, 0),
        (1.5, -1.0, 1.5, 1.5, 0, 0),  # a bad token that became frequent is never clipped
        (1.5, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_clipping_has_a_bound_for_each_side(
    ratio: float, advantage: float, loss: float, slope: float, low: int, high: int
) -> None:
    got, gradient, report = _one_token_loss(_grpo(clip_ratio_low=0.2, clip_ratio_high=0.3), ratio, advantage)
    assert got == pytest.approx(loss, abs=1e-6)
    assert gradient == pytest.approx(slope, abs=1e-6)
    assert (report["clip_fraction_low"], report["clip_fraction_high"]) == (low, high)
    assert report["ratio"] == pytest.approx(ratio, rel=1e-6)
    assert report["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)
    assert report["kl_reference"] == 0.0


# d k1 = 1, d k2 = log(p/q), d k3 = 1 - q/p
@pytest.mark.parametrize(("estimator", "kl", "slope"), [("k1", K1, 1.0), ("k2", K2, 0.5), ("k3", K3, 1 - math.exp(-0.5))])
def test_kl_in_the_loss(estimator: str, kl: float, slope: float) -> None:
    algorithm = _grpo(kl_coefficient=0.1, kl_estimator=estimator)
    assert algorithm.uses_reference
    loss, gradient, report = _one_token_loss(algorithm, ratio=1.0, advantage=2.0, ref=-1.5)
    assert loss == pytest.approx(-2.0 + 0.1 * kl, rel=1e-6)
    assert gradient == pytest.approx(-2.0 + 0.1 * slope, rel=1e-6)
    assert report["kl_reference"] == pytest.approx(kl, rel=1e-6)
    sample = TrainSample([1], [2], old_logprobs=[-1.0], ref_logprobs=[-1.5])
    assert algorithm.shaped_reward(1.0, sample) == 1.0


@pytest.mark.parametrize(
    ("estimator", "kl"), [("k1", K1 - 1.0), ("k2", K2 + 0.5), ("k3", K3 + math.exp(1.0) - 1 - 1)], ids=["k1", "k2", "k3"]
)
def test_kl_in_the_reward(estimator: str, kl: float) -> None:
    algorithm = _grpo(kl_coefficient=0.1, kl_estimator=estimator, kl_placement="reward")
    sample = TrainSample([1], [2, 3], old_logprobs=[-1.0, -2.0], ref_logprobs=[-1.5, -1.0])
    assert algorithm.shaped_reward(1.0, sample) == pytest.approx(1.0 - 0.1 * kl, rel=1e-6)
    loss, gradient, _ = _one_token_loss(algorithm, ratio=1.0, advantage=2.0, ref=-1.5)
    assert (loss, gradient) == (pytest.approx(-2.0), pytest.approx(-2.0))


def test_without_a_coefficient_there_is_no_reference() -> None:
    algorithm = _grpo(kl_coefficient=0.0, kl_placement="reward")
    assert not algorithm.uses_reference
    assert algorithm.shaped_reward(0.25, TrainSample([1], [2])) == 0.25


def test_entropy_is_rewarded() -> None:
    loss, _, report = _one_token_loss(_grpo(entropy_coefficient=0.01), ratio=1.0, advantage=2.0)
    assert loss == pytest.approx(-2.0 - 0.01 * 2.0)
    assert report["entropy"] == 2.0


@pytest.mark.parametrize(("aggregation", "loss"), [("token-mean", (2.0 - 3 * 1.0) / 4), ("sequence-mean", (2.0 - 1.0) / 2)])
def test_aggregation_weighs_tokens_or_sequences(aggregation: str, loss: float) -> None:
    """One token of advantage -2 against three of advantage 1, all with ratio 1."""
    samples = [TrainSample([1], [2], -2.0, old_logprobs=[-1.0]), TrainSample([1], [2, 3, 4], 1.0, old_logprobs=[-1.0] * 3)]
    algorithm = _grpo(aggregation=aggregation)
    batch = collate(samples, [0, 1], algorithm.token_weights(samples), 1)
    losses, _ = algorithm.token_loss(-batch.mask, torch.zeros_like(batch.mask), batch)
    assert (losses * batch.weights).sum().item() == pytest.approx(loss)


def test_supervised_loss_is_cross_entropy() -> None:
    logprobs, entropy = torch.tensor([[-1.0, -2.0]]), torch.tensor([[0.5, 0.25]])
    losses, report = Supervised().token_loss(logprobs, entropy, _one_token(0.0, 0.0))
    assert losses.tolist() == [[1.0, 2.0]] and tuple(report) == Supervised.metric_names


def _samples(vocab: int) -> list[TrainSample]:
    """Three samples of different shape whose policies drifted far enough to be clipped on both sides."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for prompt, response, advantage in ((2, 3, 1.0), (1, 5, -0.7), (4, 1, 0.4), (3, 2, -1.2)):
        ids = torch.randint(vocab, (prompt + response,), generator=generator).tolist()
        old, ref, rollout = (-3 * torch.rand(3, response, generator=generator)).tolist()
        samples.append(TrainSample(ids[:prompt], ids[prompt:], advantage, rollout, old, ref))
    return samples


def _plain_loss(logits: list[Tensor], samples: list[TrainSample], config: AlgorithmConfig, temperature: float) -> Tensor:
    """The loss of a batch by loops: logits[i] is [length of sample i, vocab], row t predicting the token at t + 1."""
    per_sample = []
    for rows, sample in zip(logits, samples, strict=True):
        tokens = []
        for t, token in enumerate(sample.response_ids):
            distribution = torch.log_softmax(rows[len(sample.prompt_ids) + t - 1] / temperature, 0)
            ratio = torch.exp(distribution[token] - sample.old_logprobs[t])
            bounded = min(max(ratio, torch.tensor(1 - config.clip_ratio_low)), torch.tensor(1 + config.clip_ratio_high))
            loss = -min(ratio * sample.advantage, bounded * sample.advantage)
            if config.kl_placement == "loss" and config.kl_coefficient:
                x = distribution[token] - sample.ref_logprobs[t]
                kl = {"k1": x, "k2": x * x / 2, "k3": torch.exp(-x) - 1 + x}[config.kl_estimator]
                loss = loss + config.kl_coefficient * kl
            tokens.append(loss + config.entropy_coefficient * (distribution.exp() * distribution).sum())
        per_sample.append(torch.stack(tokens))
    if config.aggregation == "token-mean":
        return torch.cat(per_sample).mean()
    return torch.stack([losses.mean() for losses in per_sample]).mean()


CONFIGS = [
    AlgorithmConfig(),
    AlgorithmConfig(clip_ratio_low=0.1, clip_ratio_high=0.28, aggregation="sequence-mean", entropy_coefficient=0.02),
    AlgorithmConfig(kl_coefficient=0.05, kl_estimator="k1", entropy_coefficient=-0.01),
    AlgorithmConfig(kl_coefficient=0.05, kl_estimator="k2", aggregation="sequence-mean"),
    AlgorithmConfig(kl_coefficient=0.05, kl_estimator="k3", clip_ratio_high=0.5),
    AlgorithmConfig(kl_coefficient=0.05, kl_estimator="k3", kl_placement="reward"),
]


@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_gradient_of_the_whole_loss_is_that_of_plain_loops(config: AlgorithmConfig, max_tokens: int) -> None:
    """Padding, masks, weights, micro-batches and the vocabulary-parallel function together."""
    vocab, temperature, samples = 11, 0.8, _samples(11)
    generator = torch.Generator().manual_seed(9)
    logits = [torch.randn(s.length, vocab, generator=generator).requires_grad_() for s in samples]
    plain = _plain_loss(logits, samples, config, temperature)
    wanted = torch.autograd.grad(plain, logits)

    algorithm = build_algorithm(config)
    weights = algorithm.token_weights(samples)
    total = torch.zeros(())
    reported = 0.0
    for group in cut_micro_batches([s.length for s in samples], max_tokens):
        batch = collate(samples, group, weights, pad_multiple=4)
        padded = torch.randn(*batch.tokens.shape, vocab)  # what padding holds must not matter
        for row, index in enumerate(group):
            padded[row, : samples[index].length - 1] = logits[index][:-1]
        logprobs, entropy = logprobs_and_entropy(padded, batch.labels, VocabShard(None, 0, vocab), temperature)
        losses, report = algorithm.token_loss(logprobs, entropy, batch)
        total = total + (losses * batch.weights).sum()
        reported += (report["loss"].detach() * batch.weights).sum().item()
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-6)
    assert reported == pytest.approx(plain.item(), rel=1e-5)
    for got, want in zip(torch.autograd.grad(total, logits), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_tokens_of_others_are_in_neither_the_loss_nor_the_reward() -> None:
    """A tool's output between two sampled tokens: as if it were a prompt's, whatever log-probs it has."""
    algorithm = _grpo(kl_coefficient=0.5, kl_placement="reward", kl_estimator="k1")
    masked = TrainSample(
        [1], [2, 3, 4], 1.0, old_logprobs=[-1.0, -7.0, -2.0], ref_logprobs=[-1.5, 0.0, -2.0], loss_mask=[1, 0, 1]
    )
    plain = TrainSample([1], [2, 4], 1.0, old_logprobs=[-1.0, -2.0], ref_logprobs=[-1.5, -2.0])
    assert algorithm.shaped_reward(1.0, masked) == algorithm.shaped_reward(1.0, plain) == 0.75
    found = []
    for sample, logprobs in ((masked, [-1.1, -3.0, -1.9]), (plain, [-1.1, -1.9])):
        batch = collate([sample], [0], algorithm.token_weights([sample]), 1)
        losses, report = algorithm.token_loss(torch.tensor([logprobs]), torch.zeros(1, len(logprobs)), batch)
        found.append([(values * batch.weights).sum().item() for values in (losses, *report.values())])
    assert found[0] == pytest.approx(found[1])


def _mismatch(samples_by_rank: list[list[TrainSample]]) -> dict[str, float]:
    return mismatch_metrics(samples_by_rank[torch.distributed.get_rank()], torch.device("cpu"))


@pytest.mark.distributed
def test_mismatch_is_measured_over_all_ranks(rank_pool: RankPool) -> None:
    first = TrainSample([1], [2, 3], old_logprobs=[-1.0, -2.0], rollout_logprobs=[-1.5, -1.0])  # old - rollout: 0.5, -1
    second = TrainSample([1], [2], old_logprobs=[-0.5], rollout_logprobs=[-0.5])
    k3 = [math.exp(0.5) - 1 - 0.5, math.exp(-1.0) - 1 + 1.0]
    for split in ([[first], [second]], [[first, second], []]):  # a rank may have nothing to say
        for metrics in rank_pool.run(2, _mismatch, split):
            assert metrics == pytest.approx(
                {
                    "mismatch/mean_abs_difference": 1.5 / 3,
                    "mismatch/kl": sum(k3) / 3,
                    "mismatch/max_ratio": math.exp(0.5),
                    "mismatch/max_abs_difference": 1.0,
                }
            )


@pytest.mark.distributed
def test_mismatch_of_equal_logprobs_and_of_nothing(rank_pool: RankPool) -> None:
    equal = TrainSample([1], [2, 3], old_logprobs=[-1.0, -2.0], rollout_logprobs=[-1.0, -2.0])
    for split, ratio in (([[equal], [equal]], 1.0), ([[], []], 0.0)):
        for metrics in rank_pool.run(2, _mismatch, split):
            assert metrics.pop("mismatch/max_ratio") == ratio
            assert set(metrics.values()) == {0.0}
