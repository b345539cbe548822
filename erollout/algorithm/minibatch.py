"""Split of a rollout's samples over optimizer steps and data-parallel ranks. Every rank computes the same split."""

from collections.abc import Sequence
from dataclasses import dataclass

from erollout.algorithm.protocol import Algorithm, WeightedLoss
from erollout.parallel.collectives import all_sum
from erollout.parallel.groups import ParallelContext
from erollout.policy.actor import Actor
from erollout.policy.batch import TrainSample, balance
from erollout.types import Rollout, ScoredRollout


@dataclass(slots=True)
class MiniBatch:
    """One data-parallel rank's share of the samples of one optimizer step."""

    indices: list[int]
    """Indices into the rollout's list of samples."""
    samples: list[TrainSample]
    weights: list[list[float]]
    """One per response id of each sample: the token's share in the loss of the optimizer step over all data-parallel ranks."""


def split(
    scored: Sequence[ScoredRollout],
    global_batch_size: int,
    data_parallel_size: int,
    data_parallel_rank: int,
    loss: WeightedLoss,
    raw_logprobs: bool = False,
) -> list[MiniBatch]:
    """Consecutive runs of global_batch_size samples, each balanced over the data-parallel ranks by tokens.

    raw_logprobs: whether to compare the engine's raw log-probs, instead of the processed ones, with the actor's.
    """
    samples = [_train_sample(s.rollout, raw_logprobs) for s in scored]
    return [
        share(
            samples,
            range(start, min(start + global_batch_size, len(samples))),
            data_parallel_size,
            data_parallel_rank,
            loss,
        )
        for start in range(0, len(samples), global_batch_size)
    ]


def share(samples: Sequence[TrainSample], indices: Sequence[int], ranks: int, rank: int, loss: WeightedLoss) -> MiniBatch:
    """The share of data-parallel rank `rank` in one optimizer step on the samples with these indices, balanced by tokens."""
    part = [samples[i] for i in indices]
    weights = loss.token_weights(part)
    mine = balance([sample.length for sample in part], ranks)[rank]
    return MiniBatch([indices[i] for i in mine], [part[i] for i in mine], [weights[i] for i in mine])


def add_logprobs(batches: Sequence[MiniBatch], actor: Actor, uses_reference: bool) -> None:
    """Give the samples their old (and reference) log-probs, before any update changes the policy. Collective."""
    for batch in batches:
        old = actor.compute_logprobs(batch.samples)
        ref = actor.compute_logprobs(batch.samples, reference=True) if uses_reference else old
        for sample, old_logprobs, ref_logprobs in zip(batch.samples, old, ref, strict=True):
            sample.old_logprobs, sample.ref_logprobs = old_logprobs, ref_logprobs


def add_advantages(
    batches: Sequence[MiniBatch], scored: Sequence[ScoredRollout], algorithm: Algorithm, context: ParallelContext
) -> dict[str, float]:
    """Give the samples their advantages in their groups, which lie on several ranks. Collective.

    Returns metrics of all samples' advantages.
    """
    shaped = [0.0] * len(scored)
    if context.is_replica_leader:  # each sample's log-probs are known to one model replica only
        for batch in batches:
            for index, sample in zip(batch.indices, batch.samples, strict=True):
                shaped[index] = algorithm.shaped_reward(scored[index].reward, sample)
    groups = [sample.rollout.prompt_index for sample in scored]
    advantages = algorithm.advantages(all_sum(shaped, context.device), groups)
    for batch in batches:
        for index, sample in zip(batch.indices, batch.samples, strict=True):
            sample.advantage = advantages[index]
    mean = sum(advantages) / len(advantages)
    return {
        "advantage/mean": mean,
        "advantage/std": (sum((advantage - mean) ** 2 for advantage in advantages) / len(advantages)) ** 0.5,
        "advantage/min": min(advantages),
        "advantage/max": max(advantages),
    }


def reported_samples(batches: Sequence[MiniBatch], context: ParallelContext) -> list[TrainSample]:
    """This rank's samples for figures that are summed over all ranks: each sample is on one of them."""
    return [sample for batch in batches for sample in batch.samples] if context.is_replica_leader else []


def _train_sample(rollout: Rollout, raw: bool) -> TrainSample:
    logprobs = rollout.raw_logprobs if raw else rollout.rollout_logprobs
    return TrainSample(rollout.prompt_ids, rollout.response_ids, rollout_logprobs=logprobs, loss_mask=rollout.loss_mask)
